"""The folder that a run writes: `run.json` says what was asked, `effects.zarr` holds the effects.

A run can stop at any moment. Every array is chunked by pair, a pair's effects are written before
its `done`, and `effects` gives only what `done` vouches for, so half a write is never read.
"""

import dataclasses
import pathlib

import numpy as np
import zarr

from jaxmed.question.effects import Sizes
from jaxmed.question.sites import GRANULARITIES
from jaxmed.store.claims import (
    CIRCUMSTANCES,
    RUN_FILE,
    check_same_settings,
    delete,
    plain,
    read_object,
    write_run,
)
from models.errors import InputError

NOT_RUN, EXACT, ESTIMATED, FAILED = range(4)
_EFFECTS_FILE = "effects.zarr"
_OWN_FILES = (RUN_FILE, _EFFECTS_FILE, "summary.parquet", "report.html", "figures")
_TOTALS = ("te", "y_base", "y_source")
_ESTIMATES = ("screen/nie", "screen/tie")
_SHAPED_AS = {"screen": "neuron"}
_RECORDED_ON_ARRAYS = ("positions", "metric", "precision")
_WRITTEN_HERE = ("finished", "pair_ids", "sizes", "granularities", "measured")


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
        if not (folder / RUN_FILE).exists():
            return cls.create(folder, run, sizes, pair_ids, granularities)
        earlier = _read_run(folder)  # raises, before anything is deleted, if it is not a run's
        wanted = _described(run, sizes, pair_ids, granularities)
        if overwrite:
            for name in _OWN_FILES:
                delete(folder / name)
            return _start(folder, wanted)
        written_later = (*earlier["measured"], "measured", "finished")
        check_same_settings(folder, earlier, wanted, (*CIRCUMSTANCES, *written_later))
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
        self.run = {**self.run, **plain(extra), "measured": measured}
        write_run(self.folder, self.run)

    def finish(self) -> None:
        """Marks the run as finished: all its files are written."""
        self.run = {**self.run, "finished": True}
        write_run(self.folder, self.run)

    def _effects_group(self, granularity: str) -> zarr.Group:
        if granularity not in self.granularities:
            raise InputError(
                f"{self.folder} was not run at granularity {granularity!r}, only at"
                f" {', '.join(self.granularities)}"
            )
        return self._group[granularity]


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
        **plain(run),
        "sizes": plain(dataclasses.asdict(sizes)),
        "granularities": [name for name in GRANULARITIES if name in granularities],
        "pair_ids": pair_ids,
        "measured": [],
        "finished": False,
    }


def _start(folder: pathlib.Path, described: dict) -> Results:
    # run.json comes first: it marks the folder as ours, so that --overwrite may mend a folder
    # whose arrays were only half made.
    write_run(folder, described)
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


def _check_free_keys(run: dict) -> None:
    taken = sorted(set(run) & set(_WRITTEN_HERE))
    if taken:
        raise ValueError(f"{', '.join(taken)}: {RUN_FILE} keeps these keys for itself")


def _read_run(folder: pathlib.Path) -> dict:
    path = folder / RUN_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a results folder: it has no {RUN_FILE}")
    run = read_object(path)
    if not set(_WRITTEN_HERE) <= set(run):
        raise InputError(f"{path} was not written by a run of jaxmed: choose another --out")
    return run
