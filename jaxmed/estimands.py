"""What effects mean: direct and interaction effects, and joint sets of neurons."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jaxmed import definition, planning
from jaxmed.data import Pair
from models.decoder import Decoder


def natural_direct_effect(te: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """NDE = TE - TIE; te [pair] against tie [pair, ...]."""
    return te.reshape(-1, *[1] * (tie.ndim - 1)) - tie


def interaction(nie: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """INT = TIE - NIE: 0 only where the model is locally additive."""
    return tie - nie


CANDIDATES = 100  # neurons that each step of the greedy search tries


@dataclasses.dataclass(frozen=True)
class JointSet:
    """A set of neurons, in the order in which the greedy search added them.

    Attributes:
        picked: (layer, neuron) of each.
        share_nie, share_tie: share of the mean TE that the set so far has, after each addition.
    """

    picked: list[tuple[int, int]]
    share_nie: list[float]
    share_tie: list[float]

    def scores(self, single: np.ndarray) -> np.ndarray:
        """A score by which neurons can be ranked, [layer, neuron].

        Picked neurons come first, in their order; the others follow by their single effect.

        Args:
            single: size of the single effects, [layer, neuron].
        """
        scores = single / (1 + np.nanmax(single))
        for place, neuron in enumerate(self.picked):
            scores[neuron] = 1 + len(self.picked) - place
        return scores


def greedy_set(
    decoder: Decoder,
    pairs: list[Pair],
    question: planning.Question,
    single: np.ndarray,
    *,
    size: int,
    candidates: int = CANDIDATES,
    memory: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> JointSet:
    """The set of neurons that grows by the one that most raises the joint effect.

    One direction alone misleads: redundant units hide from NIE, saturated ones from TIE. The
    search therefore raises the sum of both shares of TE, each counted up to 1, so that overshoot
    is no gain.

    Args:
        decoder: the model.
        pairs: the pairs whose mean is taken.
        question: the metric and the positions; its group size must be 1.
        single: size of the single effects, [layer, neuron]; the strongest are the candidates.
        size: neurons in the set.
        candidates: how many of the strongest are tried.
        memory: bytes for the runs that are made at once; most of what is free by default.
        on_step: called after each addition.
    """
    order = np.argsort(-np.nan_to_num(single), axis=None)[: max(candidates, size)]
    pool = [tuple(int(i) for i in np.unravel_index(flat, single.shape)) for flat in order]
    members = np.zeros(single.shape, bool)
    found = JointSet([], [], [])
    while len(found.picked) < size and pool:
        sets = np.repeat(members[None], len(order), axis=0)
        for trial, neuron in zip(sets, pool, strict=False):
            trial[neuron] = True
        with jax.default_matmul_precision("float32"):
            joint = [definition.joint_pair(decoder, pair, question, sets, memory) for pair in pairs]
        te = np.mean([pair.y_source - pair.y_base for pair in joint])
        nie, tie = (
            np.mean([getattr(pair, side)["joint"] for pair in joint], axis=0)[: len(pool)] / te
            for side in ("nie", "tie")
        )
        best = int(np.argmax(np.minimum(nie, 1) + np.minimum(tie, 1)))
        members[pool[best]] = True
        found.picked.append(pool.pop(best))
        found.share_nie.append(float(nie[best]))
        found.share_tie.append(float(tie[best]))
        on_step()
    return found
