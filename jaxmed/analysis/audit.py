"""The audit of a screen: how many strong units may have been missed."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from jaxmed.analysis.screening import Selection


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit sample says of the units that were not computed.

    Attributes:
        threshold: the `top`-th largest absolute effect of the candidates, in the metric's unit.
        hits: sampled units whose absolute effect is above it; they are computed, so not missing.
        estimate: unbiased estimate of the number of units above it that were not computed
            (Horvitz and Thompson 1952); 0 wherever nothing was sampled.
        bound: upper confidence bound on that number.
        uncomputed: number of units that were not computed.
        confidence: of the bound.
    """

    threshold: float
    hits: int
    estimate: float
    bound: int
    uncomputed: int
    confidence: float


def missed(
    selection: Selection,
    effects: Float[np.ndarray, "L G"],
    top: int,
    confidence: float = 0.95,
) -> Audit:
    """Bounds how many units that were not computed have one of the `top` strongest effects.

    The threshold is the `top`-th largest absolute effect of the candidates alone: it is fixed
    before the sample is looked at, which the bound requires. The `top`-th largest of all computed
    effects, hits included, is no smaller, so the bound also holds for units above that one. The
    bound is for this one list of effects: of NIE, of TIE, or of the larger of both.

    Args:
        selection: which effects were computed.
        effects: exact effects where computed; what stands elsewhere is not read.
        top: how many of the strongest effects are wanted.
        confidence: in at least this share of samples the bound holds.

    Raises:
        ValueError: there are fewer candidates than `top`, or a selected effect is not a number.
    """
    strength = np.abs(effects)
    if np.isnan(strength[selection.computed]).any():
        raise ValueError("an effect that the selection names was not computed")
    candidates = np.sort(strength[selection.candidates])
    if not 1 <= top <= len(candidates):
        raise ValueError(f"top={top}, and the selection has {len(candidates)} candidates")
    threshold = candidates[-top]
    hit = selection.sampled & (strength > threshold)
    sizes, samples, hits = (
        np.bincount(selection.stratum[among], minlength=selection.stratum.max() + 1)
        for among in (~selection.candidates, selection.sampled, hit)
    )
    return Audit(
        threshold=float(threshold),
        hits=int(hits.sum()),
        estimate=float(np.sum(hits * (sizes / np.maximum(samples, 1) - 1))),
        bound=missing_bound(sizes, samples, hits, confidence),
        uncomputed=int(np.sum(~selection.computed)),
        confidence=confidence,
    )


def missing_bound(
    sizes: Int[np.ndarray, "J"] | Sequence[int],
    samples: Int[np.ndarray, "J"] | Sequence[int],
    hits: Int[np.ndarray, "J"] | Sequence[int],
    confidence: float = 0.95,
) -> int:
    """Upper confidence bound on the marked units outside a stratified sample.

    Let m_j of the N_j units of stratum j be marked, and n_j be drawn without replacement: then H_j
    of the drawn ones are marked, hypergeometric. The test rejects m if

        P_m(T <= observed T) <= 1 - confidence,    T = sum_j H_j N_j / n_j,

    and the bound is the largest sum_j (m_j - observed H_j) of all m that are not rejected (test
    inversion: Casella and Berger, section 9.2.1; for one stratum it is the textbook's one-sided
    hypergeometric limit). Strata of which all is drawn miss nothing; ones of which nothing is drawn
    may miss everything. Where the search would be long, m is searched on a coarser lattice or P is
    replaced by its Chernoff bound, so that fewer m are rejected: the bound is then larger than it
    need be, by a few percent, and holds all the same.

    Args:
        sizes: N.
        samples: n.
        hits: observed H.
        confidence: of the bound, one-sided.

    Raises:
        ValueError: the numbers contradict each other, or the confidence is not between 0 and 1.
    """
    sizes, samples, hits = (np.asarray(field, np.int64) for field in (sizes, samples, hits))
    if not (0 < confidence < 1 and np.all((0 <= hits) & (hits <= samples) & (samples <= sizes))):
        raise ValueError(
            f"confidence={confidence} must lie between 0 and 1, and hits, samples and sizes of "
            f"strata must not fall: {hits}, {samples}, {sizes}"
        )
    blind = samples == 0
    partly = ~blind & (samples < sizes)
    bound = int(np.sum(sizes[blind]))
    if partly.any():
        # Narrow strata first: the last one is searched exactly, the others on a lattice.
        strata = _Strata(sizes[partly], samples[partly], hits[partly], _rejected_below(confidence))
        total, each = _chernoff_limits(strata)
        order = np.argsort(each, kind="stable")
        strata = _Strata(
            sizes=strata.sizes[order],
            samples=strata.samples[order],
            hits=strata.hits[order],
            alpha=strata.alpha,
        )
        bound += min(total, _lattice_limit(strata, each[order], total))
    return bound


@dataclasses.dataclass(frozen=True)
class _Strata:
    """Strata that are partly sampled, [J], and the probability at which the test rejects."""

    sizes: np.ndarray
    samples: np.ndarray
    hits: np.ndarray
    alpha: float

    @property
    def weights(self) -> np.ndarray:
        return self.sizes / self.samples

    @property
    def unseen(self) -> np.ndarray:
        return self.sizes - self.samples


def _rejected_below(confidence: float) -> float:
    """The probability at which the test rejects, less what rounding may do to it."""
    return (1 - confidence) * (1 - 1e-7)


