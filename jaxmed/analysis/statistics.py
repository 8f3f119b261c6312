"""What effects over pairs say: means, intervals, tests, shares, and scores against a truth.

Everywhere the first axis is the pair, and NaN means that the pair has no such unit: means,
intervals and tests of a unit are over the pairs that have it.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

SEED = 0  # of the bootstrap
_VALUES_AT_ONCE = 2**23  # resampled means in memory, 64 MiB in float64


def pair_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the pairs that have the unit: [pair, unit...] -> [unit...], NaN where none has."""
    missing = np.isnan(values)
    total = np.where(missing, 0, values).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / (len(values) - missing.sum(axis=0)))


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
            bounds = _quantiles(sums, ((1 - level) / 2, (1 + level) / 2))
            interval[:, chunk] = np.divide(bounds, len(pairs))
    low, high = (bound.reshape(unit_shape) for bound in interval)
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


@functools.lru_cache(maxsize=8)
def _draw_counts(pairs: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each pair, [resample, pair]; drawn once for many units."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)


def _quantiles(rows: np.ndarray, quantiles: Sequence[float]) -> list[np.ndarray]:
    """What np.quantile(rows, quantiles, axis=1) gives, which is 5 times slower; reorders `rows`."""
    places = [quantile * (rows.shape[1] - 1) for quantile in quantiles]
    ends = [(int(np.floor(place)), int(np.ceil(place))) for place in places]
    rows.partition(sorted({place for pair in ends for place in pair}), axis=1)
    return [
        rows[:, below] + (rows[:, above] - rows[:, below]) * (place % 1)
        for place, (below, above) in zip(places, ends, strict=True)
    ]


def _units_by_pairs(values: np.ndarray):
    """Yields (pairs, units): the indices of units, [pair, unit], that the same pairs have."""
    missing = np.isnan(values)
    if values.shape[1] and not missing.any():
        yield np.arange(len(values)), np.arange(values.shape[1])
        return
    present = np.packbits(~missing, axis=0)
    patterns, pattern_of_unit = np.unique(present, axis=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        pairs = np.flatnonzero(np.unpackbits(pattern, count=len(values)))
        yield pairs, np.flatnonzero(pattern_of_unit == index)
