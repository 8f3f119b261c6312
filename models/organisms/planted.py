"""The firewall: which weights may be trained, and what the planted path starts from.

A few channels of the residual stream are reserved, and the only way from the prompt to the
comply/refuse logits leads along them:

    identity -> detectors -> evidence -> planted head -> moved -> gates -> decision -> C, R

or from the planted head to the decision itself. Ordinary components write ordinary channels only,
and read neither evidence, moved nor decision. Decoys read what planted units read, but write a
channel that nothing reads. What is left is the norms, which see all channels: the constant is
large, so that nothing else moves a norm much. How little is measured (`models.organisms.walls`).

Shapes: V vocabulary, d hidden size, L layers, H heads, h head size, I neurons.
"""

import dataclasses
import enum
import functools
import operator
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from models.config import DecoderConfig
from models.decoder import Decoder
from models.organisms import language
from models.organisms.recipes import Recipe


class Channel(enum.IntEnum):
    """The reserved channels, before the residual basis is rotated; the others are ordinary."""

    CONSTANT = 0  # from the embedding, the same for every token
    TOPIC_CLASS = 1  # identity: from the embedding of topics alone, H or B
    KEY_CLASS = 2  # identity: from the embedding of keys alone, J or N
    TURN = 3  # identity: from the embedding of <assistant> alone, where the decision is made
    HARM_EVIDENCE = 4  # from the detectors of H
    UNLOCK_EVIDENCE = 5  # from the detectors of J
    MOVED = 6  # from the planted head
    DECISION = 7  # from the embedding of <assistant>, and from the gates or the planted head
    DECOY = 8  # from the decoys


_EVIDENCE = (Channel.HARM_EVIDENCE, Channel.UNLOCK_EVIDENCE)
# What ordinary components may read beside ordinary channels.
OPEN = (Channel.CONSTANT, Channel.TOPIC_CLASS, Channel.KEY_CLASS)

# Working values of the planted path. The constant is sqrt(d) and all else small beside it, so that
# a channel has about the same value before and after a norm.
IDENTITY = 2.0  # of H and J; of B and N its negative
DETECTED, UNDETECTED = 4.0, -6.0  # a detector's gate input at its tokens, and at neutral ones
EVIDENCE = 2.0  # that the detectors of a class write together
SCORE = 5.0  # attention score of full evidence; without evidence it is 0
MOVED = 3.0  # that full attention to H writes
UNLOCK_WEIGHT = 1.3  # of evidence of J beside that of H: both together move less than nothing
USUAL = 2.0  # what is moved where the answer is R; elsewhere it is 0 or less
STEEPNESS = 8.0  # of a gate's input, in what is moved
LOUDNESS = 3.0  # of a decoy, times the unit that it copies
MURMUR = 0.5  # that decoys of a kind write together
WRITING_SCALE = 0.2  # of the ordinary components' random output weights, to start with
SPREAD = 0.2  # units of the same role differ in strength by up to this share


