"""What effects over pairs say: means, intervals, tests, shares, and scores against a truth.

Everywhere the first axis is the pair, and NaN means that the pair has no such unit: means,
intervals and tests of a unit are over the pairs that have it.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from jaxmed import estimands
from jaxmed import results as results_lib

# Below this mean total effect, in units of the metric, there is little to take a share of.
MINIMUM_TOTAL_EFFECT = 0.1

ESTIMANDS = ("nie", "tie", "nde", "int")

SEED = 0  # of the bootstrap

_SUMMARY_FILE = "summary.parquet"
_VALUES_AT_ONCE = 2**23  # resampled means in memory, 64 MiB in float64


def pair_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the pairs that have the unit: [pair, unit...] -> [unit...], NaN where none has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=0, dtype=np.float64)


def by_base(values: np.ndarray, bases: Sequence[str]) -> np.ndarray:
    """Mean over the pairs of each base prompt, which are no independent samples.

    Args:
        values: [pair, unit...].
        bases: the base prompt of each pair.

    Returns:
        [base, unit...], in the order in which the bases first occur; a unit's mean is over the
        pairs that have it. The values as they are where all bases differ.
    """
    pairs_of = {}
    for pair, base in enumerate(bases):
        pairs_of.setdefault(base, []).append(pair)
    if len(pairs_of) == len(values):
        return values
    return np.stack([pair_mean(values[pairs]) for pairs in pairs_of.values()])


def mean_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over pairs and their percentile bootstrap intervals (Efron and Tibshirani 1993, 13).

    Args:
        values: [pair, unit...].
        level: the interval's coverage, a fraction.
        resamples: how often the pairs are drawn anew.
        seed: of the draws; units with equally many pairs share the draws.

    Returns:
        mean, low, high: float64 [unit...]; low and high are NaN for a unit that fewer than two
        pairs have.
    """
    values = np.asarray(values, np.float64)
    unit_shape = values.shape[1:]
    values = values.reshape(len(values), -1)
    interval = np.full((2, values.shape[1]), np.nan)
    # scipy.stats.bootstrap gathers resamples x pairs x units values. A resample's mean needs only
    # how often each pair was drawn, so one matrix product gives the means of all resamples.
    for pairs, units in _units_by_pairs(values):
        if len(pairs) < 2:
            continue
        counts = _draw_counts(len(pairs), resamples, seed).astype(np.float64)
        for chunk in np.array_split(units, -(-len(units) * resamples // _VALUES_AT_ONCE)):
            sums = values[np.ix_(pairs, chunk)].T @ counts.T
            sums.sort(axis=1)
            for bound, quantile in zip(interval, ((1 - level) / 2, (1 + level) / 2), strict=True):
                bound[chunk] = _quantile_of_sorted(sums, quantile) / len(pairs)
    low, high = interval.reshape(2, *unit_shape)
    return pair_mean(values).reshape(unit_shape), low, high


def rate_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of numbers in [0, 1] and its interval (Wilson 1927), which is no point where all are
    equal.

    Args:
        values: [prompt]; verdicts, or means of several. For the latter the interval is too wide.
        level: the interval's coverage, a fraction.

    Returns:
        mean, low, high: NaN without values.
    """
    count = len(values)
    if not count:
        return math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def rate_difference_interval(
    differences: np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of paired differences of numbers in [0, 1], and its interval.

    Agresti and Min 2005 (Simple improved confidence intervals for comparing matched proportions):
    half a prompt is added to each of the four outcomes of a pair, so that differences that are all
    equal still leave doubt. As is written there but that verdicts may be fractions.

    Args:
        differences: [prompt], each in [-1, 1].
        level: the interval's coverage, a fraction.

    Returns:
        mean, low, high: NaN without differences.
    """
    count = len(differences)
    if not count:
        return math.nan, math.nan, math.nan
    total, squares = float(np.sum(differences)), float(np.sum(np.square(differences)))
    centre = total / (count + 2)
    variance = ((squares + 1) / (count + 2) - centre**2) / (count + 2)
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return total / count, max(-1.0, centre - half), min(1.0, centre + half)


def p_values(values: np.ndarray) -> np.ndarray:
    """Two-sided one-sample t tests that the mean over pairs is 0.

    Args:
        values: [pair, unit...].

    Returns:
        p, [unit...]: NaN for a unit that fewer than two pairs have. Effects that are equal in all
        pairs have p = 1 if they are 0, and else p = 0.
    """
    values = np.asarray(values, np.float64)
    present = ~np.isnan(values)
    count = present.sum(axis=0)
    mean = pair_mean(values)
    squares = np.where(present, (values - mean) ** 2, 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / np.sqrt(squares / (count - 1) / count)
    p = 2 * stats.t.sf(np.abs(t), np.maximum(count - 1, 1))
    # Rounding leaves equal values a tiny variance or none: such units are told apart exactly.
    lowest = np.where(present, values, np.inf).min(axis=0)
    highest = np.where(present, values, -np.inf).max(axis=0)
    p = np.where(lowest == highest, np.where(lowest == 0, 1.0, 0.0), p)
    return np.where(count < 2, np.nan, p)


def q_values(p: np.ndarray, untested: int = 0) -> np.ndarray:
    """False discovery rates (Benjamini and Hochberg 1995) over the p-values that are not NaN.

    Args:
        p: [unit...].
        untested: further units of the family, which a screen left out. Each counts as p = 1, so
            that the correction is for all units, and the choice of those to test costs nothing.

    Returns:
        q, [unit...]: NaN where p is.
    """
    p = np.asarray(p, np.float64)
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        family = np.concatenate([p[tested], np.ones(untested)])
        q[tested] = stats.false_discovery_control(family)[: tested.sum()]
    return q


def strength(nie: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """The larger of |mean NIE| and |mean TIE|: [pair, unit...] -> [unit...], NaN where no pair has
    the unit."""
    return np.maximum(np.abs(pair_mean(nie)), np.abs(pair_mean(tie)))


def share(effects: np.ndarray, te: np.ndarray, minimum: float = MINIMUM_TOTAL_EFFECT) -> np.ndarray:
    """mean(effect) / mean(TE), both over the pairs that have the unit and a total effect.

    Args:
        effects: [pair, unit...].
        te: [pair], total effects.
        minimum: the least |mean(TE)|, in units of the metric, that a share is formed of.

    Returns:
        [unit...]: fractions; NaN where |mean(TE)| is under the minimum.
    """
    te = np.asarray(te, np.float64)
    te = te.reshape(-1, *(1,) * (np.ndim(effects) - 1))
    both = ~np.isnan(effects) & ~np.isnan(te)
    mean_te = pair_mean(np.where(both, te, np.nan))
    mean_effect = pair_mean(np.where(both, effects, np.nan))
    return np.divide(
        mean_effect,
        mean_te,
        out=np.full(mean_te.shape, np.nan),
        where=np.abs(mean_te) >= minimum,
    )


def auroc(scores: np.ndarray, truth_mask: np.ndarray) -> float:
    """The chance that a true unit scores above another unit; a tie counts a half.

    A unit without a score (NaN) ranks below all others.

    Args:
        scores: [unit...].
        truth_mask: bool [unit...].

    Returns:
        A fraction; NaN if all units are true, or none.
    """
    truth = np.ravel(truth_mask)
    true_count, other_count = truth.sum(), (~truth).sum()
    if not true_count or not other_count:
        return float("nan")
    ranks = stats.rankdata(_ranked_last_without_score(scores))
    above = ranks[truth].sum() - true_count * (true_count + 1) / 2
    return float(above / (true_count * other_count))


def precision_at_k(scores: np.ndarray, truth_mask: np.ndarray) -> float:
    """The fraction of true units among the k best, with k the number of true units.

    Where units tie for the last places it is the mean over all orders of these. A unit without a
    score (NaN) ranks below all others, and is never found.

    Args:
        scores: [unit...].
        truth_mask: bool [unit...].

    Returns:
        A fraction; NaN if no unit is true.
    """
    truth = np.ravel(truth_mask)
    count = truth.sum()
    if not count:
        return float("nan")
    scores = _ranked_last_without_score(scores)
    last = np.sort(scores)[-count]
    above, tied = scores > last, scores == last
    places = (count - above.sum()) * np.isfinite(last)
    return float((truth[above].sum() + places * truth[tied].mean()) / count)


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
            over_bases = by_base(values[estimand], results.bases)
            tables.append(_rows(granularity, estimand, over_bases, places, exact))
    return pa.concat_tables(tables)


def write_summary(results: results_lib.Results) -> pa.Table:
    """Writes `summarise`'s table to `summary.parquet` in the results folder, and returns it."""
    table = summarise(results)
    path = results.folder / _SUMMARY_FILE
    results_lib.replace_file(path, lambda temporary: pq.write_table(table, temporary))
    return table


def read_summary(results: results_lib.Results) -> pa.Table:
    """`summary.parquet`, written anew if it is missing or older than the effects."""
    path = results.folder / _SUMMARY_FILE
    written = max(file.stat().st_mtime_ns for file in (results.folder / "effects.zarr").rglob("*"))
    if path.exists() and path.stat().st_mtime_ns >= written:
        return pq.read_table(path)
    return write_summary(results)


def _draw_counts(pairs: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each pair, [resample, pair]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)


def _quantile_of_sorted(rows: np.ndarray, quantile: float) -> np.ndarray:
    """What np.quantile(rows, quantile, axis=1) gives, which is 5 times slower than sorting."""
    place = quantile * (rows.shape[1] - 1)
    below, above = rows[:, int(np.floor(place))], rows[:, int(np.ceil(place))]
    return below + (above - below) * (place % 1)


def _units_by_pairs(values: np.ndarray):
    """Yields (pairs, units): the indices of units, [pair, unit], that the same pairs have."""
    present = np.packbits(~np.isnan(values), axis=0)
    patterns, pattern_of_unit = np.unique(present, axis=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        pairs = np.flatnonzero(np.unpackbits(pattern, count=len(values)))
        yield pairs, np.flatnonzero(pattern_of_unit == index)


def _ranked_last_without_score(scores: np.ndarray) -> np.ndarray:
    scores = np.ravel(np.asarray(scores, np.float64))
    return np.where(np.isnan(scores), -np.inf, scores)


def _places(results: results_lib.Results, granularity: str) -> dict[str, np.ndarray]:
    """Where each unit is: layer, site, unit and position, each [unit], -1 where one is not."""
    index = [axis.ravel() for axis in np.indices(results.sizes.shape(granularity))]
    nowhere = np.full(index[0].shape, -1)
    places = {"layer": index[0], "unit": nowhere, "position": nowhere}
    if granularity == "module":
        places["site"] = np.array(results_lib.MODULE_SITES)[index[1]]
    elif granularity == "token":
        places["site"] = np.array(results_lib.TOKEN_SITES)[index[1]]
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
    _, low[exact], high[exact] = mean_interval(values[:, exact])
    p[exact] = p_values(values[:, exact])
    whole_numbers = {name: places[name][kept] for name in ("layer", "unit", "position")}
    columns = {
        "granularity": pa.array(np.full(count, granularity), pa.string()),
        "layer": None,
        "site": pa.array(places["site"][kept], pa.string()),
        "unit": None,
        "position": None,
        "estimand": pa.array(np.full(count, estimand), pa.string()),
        "mean": pair_mean(values),
        "ci_low": low,
        "ci_high": high,
        "p_value": p,
        "q_value": q_values(p, untested=count - exact.sum()),
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
        _rows("total", name, by_base(values, results.bases)[:, None], places, np.array([True]))
        for name, values in totals.items()
    )
