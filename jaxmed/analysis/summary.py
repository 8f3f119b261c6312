"""`summary.parquet`: a row per unit and estimand."""

import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jaxmed.analysis import estimands, slabs, statistics
from jaxmed.question import effects as effects_lib
from jaxmed.question.effects import TOTALS, Effects, Status, Totals
from jaxmed.store.results import Results

SUMMARISED = ("nie", "tie", "nde", "int")  # those of every unit that a summary has

_SUMMARY_FILE = "summary.parquet"
_EFFECTS = "jaxmed.effects"  # in the file: the `Results.state` that it was made of
_STATISTICS = ("mean", "ci_low", "ci_high", "p_value", "q_value")
_SCHEMA = pa.schema(
    {
        "granularity": pa.string(),
        "layer": pa.int32(),
        "site": pa.string(),
        "unit": pa.int32(),
        "position": pa.int32(),
        "estimand": pa.string(),
        **dict.fromkeys(_STATISTICS, pa.float64()),
        "n_pairs": pa.int32(),
        "exact": pa.bool_(),
    }
)

# Effects whose statistics a thread forms at once: 16 MiB in float64, and some arrays as large.
_EFFECTS_AT_ONCE = 2**21
_THREADS = min(4, os.cpu_count() or 1)
# Rows of a group of the file: a reader may pass over groups that it does not want.
_ROWS_AT_ONCE = 2**18


def summarise(found: Mapping[str, Effects]) -> pa.Table:
    """The statistics of every unit that any pair has.

    NDE = TE - TIE and INT = TIE - NIE are formed per pair. Pairs of one base prompt are averaged
    first: means, intervals and tests are over base prompts. q-values hold within one family: all
    units of one granularity and one estimand. Units that a screen has only estimated are not
    tested, as the pairs say nothing of a gradient's error: their interval, p and q are null. They
    belong to the family all the same, as if their p were 1. Neurons that scouts have chosen are
    tested on all other pairs, which had no part in the choice: those that it left out have no row,
    and are not of the family.

    Args:
        found: the effects by granularity, of a scan in memory or of a results folder, of which
            some layers are read at a time.

    Returns:
        A table with one row per granularity, estimand and unit, in this order, then in that of the
        arrays. Columns: granularity, layer, site, unit, position, estimand, mean, ci_low, ci_high
        (a 95% interval, in units of the metric), p_value, q_value, n_pairs (base prompts that have
        the unit), exact (false for an estimate); null where one does not apply. `unit` is a head,
        (the first of its group) a neuron, or a direction's number within its array; `position`
        counts backwards from the last prompt token, 0. Three rows of granularity "total" hold te,
        y_base, y_source.
    """
    return pa.concat_tables(_tables(found))


def write_summary(results: Results) -> None:
    """Writes `summarise`'s table to `summary.parquet` in the results folder, in groups of rows of
    one granularity and estimand."""
    schema = _SCHEMA.with_metadata({_EFFECTS: results.state()})
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema) as writer:
        for table in _tables(results):
            writer.write_table(table)
    results.place.write(_SUMMARY_FILE, file.getvalue())


def read_summary(results: Results) -> ds.Dataset:
    """`summary.parquet`, written anew if it is missing or not of the effects that are there.

    Its rows are read when they are asked for: `to_table(columns=, filter=)`.
    """
    kept = kept_summary(results)
    if kept is None:
        write_summary(results)
        kept = _opened(results)
    assert kept is not None  # it has been written
    return kept


def kept_summary(results: Results) -> ds.Dataset | None:
    """`summary.parquet` as it is; None if it is missing or not of the effects that are there."""
    kept = _opened(results)
    made_of = kept and (kept.schema.metadata or {}).get(_EFFECTS.encode(), b"").decode()
    return kept if made_of == results.state() else None


def _opened(results: Results) -> ds.Dataset | None:
    """The file's rows, unread where it is local; None if there is no file."""
    folder = results.place.folder
    if folder is not None:
        path = folder / _SUMMARY_FILE
        return ds.dataset(path) if path.is_file() else None
    file = results.place.read(_SUMMARY_FILE)
    if file is None:
        return None
    fragment = ds.ParquetFileFormat().make_fragment(pa.BufferReader(file))
    return ds.FileSystemDataset([fragment], fragment.physical_schema, fragment.format)


