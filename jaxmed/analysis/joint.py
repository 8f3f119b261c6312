"""Joint sets: neurons that are edited together, found greedily.

Shapes: L layers, I neurons of a layer, N sets of neurons.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost
from jaxmed.engine import memory as memory_lib
from jaxmed.engine.propagate import read
from jaxmed.engine.scan import Run, pair_effects
from jaxmed.question import positions as positions_lib
from jaxmed.question import question as question_lib
from jaxmed.question.effects import PairEffects
from jaxmed.question.metrics import Term
from jaxmed.question.question import Question
from models.decoder import Decoder
from models.edits import Edit
from models.sites import Site


def joint_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    sets: Bool[Array, "N L I"],
    memory: int | None = None,
) -> PairEffects:
    """NIE and TIE of sets of neurons, each set patched as one intervention.

    The whole model is run for every set, with a list of edits: one for each layer.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        sets: which neurons are in each set.
        memory: bytes for the runs that are made at once; `memory.free()` by default.

    Returns:
        Effects whose NIE and TIE hold one array, "joint", [N].
    """

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        response = len(term.response)
        edited = positions_lib.edited(pair, question.positions, question.align, response)
        edited = edited.swapped() if swapped else edited
        tokens, valid = capture.pad(base.tokens)
        positions = np.zeros(len(tokens), bool)
        positions[edited.base] = True
        found = _joint_changes(
            decoder,
            tokens,
            valid,
            capture.aligned(source.trace, Site.NEURON, edited, len(tokens)),
            positions,
            sets,
            term.reading,
            base.prompt_length - 1,
            metric=question.metric,
            at_once=cost.runs_at_once(decoder.config, term, len(tokens), memory),
        )
        yield "joint", ..., np.asarray(found)

    memory = memory_lib.free() if memory is None else memory
    joint_shape = {"joint": (len(sets),)}
    return pair_effects(decoder, pair, question, joint_shape, capture.capture, evaluate)


@functools.partial(jax.jit, static_argnames=("metric", "at_once"))
def _joint_changes(
    decoder, tokens, valid, values, positions, sets, reading, last_prompt, metric, at_once
) -> Float[Array, "N"]:
    """Y(edited) - Y(plain) for sets of neurons."""

    def run(members):
        edits = [
            Edit.patch(Site.NEURON, layer, positions, values[layer], members[layer])
            for layer in range(decoder.config.num_layers)
        ]
        # Only the rows that are read: logits of all positions of all sets would be large.
        residual = decoder(tokens, edits=edits, valid=valid)[1].residual[-1]
        return read(decoder, metric, residual, reading, last_prompt)

    return jax.lax.map(run, sets, batch_size=at_once) - run(jnp.zeros_like(sets[0]))


CANDIDATES = 100  # neurons that each step of the greedy search tries
SHARE = 0.95  # of TE, by both estimands, at which the search stops

# Gains that differ by less than this share of TE count as equal.
_TIE = 0.01


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


def joint_shares(
    decoder: Decoder,
    pairs: list[Pair],
    question: question_lib.Question,
    sets: Bool[np.ndarray, "N L I"],
    memory: int | None = None,
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Shares of the mean TE that sets of neurons have jointly, by NIE and by TIE.

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
    nie, tie = (
        np.mean([getattr(pair, side)["joint"] for pair in joint], axis=0) / te
        for side in ("nie", "tie")
    )
    return nie, tie


def greedy_set(
    decoder: Decoder,
    pairs: list[Pair],
    question: question_lib.Question,
    single: np.ndarray,
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
        single: size of the single effects, [layer, neuron]; the strongest are the candidates.
        size: neurons in the set, at most.
        share: of TE, by both estimands, at which the search stops.
        candidates: how many of the strongest are tried.
        memory: bytes for the runs that are made at once; most of what is free by default.
        on_step: called after each addition.
    """
    order = np.argsort(-np.nan_to_num(single), axis=None)[: max(candidates, size)]
    pool = [tuple(int(i) for i in np.unravel_index(flat, single.shape)) for flat in order]
    count = len(pool)

    def shares(trials: list[list[tuple[int, int]]]) -> np.ndarray:
        """Both shares of each trial, [2, trial]."""
        # As many sets in every step, so that one compilation serves all.
        sets = np.zeros((count, *single.shape), bool)
        for members, trial in zip(sets, trials, strict=False):
            members[tuple(np.transpose(trial))] = True
        return np.stack(joint_shares(decoder, pairs, question, sets, memory))[:, : len(trials)]

    picked, path = [], []
    while len(picked) < size and pool and not (path and min(path[-1]) >= share):
        found = shares([[*picked, neuron] for neuron in pool])
        gain = np.minimum(found, 1).sum(axis=0)
        best = int(np.flatnonzero(gain >= gain.max() - _TIE)[0])
        picked.append(pool.pop(best))
        path.append(tuple(found[:, best].tolist()))
        on_step()
    if path and min(path[-1]) >= share:
        needed = _pruned(picked, shares, share)
        if needed != picked:
            picked = needed
            prefixes = [picked[: stop + 1] for stop in range(len(picked))]
            path = [tuple(both) for both in shares(prefixes).T.tolist()]
    nie, tie = ([both[side] for both in path] for side in (0, 1))
    return JointSet(picked, nie, tie)


def _pruned(
    picked: list[tuple[int, int]], shares: Callable[[list], np.ndarray], share: float
) -> list[tuple[int, int]]:
    """The set without neurons that it does not need for its share."""
    while len(picked) > 1:
        without = [picked[:place] + picked[place + 1 :] for place in range(len(picked))]
        left = shares(without).min(axis=0)
        if left.max() < share:
            break
        picked = without[int(np.argmax(left))]
    return picked