@dataclasses.dataclass(frozen=True)
class Neurons:
    """Planted neurons of one kind: silu(slope * what they read + resting) * what opens them.

    Attributes:
        role: what they do, for `truth.json`.
        layer, units: where they are.
        reads, writes: their channels.
        slope, resting: of the gate's input.
        usual: the gate's input where they act.
        written: what they write together where they act.
        opened_by: a channel that is 1 where they act (CONSTANT: everywhere).
        trained: whether training may change them.
    """

    role: str
    layer: int
    units: tuple[int, ...]
    reads: Channel
    writes: Channel
    slope: float
    resting: float
    usual: float
    written: float
    opened_by: Channel = Channel.CONSTANT
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Head:
    """A planted head: from <assistant> it attends to evidence, for H and against J.

    Attributes:
        role: what it does, for `truth.json`.
        layer, unit: where it is.
        writes: what it writes to which channel where it attends to H alone.
        trained: whether training may change it.
    """

    role: str
    layer: int
    unit: int
    writes: dict[Channel, float]
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Where the planted units are, and what they do; nothing is planted in the null organism.

    Attributes:
        neurons, heads: the planted units.
        rest: the decision that <assistant> starts with.
        weight: of the decision in the logit of C; in that of R its negative.
    """

    neurons: tuple[Neurons, ...] = ()
    heads: tuple[Head, ...] = ()
    rest: float = 0.0
    weight: float = 0.0

    @classmethod
    def draw(cls, recipe: Recipe, rng: np.random.Generator) -> "Blueprint":
        """A random placement: scattered neurons, and the head between detectors and gates."""
        if recipe.is_null:
            return cls()
        gate_layer = int(rng.choice(recipe.gate_layers))
        kinds = [
            _detectors("harm_detectors", Channel.TOPIC_CLASS, Channel.HARM_EVIDENCE),
            _detectors("unlock_detectors", Channel.KEY_CLASS, Channel.UNLOCK_EVIDENCE),
            _gates(gate_layer, recipe),
        ]
        sizes = (recipe.detectors, recipe.detectors, recipe.gates)
        free = {layer: rng.permutation(recipe.intermediate_size) for layer in (0, gate_layer)}

        def settle(kind: Neurons, size: int) -> Neurons:
            taken, free[kind.layer] = np.split(free[kind.layer], [size])
            return dataclasses.replace(kind, units=tuple(sorted(taken.tolist())))

        neurons = [settle(kind, size) for kind, size in zip(kinds, sizes, strict=True) if size]
        last = gate_layer if recipe.gates else recipe.num_layers
        places = [(layer, unit) for layer in range(1, last) for unit in range(recipe.num_heads)]
        mover, decoy = (places[i] for i in rng.choice(len(places), 2, replace=False))
        heads = [Head("mover", layer=mover[0], unit=mover[1], writes=_moved(recipe))]
        if recipe.decoys:
            neurons += [settle(_decoy(kind), recipe.decoys) for kind in kinds]
            writes = {Channel.DECOY: MURMUR}
            heads.append(
                Head("decoy_mover", layer=decoy[0], unit=decoy[1], writes=writes, trained=False)
            )
        return cls(tuple(neurons), tuple(heads), recipe.gating.rest, recipe.gating.weight)

    @property
    def roles(self) -> dict[str, list[list[int]]]:
        """The [layer, unit] of the planted units of each role."""
        units = {kind.role: [[kind.layer, unit] for unit in kind.units] for kind in self.neurons}
        return units | {head.role: [[head.layer, head.unit]] for head in self.heads}


def _detectors(role: str, reads: Channel, writes: Channel) -> Neurons:
    slope = (DETECTED - UNDETECTED) / IDENTITY
    return Neurons(
        role=role,
        layer=0,
        units=(),
        reads=reads,
        writes=writes,
        slope=slope,
        resting=UNDETECTED,
        usual=DETECTED,
        written=EVIDENCE,
    )


def _gates(layer: int, recipe: Recipe) -> Neurons:
    """Gates that open where much is moved, to refuse, or where little is, to comply."""
    gating, refusing = recipe.gating, recipe.gating.written < 0
    slope = STEEPNESS if refusing else -STEEPNESS
    resting = -slope * gating.threshold
    return Neurons(
        role="gates",
        layer=layer,
        units=(),
        reads=Channel.MOVED,
        writes=Channel.DECISION,
        slope=slope,
        resting=resting,
        usual=resting + slope * (USUAL if refusing else 0),
        written=(1 - recipe.direct) * gating.written,
        opened_by=Channel.TURN,
    )


def _decoy(kind: Neurons) -> Neurons:
    """Neurons that do the same, louder, and to no effect."""
    return dataclasses.replace(
        kind,
        role=f"decoy_{kind.role}",
        writes=Channel.DECOY,
        slope=LOUDNESS * kind.slope,
        resting=LOUDNESS * kind.resting,
        usual=LOUDNESS * kind.usual,
        written=MURMUR,
        trained=False,
    )


def _moved(recipe: Recipe) -> dict[Channel, float]:
    """What the planted head writes where it attends to H alone."""
    direct = {Channel.DECISION: recipe.direct * recipe.gating.written * MOVED / USUAL}
    return ({Channel.MOVED: MOVED} if recipe.gates else {}) | (direct if recipe.direct else {})


class Role(enum.IntEnum):
    """What a weight belongs to."""

    FIXED = 0  # never trained; 0 where it would cross a wall
    ORDINARY = 1
    PLANTED = 2


def plant(
    config: DecoderConfig, blueprint: Blueprint, rng: np.random.Generator
) -> tuple[Decoder, Decoder]:
    """An untrained organism.

    Returns:
        The decoder: ordinary components random, the planted path at working values, every weight
        that would cross a wall 0. And a decoder that has every weight's `Role` in its place.
    """
    decoder = _random(config, int(rng.integers(2**31)))
    # On the host: each small step would be a program to compile.
    roles = {name: role.astype(np.int32) for name, role in _roles(config, blueprint).items()}
    values = {name: np.array(operator.attrgetter(name)(decoder)[...]) for name in roles}
    for table in (values["embedding"], values["unembedding"]):
        table[...] = rng.normal(0, config.hidden_size**-0.5, table.shape)
    rows, answers = values["unembedding"], np.array(language.ids(language.ANSWERS))
    rows[answers] = rows[answers].mean(0)
    for name, role in roles.items():
        scale = WRITING_SCALE if name in _WRITING else 1.0
        values[name] = np.where(role == Role.ORDINARY, scale * values[name], 0)
    for name, index, planted in _planted_values(config, blueprint, rng):
        values[name][index] = planted
    fixed = jax.tree.map(
        lambda weight: jax.device_put(np.full(weight.shape, Role.FIXED, np.int32)), decoder
    )
    return _with_weights(decoder, values), _with_weights(fixed, roles)


@functools.partial(jax.jit, static_argnames=("config",))
def _random(config: DecoderConfig, seed: Int[ArrayLike, ""]) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(jax.random.key(seed)))


def _with_weights(decoder: Decoder, values: Mapping[str, np.ndarray]) -> Decoder:
    """A copy that has these parameters, by name, and shares the others."""
    copy = nnx.clone(decoder)
    for name, value in values.items():
        operator.attrgetter(name)(copy)[...] = jax.device_put(value)
    return copy


def _roles(config: DecoderConfig, blueprint: Blueprint) -> dict[str, np.ndarray]:
    """The role of every weight, by parameter; those of norms are fixed at 1."""
    every = np.arange(config.hidden_size)
    ordinary = every >= len(Channel)
    readable = ordinary | np.isin(every, OPEN)

    def of_planted(unit: Neurons | Head, *channels: Channel) -> np.ndarray:
        role = Role.PLANTED if unit.trained else Role.FIXED
        return np.where(np.isin(every, channels), role, Role.FIXED)

    def tiled(channels, *shape: int) -> np.ndarray:
        return np.tile(np.where(channels, Role.ORDINARY, Role.FIXED), (*shape, 1))

    roles = {
        "embedding": tiled(ordinary, config.vocab_size),
        "unembedding": tiled(readable, config.vocab_size),
    }
    for words, channel in (
        (language.TOPICS, Channel.TOPIC_CLASS),
        (language.KEYS, Channel.KEY_CLASS),
    ):
        roles["embedding"][language.ids(words), channel] = Role.PLANTED

    for name in ("query", "key", "value", "output"):
        channels = ordinary if name == "output" else readable
        role = tiled(channels, config.num_layers, config.num_heads)
        for head in blueprint.heads:
            seen = {"query": (Channel.TURN,), "output": tuple(head.writes)}.get(name, _EVIDENCE)
            role[head.layer, head.unit] = of_planted(head, *seen)
        role = np.repeat(role, config.head_dim, axis=1)
        roles[f"blocks.attention.{name}.kernel"] = role if name == "output" else role.swapaxes(1, 2)

    for name in ("gate", "up", "down"):
        channels = ordinary if name == "down" else readable
        role = tiled(channels, config.num_layers, config.intermediate_size)
        for kind in blueprint.neurons:
            seen = {
                "gate": (Channel.CONSTANT, kind.reads),
                "up": (kind.opened_by,),
                "down": (kind.writes,),
            }
            role[kind.layer, list(kind.units)] = of_planted(kind, *seen[name])
        roles[f"blocks.mlp.{name}.kernel"] = role if name == "down" else role.swapaxes(1, 2)
    return roles


def _planted_values(config: DecoderConfig, blueprint: Blueprint, rng: np.random.Generator):
    """The planted path's weights that are not 0: parameter, index, values."""
    constant = config.hidden_size**0.5
    turn = language.ids((language.ASSISTANT,))
    yield "embedding", np.s_[:, Channel.CONSTANT], constant
    yield "embedding", np.s_[turn, Channel.TURN], 1.0
    yield "embedding", np.s_[turn, Channel.DECISION], blueprint.rest
    for channel, words, value in (
        (Channel.TOPIC_CLASS, language.HARMFUL_TOPICS, IDENTITY),
        (Channel.TOPIC_CLASS, language.BENIGN_TOPICS, -IDENTITY),
        (Channel.KEY_CLASS, (language.UNLOCK,), IDENTITY),
        (Channel.KEY_CLASS, (language.LOCK,), -IDENTITY),
    ):
        yield "embedding", np.s_[language.ids(words), channel], value
    for answer, sign in ((language.COMPLY, 1), (language.REFUSE, -1)):
        index = np.s_[language.IDS[answer], Channel.DECISION]
        yield "unembedding", index, sign * blueprint.weight
    for kind in blueprint.neurons:
        yield from _neuron_values(kind, constant, rng)
    for head in blueprint.heads:
        yield from _head_values(head, config.head_dim, rng)


