"""Joint sets: neurons that are edited together, found greedily.

Shapes: L layers, I neurons of a layer, N sets of neurons.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost
from jaxmed.engine.memory import free as free_memory
from jaxmed.engine.propagate import read
from jaxmed.engine.scan import Run, pair_effects
from jaxmed.question import positions
from jaxmed.question.effects import PairEffects
from jaxmed.question.joined import Joined, Readings
from jaxmed.question.metrics import Metric
from jaxmed.question.question import Question
from models.decoder import Decoder
from models.edits import Edit
from models.shapes import AnyArray, Branches
from models.sites import Site


def joint_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    sets: Bool[AnyArray, "N L I"],
    memory: int | None = None,
) -> PairEffects:
    """NIE and TIE of sets of neurons, each set patched as one intervention.

    The whole model is run for every set, with a list of edits: one for each layer.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        sets: which neurons are in each set.
        memory: bytes for the runs that are made at once; most of what is free by default.

    Returns:
        Effects whose NIE and TIE hold one array, "joint", [N].
    """

    def evaluate(base: Run, source: Run, term: Joined, swapped: bool):
        response = len(term.response)
        edited = positions.edited(pair, question.positions, question.align, response)
        edited = edited.swapped() if swapped else edited
        tokens, valid, _ = capture.pad(base.tokens)
        is_edited = np.zeros(len(tokens), bool)
        is_edited[edited.base] = True
        found = joint_changes(
            decoder,
            tokens=tokens,
            valid=valid,
            branches=base.trace.branches,
            values=capture.aligned(source.trace, Site.NEURON, edited, len(tokens)),
            edited=is_edited,
            sets=sets,
            reading=term.reading,
            last_prompt=base.prompt_length - 1,
            metric=question.metric,
            at_once=cost.runs_at_once(decoder.config, term, len(tokens), budget),
        )
        yield "joint", ..., np.asarray(found)

    budget = free_memory() if memory is None else memory
    joint_shape = {"joint": (len(sets),)}
    return pair_effects(decoder, pair, question, joint_shape, evaluate)


@functools.partial(jax.jit, static_argnames=("metric", "at_once"))
def joint_changes(
    decoder: Decoder,
    *,
    tokens: Int[AnyArray, "T"],
    valid: Bool[AnyArray, "T"],
    branches: Branches | None,
    values: Float[AnyArray, "L T I"],
    edited: Bool[AnyArray, "T"],
    sets: Bool[AnyArray, "N L I"],
    reading: Readings,
    last_prompt: Int[ArrayLike, ""],
    metric: Metric,
    at_once: int,
) -> Float[Array, "N"]:
    """Y(edited) - Y(plain) for sets of neurons, whose values at the edited positions are given."""

    def run(members):
        edits = [
            Edit.patch(Site.NEURON, layer, edited, values[layer], members[layer])
            for layer in range(decoder.config.num_layers)
        ]
        # Only the rows that are read: logits of all positions of all sets would be large.
        residual = decoder(tokens, edits=edits, valid=valid, branches=branches)[1].residual
        assert residual is not None  # a run keeps all sites unless some are named
        return read(decoder, metric, residual[-1], reading, last_prompt)

    return jax.lax.map(run, sets, batch_size=at_once) - run(jnp.zeros_like(sets[0]))


Neuron = tuple[int, int]  # its layer, and its number there

CANDIDATES = 100  # neurons that each step of the greedy search tries
SHARE = 0.95  # of TE, by both estimands, at which the search stops

# Gains that differ by less than this share of TE count as equal.
_TIE = 0.01


@dataclasses.dataclass(frozen=True)
class JointSet:
    """A set of neurons, in the order in which the greedy search added them.

    Attributes:
        picked: (layer, neuron) of each.
        share_nie, share_tie: share of the mean TE, a fraction, that the set so far has by each
            estimand, after each addition.
    """

    picked: list[Neuron]
    share_nie: list[float]
    share_tie: list[float]

    def scores(self, single: Float[np.ndarray, "L I"]) -> Float[np.ndarray, "L I"]:
        """A score by which neurons can be ranked, without a unit.

        Picked neurons come first, in their order; the others follow by their single effect.

        Args:
            single: size of the single effects, in the metric's unit.
        """
        scores = single / (1 + np.nanmax(single))
        for place, neuron in enumerate(self.picked):
            scores[neuron] = 1 + len(self.picked) - place
        return scores


def joint_shares(
    decoder: Decoder,
    pairs: list[Pair],
    question: Question,
    sets: Bool[np.ndarray, "N L I"],
    memory: int | None = None,
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Shares of the mean TE that sets of neurons have jointly, by NIE and by TIE, fractions.

    Args:
        decoder: the model.
        pairs: the pairs whose mean is taken.
        question: the metric and the positions; its group size must be 1.
        sets: which neurons are in each set.
        memory: bytes for the runs that are made at once; most of what is free by default.
    """
    with jax.default_matmul_precision("float32"):
        joint = [joint_pair(decoder, pair, question, sets, memory) for pair in pairs]
    te = np.mean([pair.y_source - pair.y_base for pair in joint])
    return (
        np.mean([pair.nie["joint"] for pair in joint], axis=0) / te,
        np.mean([pair.tie["joint"] for pair in joint], axis=0) / te,
    )


