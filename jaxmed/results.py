"""The folder that a run writes: `run.json` says what was asked, `effects.zarr` holds the effects.

A run can stop at any moment. Every array is chunked by pair, a pair's effects are written before
its `done`, and `effects` gives only what `done` vouches for, so half a write is never read.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Sequence

import numpy as np
import zarr

from jaxmed.planning import SITES
from models.errors import InputError

GRANULARITIES = tuple(SITES)
MODULE_SITES = SITES["module"]
TOKEN_SITES = SITES["token"]

NOT_RUN, EXACT, ESTIMATED, FAILED = range(4)

# Keys of a run that say where and when it ran, not what was asked; a resumed run may change them.
CIRCUMSTANCES = (
    *("command", "device", "memory_gb", "out", "overwrite", "seconds", "show_text", "started"),
    "versions",
)

_RUN_FILE = "run.json"
_EFFECTS_FILE = "effects.zarr"
_OWN_FILES = (_RUN_FILE, _EFFECTS_FILE, "summary.parquet", "report.html", "figures")
_TOTALS = ("te", "y_base", "y_source")
_ESTIMATES = ("screen/nie", "screen/tie")
_SHAPED_AS = {"screen": "neuron"}
_RECORDED_ON_ARRAYS = ("positions", "metric", "precision")
_WRITTEN_HERE = ("finished", "pair_ids", "sizes", "granularities", "measured")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many units a model and its pairs have.

    Attributes:
        layers: blocks of the decoder.
        heads: query heads per layer.
        neurons: groups of adjacent neurons per layer, ceil(intermediate size / group size).
        positions: how far the aligned prompt positions of any pair reach, counted backwards from
            the last prompt token.
        sites: those that the user's directions belong to.
        directions: the most directions that any of these sites has in a layer.
    """

    layers: int
    heads: int
    neurons: int
    positions: int
    sites: tuple[str, ...] = ()
    directions: int = 0

    @classmethod
    def of(cls, run: dict) -> "Sizes":
        """Those that `run.json` holds."""
        return cls(**{**run["sizes"], "sites": tuple(run["sizes"]["sites"])})

    def shape(self, granularity: str) -> tuple[int, ...]:
        """The shape of one pair's effects; its first axis is the layer."""
        return {
            "layer": (self.layers,),
            "module": (self.layers, len(MODULE_SITES)),
            "head": (self.layers, self.heads),
            "token": (self.layers, len(TOKEN_SITES), self.positions),
            "neuron": (self.layers, self.neurons),
            "direction": (self.layers, len(self.sites), self.directions),
        }[granularity]