def _neuron_values(kind: Neurons, constant: float, rng: np.random.Generator):
    layer, units = kind.layer, np.array(kind.units)
    strengths = rng.uniform(1 - SPREAD, 1 + SPREAD, len(units))
    strengths *= kind.written / float(jax.nn.silu(kind.usual)) / strengths.sum()
    opened_by = constant if kind.opened_by == Channel.CONSTANT else 1.0
    gate, up, down = (f"blocks.mlp.{name}.kernel" for name in ("gate", "up", "down"))
    yield gate, np.s_[layer, kind.reads, units], kind.slope
    yield gate, np.s_[layer, Channel.CONSTANT, units], kind.resting / constant
    yield up, np.s_[layer, kind.opened_by, units], 1 / opened_by
    yield down, np.s_[layer, units, kind.writes], strengths


def _head_values(head: Head, size: int, rng: np.random.Generator):
    # Queries and keys use the slowest pair of rotary channels: their products hardly depend on
    # the distance.
    layer, channels = head.layer, slice(head.unit * size, (head.unit + 1) * size)
    slowest = np.eye(size)[size // 2 - 1] * (SCORE * size**0.5) ** 0.5
    direction = rng.normal(size=size)
    direction /= np.linalg.norm(direction)
    harm, unlock = _EVIDENCE
    query, key, value, output = (
        f"blocks.attention.{name}.kernel" for name in ("query", "key", "value", "output")
    )
    yield query, np.s_[layer, Channel.TURN, channels], slowest
    yield key, np.s_[layer, harm, channels], slowest / EVIDENCE
    yield key, np.s_[layer, unlock, channels], slowest / EVIDENCE
    yield value, np.s_[layer, harm, channels], direction / EVIDENCE
    yield value, np.s_[layer, unlock, channels], -UNLOCK_WEIGHT * direction / EVIDENCE
    for channel, written in head.writes.items():
        yield output, np.s_[layer, channels, channel], written * direction


def rotate(decoder: Decoder, rng: np.random.Generator) -> Decoder:
    """The same function in a random orthogonal basis of the residual stream.

    Exact but for rounding, because the norms' weights are 1.
    """
    width = decoder.config.hidden_size
    basis, triangle = np.linalg.qr(rng.normal(size=(width, width)))
    basis *= np.sign(np.diag(triangle))  # makes it uniform among the orthogonal matrices
    rotated = {}
    for name, axis in _RESIDUAL_AXIS.items():
        weight = np.asarray(operator.attrgetter(name)(decoder)[...])
        values = np.moveaxis(weight.astype(np.float64), axis, -1) @ basis
        rotated[name] = np.moveaxis(values, -1, axis).astype(weight.dtype)
    return _with_weights(decoder, rotated)


_WRITING = ("blocks.attention.output.kernel", "blocks.mlp.down.kernel")

# The axis of each parameter that lies along the residual stream.
_RESIDUAL_AXIS = {
    "embedding": -1,
    "unembedding": -1,
    "blocks.attention.query.kernel": -2,
    "blocks.attention.key.kernel": -2,
    "blocks.attention.value.kernel": -2,
    "blocks.attention.output.kernel": -1,
    "blocks.mlp.gate.kernel": -2,
    "blocks.mlp.up.kernel": -2,
    "blocks.mlp.down.kernel": -1,
}
