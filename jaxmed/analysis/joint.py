"""Joint sets: neurons that are edited together, found greedily.

Shapes: L layers, I neurons of a layer, N sets of neurons.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost, plan, propagate, shard
from jaxmed.engine.cost import Devices
from jaxmed.engine.memory import free as free_memory
from jaxmed.engine.plan import ALL_POSITIONS, Units, Work
from jaxmed.engine.scan import Run, pair_effects
from jaxmed.question.effects import PairEffects
from jaxmed.question.joined import Joined
from jaxmed.question.question import Question
from models.config import DecoderConfig
from models.decoder import Decoder
from models.shapes import AnyArray
from models.sites import Site


def joint_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    sets: Bool[AnyArray, "N L I"],
    memory: int | None = None,
) -> PairEffects:
    """NIE and TIE of sets of neurons, each set patched as one intervention.

    A set's neurons have the values of the other run, whatever its earlier ones do: so their changes
    are given, and those of all others carried (`propagate.Forced`).

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions; its group size must be 1.
        sets: which neurons are in each set.
        memory: bytes for the runs that are made at once; most of what is free by default.

    Returns:
        Effects whose NIE and TIE hold one array, "joint", [N].
    """
    chosen = {"neuron": np.any(sets, axis=0)}

    def evaluate(base: Run, source: Run, term: Joined, swapped: bool):
        work = plan.plan(decoder.config, pair, term, question, ["neuron"], swapped, chosen)
        # None where nothing that is edited is before what is read.
        if work:
            (work,) = work
            found = _joint_changes(decoder, base, source, work, term, question, sets, budget)
            yield "joint", ..., found

    budget = free_memory() if memory is None else memory
    joint_shape = {"joint": (len(sets),)}
    return pair_effects(decoder, pair, question, joint_shape, evaluate)


def operations(config: DecoderConfig, pair: Pair, question: Question) -> float:
    """Floating-point operations of both estimands of a set, at most: of one that has neurons of the
    first layer."""
    total = 0.0
    for term, work in cost.works(config, pair, question, ["neuron"]):
        first = plan.reader(config, np.zeros(len(work.units), np.int32))
        total += float(np.max(cost.needed_operations(config, work, term, first)))
    return total


def _joint_changes(
    decoder: Decoder,
    base: Run,
    source: Run,
    work: Work,
    term: Joined,
    question: Question,
    sets: Bool[AnyArray, "N L I"],
    memory: int,
) -> Float[np.ndarray, "N"]:
    """dY of sets of neurons, where the work is that of their neurons alone."""
    config = decoder.config
    change = capture.edited_difference(
        base.trace, source.trace, Site.NEURON, work.edited, work.start, work.size
    )
    frame = capture.frame(
        decoder, base.trace, work.start, work.size, capture.prefix_length(work.start)
    )
    edited = np.isin(work.start + np.arange(work.size), work.edited.base)
    # A set is a unit of the first layer that it has neurons in; without any it is padding.
    filled = np.any(sets, axis=2)
    first = np.where(np.any(filled, axis=1), np.argmax(filled, axis=1), config.num_layers)
    order = np.argsort(first, kind="stable").astype(np.int32)
    units = Units(first[order].astype(np.int32), order, np.full(len(sets), ALL_POSITIONS))
    work = dataclasses.replace(work, units=units)
    sizes = cost.batching(
        *(config, decoder.dtype, work, term, memory, jax.default_backend()),
        devices=Devices.of(decoder.mesh),
        beside=sets[0].size,  # which neurons are in it, a byte each
    )
    blocks = propagate.blocks_to_carry(config, work.size, term.reading)
    found = []
    for part in units.chunks(sizes.batches, sizes.rows, padding_layer=config.num_layers):
        stages = plan.reader(config, part.layers)
        nothing = np.zeros((sizes.batches, work.size, sizes.rows, config.hidden_size), change.dtype)
        forced = propagate.Forced(change, edited, sets[part.units])
        carried = propagate.carry(
            decoder,
            frame,
            stages,
            shard.spread(decoder, nothing, axis=-2),
            blocks,
            forced,
        )
        found.append(
            propagate.read_changes(
                decoder,
                frame,
                stages,
                carried,
                term.reading,
                base.prompt_length - 1 - work.start,
                question.metric,
                term.whole_vocabulary,
                forced,
            )
        )
    y = np.zeros(len(sets))
    y[order] = np.concatenate([np.asarray(each).reshape(-1) for each in found])[: len(sets)]
    return y


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