class Results:
    """An open results folder.

    Attributes:
        folder: its path.
        run: what `run.json` holds: the settings, and what `finish` added.
        sizes: the `Sizes` of the arrays.
        pair_ids: the pairs' ids, in the order of every array's first axis.
        bases: the base prompt of each pair; its own id where the run does not say.
        granularities: those that the run was asked for, coarse to fine.
    """

    def __init__(self, folder: pathlib.Path, run: dict, group: zarr.Group):
        self.folder = folder
        self.run = run
        self.sizes = Sizes.of(run)
        self.pair_ids = tuple(run["pair_ids"])
        self.bases = tuple(run.get("pair_bases", self.pair_ids))
        self.granularities = tuple(run["granularities"])
        self._group = group

    @classmethod
    def create(cls, folder, run: dict, sizes: Sizes, pair_ids, granularities) -> "Results":
        """Starts a results folder.

        Args:
            folder: a path; made if it is missing, and must be empty.
            run: what was asked, as JSON values; "positions", "metric" and "precision" are needed.
                Where its "screen" is not 0 there is room for estimates of the neurons. Its
                "pair_bases" are the base prompts of the pairs.
            sizes: the sizes of the arrays.
            pair_ids: one distinct id per pair.
            granularities: those to make arrays for, out of `GRANULARITIES`.

        Raises:
            InputError: the folder is not empty or cannot be made, or an argument is not as above.
        """
        folder = pathlib.Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not an empty folder: choose another --out")
        described = _described(run, sizes, pair_ids, granularities)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out={folder}: cannot be made ({error.strerror})") from error
        return _start(folder, described)

    @classmethod
    def open(cls, folder) -> "Results":
        """Opens a results folder to read it or to go on with it.

        Raises:
            InputError: it is no results folder, or a file in it is damaged (and which).
        """
        folder = pathlib.Path(folder)
        run = _read_run(folder)
        path = folder / _EFFECTS_FILE
        try:
            group = zarr.open_group(path, mode="r+")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path} is missing or damaged ({error}): run again with --overwrite"
            ) from error
        for name in _array_names(run):
            if name not in group:
                raise InputError(f"{path} lacks the array {name}: run again with --overwrite")
        return cls(folder, run, group)

    @classmethod
    def resume_or_create(
        cls, folder, run: dict, sizes: Sizes, pair_ids, granularities, overwrite: bool = False
    ) -> "Results":
        """Opens the folder of an earlier run of the same settings and pairs, or starts one.

        Args:
            folder, run, sizes, pair_ids, granularities: as in `create`.
            overwrite: start again; deletes what an earlier run wrote there, and nothing else.

        Raises:
            InputError: the folder holds a run with another setting (and which; `CIRCUMSTANCES` are
                not compared), or files but no run.
        """
        folder = pathlib.Path(folder)
        if not (folder / _RUN_FILE).exists():
            return cls.create(folder, run, sizes, pair_ids, granularities)
        earlier = _read_run(folder)  # raises, before anything is deleted, if it is not a run's
        wanted = _described(run, sizes, pair_ids, granularities)
        if overwrite:
            for name in _OWN_FILES:
                _delete(folder / name)
            return _start(folder, wanted)
        written_later = (*earlier["measured"], "measured", "finished")
        _check_same_settings(folder, earlier, wanted, (*CIRCUMSTANCES, *written_later))
        return cls.open(folder)

    def write(self, pair_index: int, granularity: str, nie, tie, status=EXACT) -> None:
        """Writes the effects of one pair at one granularity.

        A unit without a finite effect becomes FAILED, unless its status is NOT_RUN; token positions
        that are NaN in every layer and site lie beyond the pair's length and stay NOT_RUN.

        Args:
            pair_index: index into `pair_ids`.
            granularity: one of `granularities`.
            nie, tie: [layer, ...] as `Sizes.shape` says, in units of the metric.
            status: EXACT, ESTIMATED or (no such unit) NOT_RUN, one for all units or an array of
                the effects' shape.

        Raises:
            ValueError: an array has another shape.
        """
        group = self._effects_group(granularity)
        effects = {"nie": np.asarray(nie, np.float32), "tie": np.asarray(tie, np.float32)}
        for name, values in effects.items():
            if values.shape != self.sizes.shape(granularity):
                raise ValueError(
                    f"{granularity}/{name} of pair {self.pair_ids[pair_index]} has shape"
                    f" {values.shape}, the results folder expects {self.sizes.shape(granularity)}"
                )
        finite = np.isfinite(effects["nie"]) & np.isfinite(effects["tie"])
        done = np.where(finite | (np.asarray(status) == NOT_RUN), status, FAILED).astype(np.uint8)
        if granularity == "token":
            absent = np.isnan(effects["nie"]) & np.isnan(effects["tie"])
            done[..., absent.all(axis=(0, 1))] = NOT_RUN
        for name, values in effects.items():
            group[name][pair_index] = values
        group["done"][pair_index] = done

    def write_totals(self, pair_index: int, y_base: float, y_source: float) -> None:
        """Writes Y(x), Y(x') and TE = Y(x') - Y(x) of one pair, in units of the metric."""
        totals = {"y_base": y_base, "y_source": y_source, "te": y_source - y_base}
        for name, value in totals.items():
            self._group[name][pair_index] = value

    def missing(self, granularity: str) -> list[int]:
        """Indices of the pairs of which no unit was run."""
        done = self.done(granularity)
        return np.flatnonzero((done == NOT_RUN).reshape(len(done), -1).all(axis=1)).tolist()

    def done(self, granularity: str) -> np.ndarray:
        """Each unit's status, uint8 [pair, layer, ...]."""
        return self._effects_group(granularity)["done"][:]

    def effects(self, granularity: str, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """NIE and TIE, float32 [pair, layer, ...]; NaN where a unit was not run or failed.

        Args:
            granularity: one of `granularities`.
            exact: give NaN for estimates too.
        """
        group = self._effects_group(granularity)
        vouched = np.isin(self.done(granularity), (EXACT,) if exact else (EXACT, ESTIMATED))
        nie, tie = (np.where(vouched, group[name][:], np.float32("nan")) for name in ("nie", "tie"))
        return nie, tie

    def estimated(self, granularity: str) -> np.ndarray:
        """Units of which any pair has but an estimate, bool [layer, ...]."""
        return (self.done(granularity) == ESTIMATED).any(axis=0)

    def write_estimates(self, pair_index: int, nie, tie) -> None:
        """Writes the estimates by which one pair's neurons are screened, [layer, neuron]."""
        for name, values in zip(_ESTIMATES, (nie, tie), strict=True):
            self._group[name][pair_index] = np.asarray(values, np.float32)

    def estimates(self, pairs=slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Estimated NIE and TIE of all neurons, also of those whose effects are exact.

        Args:
            pairs: a slice of the pairs, or the index of one.

        Returns:
            float32 [pair, layer, neuron], or without the first axis; NaN for a pair without
            estimates yet.
        """
        nie, tie = (self._group[name][pairs] for name in _ESTIMATES)
        return nie, tie

    def missing_estimates(self) -> list[int]:
        """Indices of the pairs without estimates in both directions."""
        unknown = [np.isnan(values).all(axis=(1, 2)) for values in self.estimates()]
        return np.flatnonzero(np.any(unknown, axis=0)).tolist()

    @property
    def te(self) -> np.ndarray:
        """TE = Y(x') - Y(x), float32 [pair]; NaN where it was not measured."""
        return self._group["te"][:]

    @property
    def y_base(self) -> np.ndarray:
        """Y(x), float32 [pair]; NaN where it was not measured."""
        return self._group["y_base"][:]

    @property
    def y_source(self) -> np.ndarray:
        """Y(x'), float32 [pair]; NaN where it was not measured."""
        return self._group["y_source"][:]

    def record(self, extra: dict) -> None:
        """Adds what was measured beside the effects to `run`."""
        _check_free_keys(extra)
        measured = sorted({*self.run["measured"], *extra})
        self.run = {**self.run, **_plain(extra), "measured": measured}
        _write_run(self.folder, self.run)

    def finish(self) -> None:
        """Marks the run as finished: all its files are written."""
        self.run = {**self.run, "finished": True}
        _write_run(self.folder, self.run)

    def _effects_group(self, granularity: str) -> zarr.Group:
        if granularity not in self.granularities:
            raise InputError(
                f"{self.folder} was not run at granularity {granularity!r}, only at"
                f" {', '.join(self.granularities)}"
            )
        return self._group[granularity]


def claim(
    folder,
    run: dict,
    own_files: Sequence[str],
    overwrite: bool = False,
    may_change: Collection[str] = (),
) -> dict:
    """Takes a folder for a run that is no sweep: starts it, or goes on with one of the same
    settings.

    Args:
        folder: made if it is not there.
        run: what `run.json` is to say; "program" names the kind of run.
        own_files: what such a run writes beside `run.json`; `overwrite` deletes that and no more.
        overwrite: start again.
        may_change: settings that a run which goes on may have otherwise, since what was written
            under them is as good under others.

    Returns:
        The content of `run.json`.

    Raises:
        InputError: the folder cannot be made, holds a run with another setting, or files but no
            run.
    """
    folder, run = pathlib.Path(folder), _plain(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={folder}: cannot be made ({error.strerror})") from error
    if not (folder / _RUN_FILE).exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder} holds files of something else: choose another --out")
        _write_run(folder, run)
        return run
    earlier = _read_object(folder / _RUN_FILE)
    if earlier.get("program") != run["program"]:
        raise InputError(f"{folder} holds another kind of run: choose another --out")
    if overwrite:
        for name in own_files:
            _delete(folder / name)
        _write_run(folder, run)
        return run
    _check_same_settings(folder, earlier, run, (*CIRCUMSTANCES, *may_change))
    current = earlier | {name: run[name] for name in may_change}
    if current != earlier:
        _write_run(folder, current)
    return current


def replace_file(path: pathlib.Path, write) -> None:
    """Calls `write(temporary path)` and moves the file into place, so that no half file is seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _described(run: dict, sizes: Sizes, pair_ids, granularities) -> dict:
    """The content of a new `run.json`."""
    pair_ids = [str(pair_id) for pair_id in pair_ids]
    if not pair_ids or len(set(pair_ids)) != len(pair_ids):
        raise InputError("a run needs at least one pair, and pair ids that differ from each other")
    unknown = sorted(set(granularities) - set(GRANULARITIES))
    if unknown or not granularities:
        raise InputError(
            f"--granularity: {', '.join(unknown) or 'nothing'} is none of"
            f" {', '.join(GRANULARITIES)}"
        )
    if len(run.get("pair_bases", pair_ids)) != len(pair_ids):
        raise ValueError("the run has not one of 'pair_bases' for each pair")
    for key in _RECORDED_ON_ARRAYS:
        if key not in run:
            raise ValueError(f"the run does not say its {key!r}")
    _check_free_keys(run)
    return {
        **_plain(run),
        "sizes": _plain(dataclasses.asdict(sizes)),
        "granularities": [name for name in GRANULARITIES if name in granularities],
        "pair_ids": pair_ids,
        "measured": [],
        "finished": False,
    }


def _start(folder: pathlib.Path, described: dict) -> Results:
    # run.json comes first: it marks the folder as ours, so that --overwrite may mend a folder
    # whose arrays were only half made.
    _write_run(folder, described)
    group = zarr.create_group(folder / _EFFECTS_FILE, zarr_format=3)
    sizes = Sizes.of(described)
    asked = {key: described[key] for key in _RECORDED_ON_ARRAYS}
    # The token granularity edits every aligned prompt position alone, whatever is asked.
    own = {"token": {"positions": "prompt"}, "direction": {"sites": list(sizes.sites)}}
    for name in _array_names(described):
        granularity, _, leaf = name.rpartition("/")
        unit_shape = sizes.shape(_SHAPED_AS.get(granularity, granularity)) if granularity else ()
        group.create_array(
            name,
            shape=(len(described["pair_ids"]), *unit_shape),
            chunks=(1, *unit_shape),
            dtype="uint8" if leaf == "done" else "float32",
            fill_value=NOT_RUN if leaf == "done" else float("nan"),
            attributes=asked | own.get(granularity, {}),
        )
    return Results(folder, described, group)


def _array_names(run: dict) -> list[str]:
    leaves = ("nie", "tie", "done")
    return [
        *_TOTALS,
        *(f"{granularity}/{leaf}" for granularity in run["granularities"] for leaf in leaves),
        *(_ESTIMATES if run.get("screen") else ()),
    ]


def _check_same_settings(
    folder: pathlib.Path, earlier: dict, wanted: dict, ignored: Collection[str]
) -> None:
    for key in dict.fromkeys((*wanted, *earlier)):
        if key not in ignored and earlier.get(key) != wanted.get(key):
            raise InputError(
                f"{folder} holds a run with another setting: {key} was"
                f" {_shortened(earlier.get(key))}, is now {_shortened(wanted.get(key))}:"
                " choose another --out, or --overwrite"
            )


def _check_free_keys(run: dict) -> None:
    taken = sorted(set(run) & set(_WRITTEN_HERE))
    if taken:
        raise ValueError(f"{', '.join(taken)}: {_RUN_FILE} keeps these keys for itself")


def _read_run(folder: pathlib.Path) -> dict:
    path = folder / _RUN_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a results folder: it has no {_RUN_FILE}")
    run = _read_object(path)
    if not set(_WRITTEN_HERE) <= set(run):
        raise InputError(f"{path} was not written by a run of jaxmed: choose another --out")
    return run


def _read_object(path: pathlib.Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): choose another --out") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} was not written by a run of jaxmed: choose another --out")
    return content


def _write_run(folder: pathlib.Path, run: dict) -> None:
    text = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(folder / _RUN_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _plain(value):
    """The value as strict JSON would give it back: no tuples, no numpy; null for NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _shortened(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
