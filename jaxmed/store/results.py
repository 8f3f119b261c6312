"""The folder that a run writes: `run.json` says what was asked, `effects.zarr` holds the effects.

The folder is local or in a bucket (`jaxmed.files.places`), and several processes may write to it
at once. A run can stop at any moment. Every array is cut into chunks by pair and by *part*, some
layers of a granularity, and a chunk is written whole or not at all. A part's effects are written
before its `done`, and `effects` gives only what `done` vouches for: half a write is never read.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float32, UInt8
from numpy.typing import ArrayLike

from jaxmed.files import places
from jaxmed.files.places import Place
from jaxmed.question.effects import (
    ESTIMANDS,
    Effects,
    Sizes,
    Status,
    Totals,
    attributes,
    statuses,
)
from jaxmed.question.sites import GRANULARITIES
from jaxmed.store import claims, layout
from jaxmed.store.claims import CIRCUMSTANCES, RUN_FILE, check_same_settings, plain
from jaxmed.store.layout import EFFECTS_FILE, ESTIMATES, RECORDED_ON_ARRAYS
from models.errors import InputError

_BEGUN = "sweep/begun/"
_OWN_FILES = (EFFECTS_FILE, "sweep", "summary.parquet", "report.html", "figures")
_WRITTEN_HERE = (
    "finished",
    "pair_ids",
    "sizes",
    "granularities",
    "layers_together",
    "measured",
)
_ALL = slice(None)
Indices = slice | np.ndarray  # of pairs


class Results(Mapping[str, Effects]):
    """An open results folder; by granularity, the effects that are in it now.

    Where the folder cannot be read or written any more, all methods raise
    `jaxmed.files.places.PlaceError`; what was written before is kept.

    Attributes:
        place: where it is.
        run: what `run.json` held when it was last read or written: the settings, and what `record`,
            `settle` and `finish` added.
        sizes: the `Sizes` of the arrays.
        pair_ids: the pairs' ids, in the order of every array's first axis.
        bases: the base prompt of each pair; its own id where the run does not say.
        granularities: those that the run was asked for, coarse to fine.
        scouts: indices of the pairs by which the neurons of the others were chosen.
    """

    def __init__(self, place: Place, run: dict, arrays: dict[str, ts.TensorStore], writable: bool):
        self.place = place
        self.run = run
        self.sizes = Sizes.of(run)
        self.pair_ids = tuple(run["pair_ids"])
        self.bases = tuple(run.get("pair_bases", self.pair_ids))
        self.granularities = tuple(run["granularities"])
        scouts = set(run.get("scouts", ()))
        self.scouts = tuple(n for n, name in enumerate(self.pair_ids) if name in scouts)
        self._arrays = arrays
        self._writable = writable

    @property
    def folder(self) -> str:
        """Where it is, as text: a local path or gs://bucket/path."""
        return str(self.place)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        run: dict,
        sizes: Sizes,
        pair_ids: Sequence[str],
        granularities: Iterable[str],
        *,
        layers_together: Mapping[str, int] | None = None,
    ) -> "Results":
        """Starts a results folder, to write to it.

        Args:
            folder: a local path or gs://bucket/path; made if it is missing, and must be empty.
            run: what was asked, as JSON values; "positions", "metric" and "precision" are needed.
                Where its "screen" is not 0 there is room for estimates of the neurons. Its
                "pair_bases" are the base prompts of the pairs.
            sizes: the sizes of the arrays.
            pair_ids: one distinct id per pair.
            granularities: those to make arrays for, out of `GRANULARITIES`.
            layers_together: by granularity, how many layers are one part, which is written and
                committed at once; all layers where it is not named.

        Raises:
            InputError: the folder is not empty or cannot be made, or an argument is not as above.
        """
        place = places.at(folder)
        _check_empty(place)
        described = _described(run, sizes, pair_ids, granularities, layers_together or {})
        place.make()
        if not place.create(RUN_FILE, claims.encoded(described)):
            raise _not_empty(place)
        return cls._writing(place, described)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Results":
        """Opens a results folder to read it; nothing in it is changed.

        Args:
            folder: a local path or gs://bucket/path.

        Raises:
            InputError: it is no results folder, or a file in it is damaged (and which).
        """
        place = places.at(folder)
        run = claims.read_run(place)
        if run is None:
            raise InputError(f"{place} is not a results folder: it has no {RUN_FILE}")
        _check_written_by_this(place, run)
        path = f"{EFFECTS_FILE}/{layout.ROOT}"
        if not place.exists(path):
            raise InputError(
                f"{place.path(EFFECTS_FILE)} is missing or damaged (it has no {layout.ROOT}): run "
                "again and overwrite it"
            )
        return cls(place, run, _arrays(place, run, writable=False), writable=False)

    @classmethod
    def resume_or_create(
        cls,
        folder: str | os.PathLike,
        run: dict,
        sizes: Sizes,
        pair_ids: Sequence[str],
        granularities: Iterable[str],
        *,
        layers_together: Mapping[str, int] | None = None,
        overwrite: bool = False,
    ) -> "Results":
        """Opens the folder of an earlier run of the same settings and pairs, or starts one, to
        write to it. Of several that start at once one creates it, and the others open that.

        Args:
            folder, run, sizes, pair_ids, granularities: as in `create`.
            layers_together: as in `create`; a run that is gone on with keeps its own.
            overwrite: start again; deletes what an earlier run wrote there, and nothing else. While
                another process writes there it must not be asked for.

        Raises:
            InputError: the folder holds a run with another setting (and which; `CIRCUMSTANCES` are
                not compared), one of a version that stored effects otherwise, or files but no run.
        """
        place = places.at(folder)
        wanted = _described(run, sizes, pair_ids, granularities, layers_together or {})
        # Looked for again, since another may have begun in between.
        if not (place.exists(RUN_FILE) or place.is_empty() or place.exists(RUN_FILE)):
            raise _not_empty(place)
        place.make()
        if place.create(RUN_FILE, claims.encoded(wanted)):
            return cls._writing(place, wanted)
        earlier = claims.read_run(place)
        if earlier is None:
            raise places.gone(place, RUN_FILE)
        # Raises, before anything is deleted, if it is not a run's.
        _check_written_by_this(place, earlier, also_older=overwrite)
        if overwrite:
            _delete_effects(place, earlier)
            place.write(RUN_FILE, claims.encoded(wanted))
            return cls._writing(place, wanted)
        written_later = (*earlier["measured"], "measured", "finished", "layers_together")
        check_same_settings(place, earlier, wanted, (*CIRCUMSTANCES, *written_later))
        return cls._writing(place, earlier)

    @classmethod
    def _writing(cls, place: Place, run: dict) -> "Results":
        """The results in a place whose `run.json` is there; makes what describes the arrays, if
        whoever began has not come that far."""
        if not place.exists(f"{EFFECTS_FILE}/{layout.ROOT}"):
            files = layout.described(run)
            root = files.pop(layout.ROOT)
            place.write_all((f"{EFFECTS_FILE}/{name}", data) for name, data in files.items())
            place.write(f"{EFFECTS_FILE}/{layout.ROOT}", root)
        return cls(place, run, _arrays(place, run, writable=True), writable=True)

    def write(
        self,
        pair_index: int,
        granularity: str,
        nie: ArrayLike,
        tie: ArrayLike,
        status: ArrayLike = Status.EXACT,
        *,
        part: int | None = None,
    ) -> None:
        """Writes the effects of one pair at one granularity, and commits them.

        Args:
            pair_index: index into `pair_ids`.
            granularity: one of `granularities`.
            nie, tie: [layer, ...] as `Sizes.shape` says, in units of the metric.
            status: a `Status`, one for all units or an array of the effects' shape; `statuses`
                says what becomes of it where an effect is not finite.
            part: all arrays are of the layers of this part alone, [part * together, (part + 1) *
                together) with `together` as `layers_together` says; by default of all layers.

        Raises:
            ValueError: an array has another shape.
        """
        layers = self._layers(granularity, part)
        shape = (layers.stop - layers.start, *self.sizes.shape(granularity)[1:])
        effects = {"nie": np.asarray(nie, np.float32), "tie": np.asarray(tie, np.float32)}
        for name, values in effects.items():
            if values.shape != shape:
                raise ValueError(
                    f"{granularity}/{name} of pair {self.pair_ids[pair_index]} has shape"
                    f" {values.shape}, the results folder expects {shape}"
                )
        done = statuses(granularity, effects["nie"], effects["tie"], status)
        where = (pair_index, layers)
        self._write({f"{granularity}/{name}": values for name, values in effects.items()}, where)
        self._write({f"{granularity}/done": done}, where)

    def write_totals(
        self, pair_index: int, y_base: float, y_source: float, te: float | None = None
    ) -> None:
        """Writes Y(x), Y(x') and TE of one pair, in units of the metric.

        TE is Y(x') - Y(x), but for rounding, if it is known better than from these.
        """
        te = y_source - y_base if te is None else te
        totals = {"y_base": y_base, "y_source": y_source, "te": te}
        self._write({name: np.float32(value) for name, value in totals.items()}, pair_index)

    def __getitem__(self, granularity: str) -> Effects:
        return self.of_layers(granularity, _ALL)

    def of_layers(self, granularity: str, layers: slice, pairs: Indices = _ALL) -> Effects:
        """The effects of some layers, by their numbers, and of some pairs; others are not read."""
        nie, tie = self.effects(granularity, layers=layers, pairs=pairs)
        along = self.coordinates(granularity)
        return Effects(
            granularity=granularity,
            nie=nie,
            tie=tie,
            done=self.done(granularity, layers=layers, pairs=pairs),
            totals=self.totals.of(pairs),
            coordinates=along | {"pair": along["pair"][pairs], "layer": along["layer"][layers]},
            attributes=attributes(self.run, granularity),
            scouts=self._choosing(granularity) if pairs is _ALL else (),
        )

    def tested(self, granularity: str) -> Indices:
        """The pairs that means, intervals and tests of a granularity's units are of: all but the
        scouts, which have chosen the neurons that are computed of the others."""
        self._check_asked(granularity)
        if not self._choosing(granularity):
            return _ALL
        return np.setdiff1d(np.arange(len(self.pair_ids)), self.scouts)

    def _choosing(self, granularity: str) -> tuple[int, ...]:
        return self.scouts if granularity == "neuron" else ()

    def coordinates(self, granularity: str) -> dict[str, np.ndarray]:
        """The axes of effects, as `Effects` has them."""
        units = self.sizes.coordinates(granularity, self.run.get("group_size", 1))
        return {"pair": np.array(self.pair_ids, object)} | units

    def __iter__(self) -> Iterator[str]:
        return iter(self.granularities)

    def __len__(self) -> int:
        return len(self.granularities)

    def layers_together(self, granularity: str) -> int:
        """How many layers of a granularity are one part."""
        self._check_asked(granularity)
        return layout.layers_together(self.run, granularity)

    def committed(
        self, granularity: str, pairs: Sequence[int] | None = None
    ) -> Bool[np.ndarray, "pair part"]:
        """Which parts of which pairs are written, whatever came of them; no array is read.

        Args:
            granularity: one of `granularities`.
            pairs: indices of those that are asked about, a few; all pairs by default.
        """
        self._check_asked(granularity)
        return self._written(f"{granularity}/done", pairs)

    def missing(self, granularity: str) -> list[int]:
        """Indices of the pairs of which some part is not written."""
        return np.flatnonzero(~self.committed(granularity).all(axis=1)).tolist()

    def done(
        self, granularity: str, *, layers: slice = _ALL, pairs: Indices = _ALL
    ) -> UInt8[np.ndarray, "pair layer *unit"]:
        """What is known of each unit, a number of `Status`.

        Args:
            granularity: one of `granularities`.
            layers, pairs: those that are read.
        """
        self._check_asked(granularity)
        (done,) = self._read([f"{granularity}/done"], pairs, layers)
        return done

    def effects(
        self,
        granularity: str,
        exact: bool = False,
        *,
        layers: slice = _ALL,
        pairs: Indices = _ALL,
    ) -> tuple[Float32[np.ndarray, "pair layer *unit"], Float32[np.ndarray, "pair layer *unit"]]:
        """NIE and TIE; NaN where a unit was not run or failed.

        Args:
            granularity: one of `granularities`.
            exact: give NaN for estimates too.
            layers, pairs: those that are read; where the layers' ends are those of parts nothing
                else is.
        """
        self._check_asked(granularity)
        names = [f"{granularity}/{name}" for name in ("done", *ESTIMANDS)]
        # In this order: what is vouched for was written before.
        (done,) = self._read(names[:1], pairs, layers)
        nie, tie = self._read(names[1:], pairs, layers)
        unknown = done != Status.EXACT
        if not exact:
            unknown &= done != Status.ESTIMATED
        nie[unknown] = tie[unknown] = np.nan
        return nie, tie

    def estimated(
        self, granularity: str, *, layers: slice = _ALL
    ) -> Bool[np.ndarray, "layer *unit"]:
        """Units of which any pair has but an estimate."""
        return (self.done(granularity, layers=layers) == Status.ESTIMATED).any(axis=0)

    def write_estimates(self, pair_index: int, nie: ArrayLike, tie: ArrayLike) -> None:
        """Writes the estimates by which one pair's neurons are screened, [layer, neuron]."""
        # One after the other: the last commits both.
        for name, values in zip(ESTIMATES, (nie, tie), strict=True):
            self._write({name: np.asarray(values, np.float32)}, pair_index)

    def estimates(
        self, pairs: slice | int = _ALL, *, layers: slice = _ALL
    ) -> tuple[
        Float32[np.ndarray, "*pair layer neuron"], Float32[np.ndarray, "*pair layer neuron"]
    ]:
        """Estimated NIE and TIE of all neurons, also of those whose effects are exact.

        Args:
            pairs: a slice of the pairs, or the index of one.
            layers: those that are read.

        Returns:
            Both, without the first axis for one pair; NaN for a pair without estimates yet.
        """
        nie, tie = self._read(ESTIMATES, pairs, layers)
        return nie, tie

    def missing_estimates(self) -> list[int]:
        """Indices of the pairs without estimates of both estimands."""
        return np.flatnonzero(~self._written(ESTIMATES[-1]).all(axis=1)).tolist()

    @property
    def te(self) -> Float32[np.ndarray, "pair"]:
        """TE = Y(x') - Y(x); NaN where it was not measured."""
        return self._read(["te"], _ALL)[0]

    @property
    def y_base(self) -> Float32[np.ndarray, "pair"]:
        """Y(x); NaN where it was not measured."""
        return self._read(["y_base"], _ALL)[0]

    @property
    def y_source(self) -> Float32[np.ndarray, "pair"]:
        """Y(x'); NaN where it was not measured."""
        return self._read(["y_source"], _ALL)[0]

    @property
    def totals(self) -> Totals:
        """What is known of whole pairs."""
        return Totals(self.pair_ids, self.bases, self.te, self.y_base, self.y_source)

    def state(self) -> str:
        """A hash that is another one as soon as any effect has been written, or written again:
        what is made of the effects can tell by it whether it is still of these."""
        found = hashlib.sha256()
        for granularity in self.granularities:
            marks = self.place.read_all(f"{EFFECTS_FILE}/{granularity}/done/c/")
            for name, _, generation in marks:
                found.update(name.encode() + b"\0" + generation + b"\0")
        return found.hexdigest()

    def refresh(self) -> None:
        """Reads `run.json` again, to which other processes may have added."""
        run = claims.read_run(self.place)
        if run is None:
            raise places.gone(self.place, RUN_FILE)
        self.run = run

    def record(self, extra: dict) -> None:
        """Adds what was measured beside the effects to `run`, whatever it said before."""
        self._add(lambda run: extra)

    def add_up(self, amounts: Mapping[str, float]) -> None:
        """Adds numbers, as of seconds, to those that `run` has under the same keys."""
        self._add(lambda run: {key: run.get(key, 0) + value for key, value in amounts.items()})

    def settle(self, key: str, value: Any) -> Any:
        """Chooses something once for all who work on this run.

        Args:
            key: of `run`.
            value: what it is if `run.json` says nothing of it yet.

        Returns:
            What it is.
        """
        self._add(lambda run: {} if run.get(key) is not None else {key: value})
        return self.run[key]

    def finish(self) -> None:
        """Marks the run as finished: all its files are written."""
        self._change(lambda run: {**run, "finished": True})

    def begin(self, unit: str, process: int) -> bool:
        """Marks a unit of work as begun, and says whether it was not before.

        The mark is for other processes, so that not two begin with the same; nothing depends on it.

        Args:
            unit: its name.
            process: who begins.
        """
        self._check_writable()
        mark = json.dumps({"process": process, "id": uuid.uuid4().hex}).encode()
        return self.place.create(f"{_BEGUN}{unit}", mark)

    def begun(self) -> dict[str, int]:
        """The units that are marked as begun, and the process that began each."""
        marks = self.place.read_all(_BEGUN)
        return {name.removeprefix(_BEGUN): json.loads(mark)["process"] for name, mark, _ in marks}

    def copy(self, folder: str | os.PathLike) -> None:
        """Copies run and effects, as they are in the folder now, into an empty one.

        Raises:
            InputError: the folder is not empty or cannot be made.
        """
        place = places.at(folder)
        _check_empty(place)
        place.make()
        files = self.place.read_all(f"{EFFECTS_FILE}/")
        place.write_all((name, data) for name, data, _ in files)
        place.write(RUN_FILE, claims.encoded(self.run))  # the last: half a copy is no run

    def _add(self, extra: Callable[[dict], dict]) -> None:
        """Adds to `run.json` what a function makes of its content."""

        def added(run: dict) -> dict:
            more = extra(run)
            _check_free_keys(more)
            return {**run, **plain(more), "measured": sorted({*run["measured"], *more})}

        self._change(added)

    def _change(self, changed: Callable[[dict], dict]) -> None:
        self._check_writable()
        self.run = claims.change(self.place, changed)

    def _check_writable(self) -> None:
        if not self._writable:
            raise ValueError(f"{self.folder} was opened read-only")

    def _check_asked(self, granularity: str) -> None:
        if granularity not in self.granularities:
            raise InputError(
                f"{self.folder} was not run at granularity {granularity!r}, only at"
                f" {', '.join(self.granularities)}"
            )

    def _layers(self, granularity: str, part: int | None) -> slice:
        """The layers of a part; all for None."""
        self._check_asked(granularity)
        if part is None:
            return slice(0, self.sizes.layers)
        together = self.layers_together(granularity)
        start = part * together
        if not 0 <= start < self.sizes.layers:
            raise ValueError(f"{granularity} has no part {part}")
        return slice(start, min(start + together, self.sizes.layers))

    def _written(
        self, name: str, pairs: Sequence[int] | None = None
    ) -> Bool[np.ndarray, "pair part"]:
        """Which chunks of an array are there, of some pairs or of all."""
        prefix = f"{EFFECTS_FILE}/{name}/c/"
        together = layout.layers_together(self.run, name.partition("/")[0])
        written = np.zeros((len(self.pair_ids), -(-self.sizes.layers // together)), bool)
        if pairs is None:
            chunks = self.place.names(prefix)
        else:
            chunks = [chunk for pair in pairs for chunk in self.place.names(f"{prefix}{pair}/")]
        if not chunks:
            self.refresh()  # a bucket that is gone lists nothing, but cannot be read
        for chunk in chunks:
            pair, part, *_ = chunk.removeprefix(prefix).split("/")
            written[int(pair), int(part)] = True
        return written if pairs is None else written[list(pairs)]

    def _write(self, arrays: Mapping[str, Any], where: Any) -> None:
        """Writes to several arrays at once, at the same place."""
        self._check_writable()
        with self.place.writing():
            written = [self._arrays[name][where].write(values) for name, values in arrays.items()]
            for each in written:
                each.result()

    def _read(
        self, names: Sequence[str], pairs: Indices | int, layers: slice | None = None
    ) -> list[np.ndarray]:
        """Several arrays, or the layers of them that are asked for."""
        where: Any = pairs
        if layers is not None:
            start, stop, step = layers.indices(self.sizes.layers)
            where = (pairs, slice(start, max(start, stop), step))
        with self.place.reading():
            reads = [self._arrays[name][where].read() for name in names]
            return [np.asarray(each.result()) for each in reads]


def _arrays(place: Place, run: dict, *, writable: bool) -> dict[str, ts.TensorStore]:
    """The arrays of a run by name.

    Raises:
        InputError: one is missing or damaged.
    """

    def opened(name: str) -> ts.Future:
        spec = {
            "driver": "zarr3",
            "kvstore": place.spec(f"{EFFECTS_FILE}/{name}"),
            # A chunk of NaN, or of zeros, says that it was written.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, open=True, read=True, write=writable, context=place.context)

    opening = {name: opened(name) for name in layout.array_names(run)}
    arrays = {}
    for name, future in opening.items():
        try:
            arrays[name] = future.result()
        except (ValueError, OSError, RuntimeError) as error:
            path = place.path(EFFECTS_FILE)
            if not place.exists(f"{EFFECTS_FILE}/{name}/zarr.json"):
                raise InputError(
                    f"{path} lacks the array {name}: run again and overwrite it"
                ) from error
            raise InputError(
                f"{path} is missing or damaged ({places.reason(error)}): run again and overwrite it"
            ) from error
    return arrays


def _check_empty(place: Place) -> None:
    if not place.is_empty():
        raise _not_empty(place)


def _not_empty(place: Place) -> InputError:
    return InputError(f"{place} is not an empty folder: choose another folder")


def _delete_effects(place: Place, run: dict) -> None:
    """Deletes what an earlier run wrote but `run.json`, which says that it may be; what vouches for
    effects before these, since this may be stopped half way."""
    for granularity in run["granularities"]:
        place.delete(f"{EFFECTS_FILE}/{granularity}/done")
    for name in _OWN_FILES:
        place.delete(name)


def _described(
    run: dict,
    sizes: Sizes,
    pair_ids: Sequence[str],
    granularities: Iterable[str],
    layers_together: Mapping[str, int],
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
    for key in RECORDED_ON_ARRAYS:
        if key not in run:
            raise ValueError(f"the run does not say its {key!r}")
    _check_free_keys(run)
    names = [name for name in GRANULARITIES if name in granularities]
    return {
        **plain(run),
        "sizes": plain(dataclasses.asdict(sizes)),
        "granularities": names,
        "layers_together": {
            name: min(layers_together.get(name, sizes.layers), sizes.layers) for name in names
        },
        "pair_ids": pair_ids,
        "measured": [],
        "finished": False,
    }


def _check_free_keys(run: dict) -> None:
    taken = sorted(set(run) & set(_WRITTEN_HERE))
    if taken:
        raise ValueError(f"{', '.join(taken)}: {RUN_FILE} keeps these keys for itself")


def _check_written_by_this(place: Place, run: dict, *, also_older: bool = False) -> None:
    """Raises `InputError` where `run.json` is not that of a sweep, or of effects in chunks that
    cannot be read here."""
    lacking = set(_WRITTEN_HERE) - set(run)
    if lacking == {"layers_together"}:
        if not also_older:
            version = run.get("versions", {}).get("jaxmed", "an earlier version")
            raise InputError(
                f"{place} was written by a jaxmed ({version}) that did not store effects by parts "
                "of the layers: read it with that one, choose another folder, or run again and "
                "overwrite it"
            )
    elif lacking:
        raise InputError(
            f"{place.path(RUN_FILE)} was not written by a run of jaxmed: choose another folder"
        )
