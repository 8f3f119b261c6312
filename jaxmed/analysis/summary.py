"""`summary.parquet`: a row per unit and estimand."""

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.analysis import estimands, statistics
from jaxmed.question.effects import TOTALS, Effects, Status, Totals
from jaxmed.store.results import Results

SUMMARISED = ("nie", "tie", "nde", "int")  # those of every unit that a summary has

_SUMMARY_FILE = "summary.parquet"
_EFFECTS = "jaxmed.effects"  # in the file: the `Results.state` that it was made of


def summarise(found: Mapping[str, Effects]) -> pa.Table:
    """The statistics of every unit that any pair has.

    NDE = TE - TIE and INT = TIE - NIE are formed per pair. Pairs of one base prompt are averaged
    first: means, intervals and tests are over base prompts. q-values hold within one family: all
    units of one granularity and one estimand. Units that a screen has only estimated are not
    tested, as the pairs say nothing of a gradient's error: their interval, p and q are null. They
    belong to the family all the same, as if their p were 1.

    Args:
        found: the effects by granularity, of a scan in memory or of a results folder.

    Returns:
        A table with one row per granularity, estimand and unit, in this order, then in that of the
        arrays. Columns: granularity, layer, site, unit, position, estimand, mean, ci_low, ci_high
        (a 95% interval, in units of the metric), p_value, q_value, n_pairs (base prompts that have
        the unit), exact (false for an estimate); null where one does not apply. `unit` is a head,
        (the first of its group) a neuron, or a direction's number within its array; `position`
        counts backwards from the last prompt token, 0. Three rows of granularity "total" hold te,
        y_base, y_source.
    """
    tables = []
    for granularity, effects in found.items():
        if not tables:
            tables.append(_total_rows(effects.totals))
        nie, tie = effects.nie, effects.tie
        places = effects.places()
        exact = ~(effects.done == Status.ESTIMATED).any(axis=0).ravel()
        values = {
            "nie": nie,
            "tie": tie,
            "nde": estimands.natural_direct_effect(effects.te, tie),
            "int": estimands.interaction(nie, tie),
        }
        for estimand in SUMMARISED:
            over_bases = statistics.by_base(values[estimand], effects.totals.bases)
            tables.append(_rows(granularity, estimand, over_bases, places, exact))
    return pa.concat_tables(tables)


def write_summary(results: Results) -> pa.Table:
    """Writes `summarise`'s table to `summary.parquet` in the results folder, and returns it."""
    state = results.state()
    table = summarise(results)
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_EFFECTS: state}), file)
    results.place.write(_SUMMARY_FILE, file.getvalue())
    return table


def read_summary(results: Results) -> pa.Table:
    """`summary.parquet`, written anew if it is missing or not of the effects that are there."""
    table = kept_summary(results)
    return write_summary(results) if table is None else table


def kept_summary(results: Results) -> pa.Table | None:
    """What `summary.parquet` holds; None if it is missing or not of the effects that are there."""
    file = results.place.read(_SUMMARY_FILE)
    if file is None:
        return None
    table = pq.read_table(pa.BufferReader(file))
    made_of = (table.schema.metadata or {}).get(_EFFECTS.encode(), b"").decode()
    return table.replace_schema_metadata() if made_of == results.state() else None


def _rows(
    granularity: str, estimand: str, values: np.ndarray, places: dict, exact: np.ndarray
) -> pa.Table:
    values = values.reshape(len(values), -1)
    n_pairs = (~np.isnan(values)).sum(axis=0)
    kept = n_pairs > 0
    values, exact = values[:, kept], exact[kept]
    count = values.shape[1]
    low, high, p = np.full((3, count), np.nan)
    _, low[exact], high[exact] = statistics.mean_interval(values[:, exact])
    p[exact] = statistics.p_values(values[:, exact])
    whole_numbers = {name: places[name][kept] for name in ("layer", "unit", "position")}
    columns = {
        "granularity": pa.array(np.full(count, granularity), pa.string()),
        "layer": None,
        "site": pa.array(places["site"][kept], pa.string()),
        "unit": None,
        "position": None,
        "estimand": pa.array(np.full(count, estimand), pa.string()),
        "mean": statistics.pair_mean(values),
        "ci_low": low,
        "ci_high": high,
        "p_value": p,
        "q_value": statistics.q_values(p, untested=int(count - exact.sum())),
        "n_pairs": pa.array(n_pairs[kept], pa.int32()),
        "exact": pa.array(exact, pa.bool_()),
    }
    for name, column in whole_numbers.items():
        columns[name] = pa.array(column, pa.int32(), mask=column < 0)
    for name in ("mean", "ci_low", "ci_high", "p_value", "q_value"):
        columns[name] = pa.array(columns[name], pa.float64(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)


def _total_rows(totals: Totals) -> pa.Table:
    nowhere = {name: np.array([-1]) for name in ("layer", "unit", "position")}
    places = {**nowhere, "site": np.array([None])}
    return pa.concat_tables(
        _rows(
            "total",
            name,
            statistics.by_base(getattr(totals, name), totals.bases)[:, None],
            places,
            np.array([True]),
        )
        for name in TOTALS
    )