def _chernoff_limits(strata: _Strata) -> tuple[int, np.ndarray]:
    """The largest sum of missing units, and the most in each stratum, that Chernoff's bound allows.

    A hypergeometric H is below a binomial of m trials of probability f = n / N in convex order
    (Hoeffding 1963, theorem 4), so for any s > 0, with x = m - observed H >= 0,

        log P_m(T <= t) <= s t + sum_j m_j log(1 - f_j + f_j exp(-s w_j)),

    linear in m: what is not rejected lies in an intersection of half-spaces and a box.
    """
    weights, fractions = strata.weights, 1 / strata.weights
    tilts = np.geomspace(1e-5 / weights.max(), 50 / weights.min(), 400)[:, None]
    rates = -np.log1p(fractions * np.expm1(-tilts * weights))
    budget = np.sum((tilts * weights - rates) * strata.hits, axis=1) - math.log(strata.alpha)
    each = np.min(np.minimum(strata.unseen, budget[:, None] / rates), axis=0)
    # The largest sum in each half-space: strata are filled up in the order of their rates.
    total = np.zeros(len(tilts))
    order = np.argsort(rates, axis=1)
    for column in order.T:
        rate = np.take_along_axis(rates, column[:, None], axis=1)[:, 0]
        filled = np.minimum(strata.unseen[column], budget / rate)
        total += filled
        budget = np.maximum(0, budget - filled * rate)
    return int(total.min()), np.floor(each).astype(np.int64)


# Sizes that keep the search for a bound within some tenths of a second.
_MOST_TERMS = 2_000_000
_MOST_HITS = 200_000


def _lattice_limit(strata: _Strata, caps: np.ndarray, otherwise: int) -> int:
    """The largest sum of missing units that the test does not reject; `otherwise` if that is long.

    x = m - H runs over a lattice in all strata but the last. P falls in every m_j, so a lattice
    cell whose lowest corner is rejected is rejected as a whole, and one whose lowest corner is not
    counts by its highest. In the last stratum the largest x is found by bisection.

    Args:
        strata: the strata.
        caps: the largest x to be considered in each.
        otherwise: returned if the search would be long.
    """
    weights = strata.weights
    # The sum of rounded products may differ in its last bits from the same sum in another order.
    observed = np.sum(weights * strata.hits) * (1 + 1e-9)
    most = np.minimum(strata.samples, np.floor(observed / weights).astype(np.int64))
    if np.prod(most[:-1] + 1.0) > _MOST_HITS or most[-1] >= _MOST_HITS:
        return otherwise
    # Hits of all strata but the last that leave T as small as observed, [J - 1, C].
    others = _grid(most[:-1] + 1)
    left = observed - weights[:-1] @ others
    others, left = others[:, left >= 0], left[left >= 0]
    allowed = np.minimum(most[-1], np.floor(left / weights[-1]).astype(np.int64))
    points = min(_MOST_TERMS // len(allowed), _MOST_HITS // (int(most[-1]) + 1))
    if points < 100 and len(caps) > 1:
        return otherwise

    steps = _lattice_steps(caps[:-1], points)
    axes = [np.arange(0, cap + 1, step) for cap, step in zip(caps[:-1], steps, strict=True)]
    lattice = _grid([len(axis) for axis in axes])
    highest = np.zeros(lattice.shape[1], np.int64)
    likelihood = np.ones((lattice.shape[1], len(allowed)))
    for j, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        values = np.arange(most[j] + 1)
        table = _hypergeometric(
            values, strata.sizes[j], strata.hits[j] + axis[:, None], strata.samples[j]
        )
        likelihood *= table[lattice[j][:, None], others[j]]
        highest += np.minimum(axis[lattice[j]] + step - 1, caps[j])
    # Probability that the other strata leave room for h hits in the last one, [points, h].
    values = np.arange(most[-1] + 1)
    room = likelihood @ (allowed[:, None] >= values)

    def accepted(x):
        """Whether m, with x missing in the last stratum, is not rejected."""
        marked = strata.hits[-1] + x[:, None]
        last = _hypergeometric(values, strata.sizes[-1], marked, strata.samples[-1])
        return np.sum(room * last, axis=1) > strata.alpha

    low = np.zeros(len(highest), np.int64)
    kept = accepted(low)
    low, highest, room = low[kept], highest[kept], room[kept]
    high = np.full(len(low), caps[-1] + 1)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        inside = accepted(middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return int(np.max(highest + low))


def _grid(counts) -> np.ndarray:
    """Every combination of indices below the counts, [dimensions, combinations]."""
    return np.indices(counts).reshape(len(counts), math.prod(counts))


def _lattice_steps(caps: np.ndarray, points: int) -> np.ndarray:
    """Steps of a lattice that covers [0, cap] in every stratum with no more than so many points."""
    steps = np.ones(len(caps), np.int64)
    while np.prod(counts := caps // steps + 1.0) > points:
        steps[np.argmax(counts)] += 1
    return steps


def _hypergeometric(hits, size, marked, sample) -> np.ndarray:
    """P(H = hits) where `sample` of `size` units are drawn and `marked` of them are marked."""
    marked_out, unmarked = marked - hits, size - marked
    unmarked_out = unmarked - (sample - hits)
    possible = (marked_out >= 0) & (hits <= sample) & (unmarked_out >= 0)
    log_p = (
        (gammaln(marked + 1) + gammaln(unmarked + 1))
        + (gammaln(sample + 1) + gammaln(size - sample + 1) - gammaln(size + 1))
        - (gammaln(hits + 1) + gammaln(np.maximum(sample - hits, 0) + 1))
        - gammaln(np.maximum(marked_out, 0) + 1)
        - gammaln(np.maximum(unmarked_out, 0) + 1)
    )
    return np.where(possible, np.exp(np.where(possible, log_p, 0)), 0)
