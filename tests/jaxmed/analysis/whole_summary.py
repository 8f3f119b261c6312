"""The definition of a summary: of whole arrays, all of which are in memory."""

import numpy as np
import pyarrow as pa

from jaxmed.analysis import estimands, statistics
from jaxmed.question.effects import TOTALS, Status

FLOATS = ("mean", "ci_low", "ci_high", "p_value", "q_value")


def summarise(found):
    """What `summary.summarise` gives."""
    tables = []
    for granularity, effects in found.items():
        totals = effects.totals
        if not tables:
            tables += [_total(name, totals) for name in TOTALS]
        values = {
            "nie": effects.nie,
            "tie": effects.tie,
            "nde": estimands.natural_direct_effect(effects.te, effects.tie),
            "int": estimands.interaction(effects.nie, effects.tie),
        }
        exact = ~(effects.done == Status.ESTIMATED).any(axis=0).ravel()
        for estimand, of_pairs in values.items():
            over_bases = statistics.by_base(of_pairs, totals.bases)
            tables.append(_rows(granularity, estimand, over_bases, effects.places(), exact))
    return pa.concat_tables(tables)


def _total(name, totals):
    places = {"layer": np.array([-1]), "unit": np.array([-1]), "position": np.array([-1])}
    values = statistics.by_base(getattr(totals, name), totals.bases)[:, None]
    return _rows("total", name, values, places | {"site": np.array([None])}, np.array([True]))


def _rows(granularity, estimand, values, places, exact):
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
        "mean": np.nanmean(values, axis=0, dtype=np.float64),
        "ci_low": low,
        "ci_high": high,
        "p_value": p,
        "q_value": statistics.q_values(p, untested=int(count - exact.sum())),
        "n_pairs": pa.array(n_pairs[kept], pa.int32()),
        "exact": pa.array(exact, pa.bool_()),
    }
    for name, column in whole_numbers.items():
        columns[name] = pa.array(column, pa.int32(), mask=column < 0)
    for name in FLOATS:
        columns[name] = pa.array(columns[name], pa.float64(), from_pandas=True)
    return pa.table(columns)