def greedy_set(
    decoder: Decoder,
    pairs: list[Pair],
    question: Question,
    single: Float[np.ndarray, "L I"],
    *,
    size: int,
    share: float = SHARE,
    candidates: int = CANDIDATES,
    memory: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> JointSet:
    """The set of neurons that grows by the one that most raises the joint effect.

    One estimand alone misleads: redundant units hide from NIE, saturated ones from TIE. The
    search therefore raises the sum of both shares of TE, each counted up to 1, so that overshoot
    is no gain. Where several units are needed before any of them shows, gains are equal but for
    noise; the stronger single effect then decides. Once both shares are reached, neurons that are
    not needed for them are taken out again.

    Args:
        decoder: the model.
        pairs: the pairs whose mean is taken.
        question: the metric and the positions; its group size must be 1.
        single: size of the single effects, in the metric's unit; the strongest are the candidates.
        size: neurons in the set, at most.
        share: of TE, by both estimands, at which the search stops.
        candidates: how many of the strongest are tried.
        memory: bytes for the runs that are made at once; most of what is free by default.
        on_step: called after each addition.
    """
    order = np.argsort(-np.nan_to_num(single), axis=None)[: max(candidates, size)]
    places = np.transpose(np.unravel_index(order, single.shape)).tolist()
    pool: list[Neuron] = [(layer, neuron) for layer, neuron in places]
    count = len(pool)

    def shares(trials: list[list[Neuron]]) -> Float[np.ndarray, "2 trial"]:
        """Both shares of each trial."""
        # As many sets in every step, so that one compilation serves all.
        sets = np.zeros((count, *single.shape), bool)
        for members, trial in zip(sets, trials, strict=False):
            members[tuple(np.transpose(trial))] = True
        return np.stack(joint_shares(decoder, pairs, question, sets, memory))[:, : len(trials)]

    picked: list[Neuron] = []
    path: list[tuple[float, float]] = []
    while len(picked) < size and pool and not (path and min(path[-1]) >= share):
        found = shares([[*picked, neuron] for neuron in pool])
        gain = np.minimum(found, 1).sum(axis=0)
        best = int(np.flatnonzero(gain >= gain.max() - _TIE)[0])
        picked.append(pool.pop(best))
        path.append((float(found[0, best]), float(found[1, best])))
        on_step()
    if path and min(path[-1]) >= share:
        needed = _pruned(picked, shares, share)
        if needed != picked:
            picked = needed
            prefixes = [picked[: stop + 1] for stop in range(len(picked))]
            path = [(nie, tie) for nie, tie in shares(prefixes).T.tolist()]
    return JointSet(
        picked=picked,
        share_nie=[nie for nie, _ in path],
        share_tie=[tie for _, tie in path],
    )


def _pruned(
    picked: list[Neuron],
    shares: Callable[[list[list[Neuron]]], Float[np.ndarray, "2 trial"]],
    share: float,
) -> list[Neuron]:
    """The set without neurons that it does not need for its share."""
    while len(picked) > 1:
        without = [picked[:place] + picked[place + 1 :] for place in range(len(picked))]
        left = shares(without).min(axis=0)
        if left.max() < share:
            break
        picked = without[int(np.argmax(left))]
    return picked
