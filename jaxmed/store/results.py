"""The folder that a run writes: `run.json` says what was asked, `effects.zarr` holds the effects.

A run can stop at any moment. Every array is chunked by pair, a pair's effects are written before
its `done`, and `effects` gives only what `done` vouches for, so half a write is never read.
"""

import dataclasses
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import zarr
from jaxtyping import Bool, Float32, UInt8
from numpy.typing import ArrayLike
from zarr.errors import ZarrUserWarning

from jaxmed.question.effects import (
    ESTIMANDS,
    TOTALS,
    Effects,
    Sizes,
    Status,
    Totals,
    attributes,
    statuses,
)
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

_EFFECTS_FILE = "effects.zarr"
_OWN_FILES = (RUN_FILE, _EFFECTS_FILE, "summary.parquet", "report.html", "figures")
_ESTIMATES = ("screen/nie", "screen/tie")
_RECORDED_ON_ARRAYS = ("positions", "metric", "precision")
_WRITTEN_HERE = ("finished", "pair_ids", "sizes", "granularities", "measured")


class Results(Mapping[str, Effects]):
    """An open results folder; by granularity, the effects that are in it now.

    Attributes:
        folder: its path.
        run: what `run.json` holds: the settings, and what `record` and `finish` added.
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
    def create(
        cls,
        folder: str | os.PathLike,
        run: dict,
        sizes: Sizes,
        pair_ids: Sequence[str],
        granularities: Iterable[str],
    ) -> "Results":
        """Starts a results folder, to write to it.

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
        _check_empty(folder)
        described = _described(run, sizes, pair_ids, granularities)
        _make(folder)
        return _start(folder, described)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Results":
        """Opens a results folder to read it; nothing in it is changed.

        Raises:
            InputError: it is no results folder, or a file in it is damaged (and which).
        """
        return cls._open(pathlib.Path(os.path.expanduser(folder)), "r")

    @classmethod
    def _open(cls, folder: pathlib.Path, mode: Literal["r", "r+"]) -> "Results":
        run = _read_run(folder)
        path = folder / _EFFECTS_FILE
        try:
            # What is there, not what the consolidated metadata of the start say.
            group = zarr.open_group(path, mode=mode, use_consolidated=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path} is missing or damaged ({error}): run again and overwrite it"
            ) from error
        for name in _array_names(run):
            if name not in group:
                raise InputError(f"{path} lacks the array {name}: run again and overwrite it")
        return cls(folder, run, group)

    @classmethod
    def resume_or_create(
        cls,
        folder: str | os.PathLike,
        run: dict,
        sizes: Sizes,
        pair_ids: Sequence[str],
        granularities: Iterable[str],
        overwrite: bool = False,
    ) -> "Results":
        """Opens the folder of an earlier run of the same settings and pairs, or starts one, to
        write to it.

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
        return cls._open(folder, "r+")

    def write(
        self,
        pair_index: int,
        granularity: str,
        nie: ArrayLike,
        tie: ArrayLike,
        status: ArrayLike = Status.EXACT,
    ) -> None:
        """Writes the effects of one pair at one granularity.

        Args:
            pair_index: index into `pair_ids`.
            granularity: one of `granularities`.
            nie, tie: [layer, ...] as `Sizes.shape` says, in units of the metric.
            status: a `Status`, one for all units or an array of the effects' shape; `statuses`
                says what becomes of it where an effect is not finite.

        Raises:
            ValueError: an array has another shape.
        """
        effects = {"nie": np.asarray(nie, np.float32), "tie": np.asarray(tie, np.float32)}
        for name, values in effects.items():
            if values.shape != self.sizes.shape(granularity):
                raise ValueError(
                    f"{granularity}/{name} of pair {self.pair_ids[pair_index]} has shape"
                    f" {values.shape}, the results folder expects {self.sizes.shape(granularity)}"
                )
        done = statuses(granularity, effects["nie"], effects["tie"], status)
        for name, values in effects.items():
            self._of(granularity, name)[pair_index] = values
        self._of(granularity, "done")[pair_index] = done

    def write_totals(
        self, pair_index: int, y_base: float, y_source: float, te: float | None = None
    ) -> None:
        """Writes Y(x), Y(x') and TE of one pair, in units of the metric.

        TE is Y(x') - Y(x), but for rounding, if it is known better than from these.
        """
        te = y_source - y_base if te is None else te
        totals = {"y_base": y_base, "y_source": y_source, "te": te}
        for name, value in totals.items():
            self._array(name)[pair_index] = value

    def __getitem__(self, granularity: str) -> Effects:
        return self.of_layers(granularity, slice(None))

    def of_layers(self, granularity: str, layers: slice) -> Effects:
        """The effects of some layers, by their numbers; the others are not read."""
        nie, tie = self.effects(granularity, layers=layers)
        coordinates = self.coordinates(granularity)
        return Effects(
            granularity=granularity,
            nie=nie,
            tie=tie,
            done=self.done(granularity, layers=layers),
            totals=self.totals,
            coordinates=coordinates | {"layer": coordinates["layer"][layers]},
            attributes=attributes(self.run, granularity),
        )

    def coordinates(self, granularity: str) -> dict[str, np.ndarray]:
        """The axes of effects, as `Effects` has them."""
        units = self.sizes.coordinates(granularity, self.run.get("group_size", 1))
        return {"pair": np.array(self.pair_ids, object)} | units

    def __iter__(self) -> Iterator[str]:
        return iter(self.granularities)

    def __len__(self) -> int:
        return len(self.granularities)

    def missing(self, granularity: str) -> list[int]:
        """Indices of the pairs of which no unit was run."""
        done = self.done(granularity)
        return np.flatnonzero((done == Status.NOT_RUN).reshape(len(done), -1).all(axis=1)).tolist()

    def done(
        self, granularity: str, *, layers: slice = slice(None)
    ) -> UInt8[np.ndarray, "pair layer *unit"]:
        """What is known of each unit (of some layers), a number of `Status`."""
        return _read(self._of(granularity, "done"), (slice(None), layers))

    def layers_together(self, granularity: str) -> int:
        """Layers of a chunk: fewer are read no faster."""
        return self._of(granularity, "nie").chunks[1]

    def effects(
        self,
        granularity: str,
        exact: bool = False,
        *,
        layers: slice = slice(None),
        pairs: slice = slice(None),
    ) -> tuple[Float32[np.ndarray, "pair layer *unit"], Float32[np.ndarray, "pair layer *unit"]]:
        """NIE and TIE; NaN where a unit was not run or failed.

        Args:
            granularity: one of `granularities`.
            exact: give NaN for estimates too.
            layers, pairs: those that are read; all by default.
        """
        done = _read(self._of(granularity, "done"), (pairs, layers))
        known = done == Status.EXACT
        if not exact:
            known |= done == Status.ESTIMATED
        written = (_read(self._of(granularity, name), (pairs, layers)) for name in ESTIMANDS)
        nie, tie = (np.where(known, values, np.float32("nan")) for values in written)
        return nie, tie

    def estimated(self, granularity: str) -> Bool[np.ndarray, "layer *unit"]:
        """Units of which any pair has but an estimate."""
        return (self.done(granularity) == Status.ESTIMATED).any(axis=0)

    def write_estimates(self, pair_index: int, nie: ArrayLike, tie: ArrayLike) -> None:
        """Writes the estimates by which one pair's neurons are screened, [layer, neuron]."""
        for name, values in zip(_ESTIMATES, (nie, tie), strict=True):
            self._array(name)[pair_index] = np.asarray(values, np.float32)

    def estimates(
        self, pairs: slice | int = slice(None)
    ) -> tuple[
        Float32[np.ndarray, "*pair layer neuron"], Float32[np.ndarray, "*pair layer neuron"]
    ]:
        """Estimated NIE and TIE of all neurons, also of those whose effects are exact.

        Args:
            pairs: a slice of the pairs, or the index of one.

        Returns:
            Both, without the first axis for one pair; NaN for a pair without estimates yet.
        """
        nie, tie = (_read(self._array(name), pairs) for name in _ESTIMATES)
        return nie, tie

    def missing_estimates(self) -> list[int]:
        """Indices of the pairs without estimates of both estimands."""
        unknown = [np.isnan(values).all(axis=(1, 2)) for values in self.estimates()]
        return np.flatnonzero(np.any(unknown, axis=0)).tolist()

    @property
    def te(self) -> Float32[np.ndarray, "pair"]:
        """TE = Y(x') - Y(x); NaN where it was not measured."""
        return _read(self._array("te"))

    @property
    def y_base(self) -> Float32[np.ndarray, "pair"]:
        """Y(x); NaN where it was not measured."""
        return _read(self._array("y_base"))

    @property
    def y_source(self) -> Float32[np.ndarray, "pair"]:
        """Y(x'); NaN where it was not measured."""
        return _read(self._array("y_source"))

    @property
    def totals(self) -> Totals:
        """What is known of whole pairs."""
        return Totals(self.pair_ids, self.bases, self.te, self.y_base, self.y_source)

    def record(self, extra: dict) -> None:
        """Adds what was measured beside the effects to `run`."""
        self._check_writable()
        _check_free_keys(extra)
        measured = sorted({*self.run["measured"], *extra})
        self.run = {**self.run, **plain(extra), "measured": measured}
        write_run(self.folder, self.run)

    def finish(self) -> None:
        """Marks the run as finished: all its files are written."""
        self._check_writable()
        self.run = {**self.run, "finished": True}
        write_run(self.folder, self.run)

    def copy(self, folder: pathlib.Path) -> None:
        """Copies run and effects, as they are in the folder now, into an empty one.

        Raises:
            InputError: the folder is not empty or cannot be made.
        """
        _check_empty(folder)
        _make(folder)
        shutil.copytree(self.folder / _EFFECTS_FILE, folder / _EFFECTS_FILE)
        write_run(folder, self.run)

    def _check_writable(self) -> None:
        if self._group.read_only:
            raise ValueError(f"{self.folder} was opened read-only")

    def _of(self, granularity: str, name: str) -> zarr.Array:
        """An array of one granularity."""
        if granularity not in self.granularities:
            raise InputError(
                f"{self.folder} was not run at granularity {granularity!r}, only at"
                f" {', '.join(self.granularities)}"
            )
        return self._array(f"{granularity}/{name}")

    def _array(self, name: str) -> zarr.Array:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array


def _read(array: zarr.Array, where: tuple | slice | int = slice(None)) -> np.ndarray:
    return np.asarray(array[where])


def _check_empty(folder: pathlib.Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another folder")


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error


def _described(
    run: dict, sizes: Sizes, pair_ids: Sequence[str], granularities: Iterable[str]
) -> dict:
    """The content of a new `run.json`."""
    pair_ids = [str(pair_id) for pair_id in pair_ids]
    granularities = list(granularities)
    if not pair_ids or len(set(pair_ids)) != len(pair_ids):
        raise InputError("a run needs at least one pair, and pair ids that differ from each other")
    unknown = sorted(set(granularities) - set(GRANULARITIES))
    if unknown or not granularities:
        raise InputError(
            f"granularity: {', '.join(unknown) or 'nothing'} is none of {', '.join(GRANULARITIES)}"
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
    pairs = {"pair": np.array(described["pair_ids"], object)}
    axes = {"": pairs} | {name: pairs | _units(described, name) for name in _groups(described)}
    # Coordinates come before the arrays whose presence `open` checks.
    for granularity, along in axes.items():
        for name, values in along.items():
            _write_coordinate(group, f"{granularity}/{name}".lstrip("/"), values)
    for name in _array_names(described):
        granularity, _, leaf = name.rpartition("/")
        names, shape = zip(*((axis, len(v)) for axis, v in axes[granularity].items()), strict=True)
        # Directions may be of any sites, which another program should find beside them.
        own = {"sites": described["sizes"]["sites"]} if granularity == "direction" else {}
        asked = attributes(described, granularity)
        group.create_array(
            name,
            shape=shape,
            chunks=(1, *shape[1:]),
            dtype="uint8" if leaf == "done" else "float32",
            fill_value=int(Status.NOT_RUN) if leaf == "done" else float("nan"),
            attributes={key: asked[key] for key in _RECORDED_ON_ARRAYS} | own,
            dimension_names=names,
        )
    _consolidate(folder / _EFFECTS_FILE, axes)
    return Results(folder, described, group)


def _groups(run: dict) -> tuple[str, ...]:
    """The groups of arrays with effects: granularities, and what their units are screened by."""
    return (*run["granularities"], *(("screen",) if run.get("screen") else ()))


def _units(run: dict, group: str) -> dict[str, np.ndarray]:
    granularity = "neuron" if group == "screen" else group
    return Sizes.of(run).coordinates(granularity, run.get("group_size", 1))


def _write_coordinate(group: zarr.Group, path: str, values: np.ndarray) -> None:
    is_text = values.dtype == object
    array = group.create_array(
        path,
        shape=values.shape,
        chunks=values.shape,
        dtype=str if is_text else values.dtype,
        fill_value="" if is_text else 0,
        dimension_names=[path.rpartition("/")[2]],
    )
    array[:] = values


def _consolidate(path: pathlib.Path, groups: Iterable[str]) -> None:
    """Gathers what readers of the whole, or of one group, need to know of the arrays in it."""
    with warnings.catch_warnings():
        # Zarr 3 has no word on them yet; a reader that does not know them reads each array's own.
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        for name in sorted(groups, reverse=True):  # the whole last
            zarr.consolidate_metadata(str(path), path=name or None)


def _array_names(run: dict) -> list[str]:
    leaves = ("nie", "tie", "done")
    return [
        *TOTALS,
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
        raise InputError(f"{path} was not written by a run of jaxmed: choose another folder")
    return run
