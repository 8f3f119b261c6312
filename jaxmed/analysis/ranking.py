"""How units are ranked, and how well a ranking finds what is there."""

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxmed.analysis import slabs, statistics
from jaxmed.analysis.joint import JointSet
from jaxmed.store.results import Indices, Results

# Below this mean total effect, in units of the metric, there is little to take a share of.
MINIMUM_TOTAL_EFFECT = 0.1


def strength(nie: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """The larger of |mean NIE| and |mean TIE|: [pair, unit...] -> [unit...], NaN where no pair has
    the unit."""
    return _larger((statistics.pair_mean(nie), statistics.pair_mean(tie)))


def exact_strength(
    results: Results, granularity: str, pairs: Indices | None = None
) -> Float[np.ndarray, "layer *unit"]:
    """The `strength` of a run's units over pairs, by exact effects alone; by default over those
    that the units are tested on."""
    return _larger(slabs.mean_effects(results, granularity, pairs))


def estimated_strength(results: Results) -> Float[np.ndarray, "layer neuron"]:
    """The `strength` of a run's neurons by what they are chosen by: their effects in the scouts, or
    a screen's estimates."""
    if results.scouts:
        return exact_strength(results, "neuron", np.array(results.scouts))
    return _larger(slabs.mean_estimates(results))


def _larger(means: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    nie, tie = map(np.abs, means)
    return np.maximum(nie, tie)


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
    mean_te = statistics.pair_mean(np.where(both, te, np.nan))
    mean_effect = statistics.pair_mean(np.where(both, effects, np.nan))
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


def _ranked_last_without_score(scores: np.ndarray) -> np.ndarray:
    scores = np.ravel(np.asarray(scores, np.float64))
    return np.where(np.isnan(scores), -np.inf, scores)


# The rankings of a run, and what they are called for people.
RANKINGS = {
    "nie": "NIE",
    "tie": "TIE",
    "max": "larger of both",
    "joint": "greedy joint set",
}


def rankings(results: Results, granularity: str) -> dict[str, Float[np.ndarray, "layer unit"]]:
    """How a run ranks its units: scores by name; units that were only estimated have NaN.

    "nie", "tie" and "max" are |mean NIE|, |mean TIE| and the larger of both; neurons of a run with
    a joint set have "joint" as well: first its neurons, in their order, then the others by "max".
    """
    nie, tie = means = slabs.mean_effects(results, granularity)
    scores = {"nie": np.abs(nie), "tie": np.abs(tie), "max": _larger(means)}
    if granularity == "neuron" and "joint" in results.run:
        scores["joint"] = joint_set(results).scores(scores["max"])
    return scores


def joint_set(results: Results) -> JointSet:
    """The greedy joint set of a run that has one."""
    joint = results.run["joint"]
    picked = [(layer, neuron) for layer, neuron in joint["picked"]]
    return JointSet(picked=picked, share_nie=joint["share_nie"], share_tie=joint["share_tie"])