def _tables(found: Mapping[str, Effects]) -> Iterator[pa.Table]:
    """The summary's rows, in order; each table is of one granularity and estimand."""
    yield _total_rows(_totals(found))
    for granularity in found:
        coordinates, measured = _measured(found, granularity)
        for estimand in SUMMARISED:
            yield from _rows(granularity, estimand, coordinates, measured.pop(estimand))


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """What is known of the units that any pair has.

    Attributes:
        units: their indices among all units of the granularity.
        mean, low, high, p: as in the summary, of each; NaN where there is none.
        n_pairs: base prompts that have it.
        exact: false for an estimate.
    """

    units: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    n_pairs: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, exact: np.ndarray, first: int) -> "_Statistics":
        """Those of some units.

        Args:
            values: effects, [base, unit].
            exact: whether they are, [unit].
            first: index of the first unit.
        """
        n_pairs = (~np.isnan(values)).sum(axis=0)
        kept = n_pairs > 0
        values, exact = values[:, kept], exact[kept]
        low, high, p = np.full((3, values.shape[1]), np.nan)
        _, low[exact], high[exact] = statistics.mean_interval(values[:, exact])
        p[exact] = statistics.p_values(values[:, exact])
        return cls(
            units=first + np.flatnonzero(kept),
            mean=statistics.pair_mean(values),
            low=low,
            high=high,
            p=p,
            n_pairs=n_pairs[kept].astype(np.int32),
            exact=exact,
        )

    @classmethod
    def joined(cls, parts: Iterable["_Statistics"]) -> "_Statistics":
        """Those of several lists of units, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


def _measured(
    found: Mapping[str, Effects], granularity: str
) -> tuple[dict[str, np.ndarray], dict[str, _Statistics]]:
    """The coordinates of all units, and the statistics of each estimand.

    Some numbers are kept of each unit, and of each pair and unit only while their slab is there.
    """
    parts: dict[str, list[_Statistics]] = {estimand: [] for estimand in SUMMARISED}
    coordinates, first = {}, 0
    for slab in slabs.slabs(found, granularity):
        for estimand, each in _of_slab(slab, first):
            parts[estimand].append(each)
        layers = [of["layer"] for of in (coordinates, slab.coordinates) if of]
        coordinates = slab.coordinates | {"layer": np.concatenate(layers)}
        first += slab.done[0].size
        del slab  # before the next one is read
    return coordinates, {name: _Statistics.joined(each) for name, each in parts.items()}


def _of_slab(slab: Effects, first: int) -> Iterator[tuple[str, _Statistics]]:
    """Statistics by estimand, of some units after the others; `first` is the index of the first."""
    exact = ~(slab.done == Status.ESTIMATED).any(axis=0).ravel()
    nie, tie = (side.reshape(len(side), -1) for side in (slab.nie, slab.tie))
    step = max(1, _EFFECTS_AT_ONCE // len(nie))

    def of_units(start: int) -> list[tuple[str, _Statistics]]:
        units = slice(start, start + step)
        values = {
            "nie": nie[:, units],
            "tie": tie[:, units],
            "nde": estimands.natural_direct_effect(slab.te, tie[:, units]),
            "int": estimands.interaction(nie[:, units], tie[:, units]),
        }
        over_bases = {name: statistics.by_base(values[name], slab.totals.bases) for name in values}
        return [
            (name, _Statistics.of(over_bases[name], exact[units], first + start))
            for name in SUMMARISED
        ]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(of_units, range(0, max(1, nie.shape[1]), step)):
            yield from found


def _rows(
    granularity: str, estimand: str, coordinates: dict[str, np.ndarray], found: _Statistics
) -> Iterator[pa.Table]:
    """The rows of a family, in groups."""
    q = statistics.q_values(found.p, untested=int(len(found.p) - found.exact.sum()))
    for start in range(0, len(q), _ROWS_AT_ONCE):
        group = slice(start, start + _ROWS_AT_ONCE)
        of_group = _Statistics(*(column[group] for column in vars(found).values()))
        places = effects_lib.places(granularity, coordinates, of_group.units)
        yield _table(granularity, estimand, places, of_group, q[group])


def _table(
    granularity: str,
    estimand: str,
    places: dict[str, np.ndarray],
    found: _Statistics,
    q: np.ndarray,
) -> pa.Table:
    count = len(q)
    columns = {
        "granularity": pa.repeat(granularity, count),
        "site": pa.array(places["site"], pa.string()),
        "estimand": pa.repeat(estimand, count),
        "n_pairs": pa.array(found.n_pairs),
        "exact": pa.array(found.exact),
    }
    for name in ("layer", "unit", "position"):
        columns[name] = pa.array(places[name], pa.int32(), mask=places[name] < 0)
    measured = (found.mean, found.low, found.high, found.p, q)
    for name, column in zip(_STATISTICS, measured, strict=True):
        columns[name] = pa.array(column, from_pandas=True)  # NaN becomes null
    return pa.table({name: columns[name] for name in _SCHEMA.names}, _SCHEMA)


def _totals(found: Mapping[str, Effects]) -> Totals:
    """What was measured of all pairs."""
    if isinstance(found, Results):
        return found.totals
    return next(iter(found.values())).totals


def _total_rows(totals: Totals) -> pa.Table:
    places = {name: np.array([-1]) for name in ("layer", "unit", "position")}
    places["site"] = np.array([None])
    tables = []
    for name in TOTALS:
        values = statistics.by_base(getattr(totals, name), totals.bases)[:, None]
        found = _Statistics.of(values, np.array([True]), 0)
        known = {place: each[: len(found.units)] for place, each in places.items()}
        tables.append(_table("total", name, known, found, statistics.q_values(found.p)))
    return pa.concat_tables(tables)
