"""`summary.parquet`: a row per unit and estimand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.analysis import estimands, statistics
from jaxmed.files import atomic
from jaxmed.question import sites
from jaxmed.store import results as results_lib

ESTIMANDS = ("nie", "tie", "nde", "int")

_SUMMARY_FILE = "summary.parquet"


def summarise(results: results_lib.Results) -> pa.Table:
    """The statistics of every unit that any pair has.

    NDE = TE - TIE and INT = TIE - NIE are formed per pair. Pairs of one base prompt are averaged
    first: means, intervals and tests are over base prompts. q-values hold within one family: all
    units of one granularity and one estimand. Units that a screen has only estimated are not
    tested, as the pairs say nothing of a gradient's error: their interval, p and q are null. They
    belong to the family all the same, as if their p were 1.

    Args:
        results: the run.

    Returns:
        A table with one row per granularity, estimand and unit, in this order, then in that of the
        arrays. Columns: granularity, layer, site, unit, position, estimand, mean, ci_low, ci_high
        (a 95% interval, in units of the metric), p_value, q_value, n_pairs (base prompts that have
        the unit), exact (false for an estimate); null where one does not apply. `unit` is a head,
        (the first of its group) a neuron, or a direction's number within its array; `position`
        counts backwards from the last prompt token, 0. Three rows of granularity "total" hold te,
        y_base, y_source.
    """
    te = results.te
    tables = [_total_rows(results)]
    for granularity in results.granularities:
        nie, tie = results.effects(granularity)
        places = _places(results, granularity)
        exact = ~results.estimated(granularity).ravel()
        values = {
            "nie": nie,
            "tie": tie,
            "nde": estimands.natural_direct_effect(te, tie),
            "int": estimands.interaction(nie, tie),
        }
        for estimand in ESTIMANDS:
            over_bases = statistics.by_base(values[estimand], results.bases)
            tables.append(_rows(granularity, estimand, over_bases, places, exact))
    return pa.concat_tables(tables)


def write_summary(results: results_lib.Results) -> pa.Table:
    """Writes `summarise`'s table to `summary.parquet` in the results folder, and returns it."""
    table = summarise(results)
    path = results.folder / _SUMMARY_FILE
    atomic.replace_file(path, lambda temporary: pq.write_table(table, temporary))
    return table


def read_summary(results: results_lib.Results) -> pa.Table:
    """`summary.parquet`, written anew if it is missing or older than the effects."""
    path = results.folder / _SUMMARY_FILE
    written = max(file.stat().st_mtime_ns for file in (results.folder / "effects.zarr").rglob("*"))
    if path.exists() and path.stat().st_mtime_ns >= written:
        return pq.read_table(path)
    return write_summary(results)


def _places(results: results_lib.Results, granularity: str) -> dict[str, np.ndarray]:
    """Where each unit is: layer, site, unit and position, each [unit], -1 where one is not."""
    index = [axis.ravel() for axis in np.indices(results.sizes.shape(granularity))]
    nowhere = np.full(index[0].shape, -1)
    places = {"layer": index[0], "unit": nowhere, "position": nowhere}
    if granularity == "module":
        places["site"] = np.array(sites.MODULE_SITES)[index[1]]
    elif granularity == "token":
        places["site"] = np.array(sites.TOKEN_SITES)[index[1]]
        places["position"] = index[2]
    elif granularity == "direction":
        places["site"] = np.array(results.sizes.sites)[index[1]]
        places["unit"] = index[2]
    else:
        places["site"] = np.full(index[0].shape, granularity)
        if granularity == "head":
            places["unit"] = index[1]
        elif granularity == "neuron":
            places["unit"] = index[1] * results.run.get("group_size", 1)
    return places


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
        "q_value": statistics.q_values(p, untested=count - exact.sum()),
        "n_pairs": pa.array(n_pairs[kept], pa.int32()),
        "exact": pa.array(exact, pa.bool_()),
    }
    for name, column in whole_numbers.items():
        columns[name] = pa.array(column, pa.int32(), mask=column < 0)
    for name in ("mean", "ci_low", "ci_high", "p_value", "q_value"):
        columns[name] = pa.array(columns[name], pa.float64(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)


def _total_rows(results: results_lib.Results) -> pa.Table:
    nowhere = {name: np.array([-1]) for name in ("layer", "unit", "position")}
    places = {**nowhere, "site": np.array([None])}
    totals = {"te": results.te, "y_base": results.y_base, "y_source": results.y_source}
    return pa.concat_tables(
        _rows(
            "total",
            name,
            statistics.by_base(values, results.bases)[:, None],
            places,
            np.array([True]),
        )
        for name, values in totals.items()
    )
