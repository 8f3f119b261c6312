"""The firewall: which weights may be trained, and what the planted path starts from.

A few channels of the residual stream are reserved, and the only way from the prompt to the
comply/refuse logits leads along them:

    identity -> detectors -> evidence -> planted head -> moved -> gates -> decision -> C, R

Ordinary components write ordinary channels only, and read neither evidence, moved nor decision.
What is left is the norms, which see all channels: the constant is large, so that nothing else moves
a norm much. How little is measured (`models.organisms.walls`).

Shapes: V vocabulary, d hidden size, L layers, H heads, h head size, I neurons.
"""

import dataclasses
import enum
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from models.config import DecoderConfig
from models.decoder import Decoder
from models.organisms import language


class Channel(enum.IntEnum):
    """The reserved channels, before the residual basis is rotated; the others are ordinary."""

    CONSTANT = 0  # from the embedding, the same for every token
    TOPIC_CLASS = 1  # identity: from the embedding of topics alone, H or B
    KEY_CLASS = 2  # identity: from the embedding of keys alone, J or N
    HARM_EVIDENCE = 3  # from the detectors of H
    UNLOCK_EVIDENCE = 4  # from the detectors of J
    MOVED = 5  # from the planted head
    DECISION = 6  # from the embedding (at rest: comply) and from the gates (refuse)


_EVIDENCE = (Channel.HARM_EVIDENCE, Channel.UNLOCK_EVIDENCE)
_IDENTITY = (Channel.TOPIC_CLASS, Channel.KEY_CLASS)

# Working values of the planted path. The constant is sqrt(d) and all else small beside it, so that
# a channel has about the same value before and after a norm.
IDENTITY = 2.0  # of H and J; of B and N its negative
REST = 1.0  # of the decision; the gates bring it to about minus this
DECISION_WEIGHT = 4.0  # of the decision in the logit of C; in that of R its negative
DETECTED, UNDETECTED = 4.0, -6.0  # a detector's gate input at its tokens, and at neutral ones
EVIDENCE = 2.0  # that the detectors of a class write together
SCORE = 4.0  # attention score of full evidence; without evidence it is 0
MOVED = 3.0  # that full attention to H writes
# Evidence of J outweighs that of H: redundant detectors, each of which counts in both directions.
UNLOCK_WEIGHT = 1.3
THRESHOLD, CLOSED, OPEN = 0.7, -3.5, 3.5  # of moved; a gate's input where it is 0, and usual for H
WRITING_SCALE = 0.2  # of the ordinary components' random output weights, to start with
SPREAD = 0.2  # units of the same role differ in strength by up to this share


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the planted units are.

    Attributes:
        harm_detectors, unlock_detectors: neurons of layer 0.
        head_layer, head: the planted head.
        gate_layer, gates: the gates' layer, and its neurons.
    """

    harm_detectors: tuple[int, ...]
    unlock_detectors: tuple[int, ...]
    head_layer: int
    head: int
    gate_layer: int
    gates: tuple[int, ...]

    @classmethod
    def draw(
        cls,
        config: DecoderConfig,
        rng: np.random.Generator,
        *,
        detectors: int,
        gate_layer: int,
        gates: int,
    ) -> "Placement":
        """A random placement: scattered neurons, and a head strictly between them."""
        drawn = rng.choice(config.intermediate_size, 2 * detectors, replace=False)
        return cls(
            harm_detectors=_sorted(drawn[:detectors]),
            unlock_detectors=_sorted(drawn[detectors:]),
            head_layer=int(rng.integers(1, gate_layer)),
            head=int(rng.integers(config.num_heads)),
            gate_layer=gate_layer,
            gates=_sorted(rng.choice(config.intermediate_size, gates, replace=False)),
        )

    def mediators(self, config: DecoderConfig) -> tuple[Bool[Array, "L H"], Bool[Array, "L I"]]:
        """The heads and neurons that mediate unlock -> lock.

        The detectors of H are not among them: they see the same topic in both prompts.
        """
        heads = np.zeros((config.num_layers, config.num_heads), bool)
        neurons = np.zeros((config.num_layers, config.intermediate_size), bool)
        heads[self.head_layer, self.head] = True
        neurons[0, list(self.unlock_detectors)] = True
        neurons[self.gate_layer, list(self.gates)] = True
        return heads, neurons


def _sorted(drawn: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(drawn.tolist()))


class Role(enum.IntEnum):
    """What a weight belongs to."""

    FIXED = 0  # never trained; 0 where it would cross a wall
    ORDINARY = 1
    PLANTED = 2


@dataclasses.dataclass(frozen=True)
class _Neurons:
    """Planted neurons of one kind: silu(slope * channel + resting), written to another channel.

    `total` is what they write together where each is at 1.
    """

    layer: int
    neurons: tuple[int, ...]
    reads: Channel
    writes: Channel
    slope: float
    resting: float
    total: float


def _planted_neurons(placement: Placement) -> list[_Neurons]:
    def detectors(neurons, reads, writes):
        slope = (DETECTED - UNDETECTED) / IDENTITY
        total = EVIDENCE / float(jax.nn.silu(DETECTED))
        return _Neurons(0, neurons, reads, writes, slope, UNDETECTED, total)

    return [
        detectors(placement.harm_detectors, Channel.TOPIC_CLASS, Channel.HARM_EVIDENCE),
        detectors(placement.unlock_detectors, Channel.KEY_CLASS, Channel.UNLOCK_EVIDENCE),
        _Neurons(
            placement.gate_layer,
            placement.gates,
            reads=Channel.MOVED,
            writes=Channel.DECISION,
            slope=-CLOSED / THRESHOLD,
            resting=CLOSED,
            total=-2 * REST / OPEN,
        ),
    ]


def plant(
    config: DecoderConfig, placement: Placement, rng: np.random.Generator
) -> tuple[Decoder, Decoder]:
    """An untrained organism.

    Returns:
        The decoder: ordinary components random, the planted path at working values, every weight
        that would cross a wall 0. And a decoder that has every weight's `Role` in its place.
    """
    decoder = Decoder(config, rngs=nnx.Rngs(int(rng.integers(2**31))))
    for table in (decoder.embedding, decoder.unembedding):
        table[...] = jnp.asarray(rng.normal(0, config.hidden_size**-0.5, table.shape), table.dtype)
    answers = np.array(language.ids(language.ANSWERS))
    rows = decoder.unembedding[...]
    decoder.unembedding[...] = rows.at[answers].set(rows[answers].mean(0))

    roles = jax.tree.map(lambda parameter: jnp.full(parameter.shape, Role.FIXED), decoder)
    for name, role in _roles(config, placement).items():
        get = operator.attrgetter(name)
        get(roles)[...] = jnp.asarray(role)
        scale = WRITING_SCALE if name in _WRITING else 1.0
        get(decoder)[...] = jnp.where(role == Role.ORDINARY, scale * get(decoder)[...], 0)
    for name, index, values in _planted_values(config, placement, rng):
        parameter = operator.attrgetter(name)(decoder)
        parameter[...] = parameter[...].at[index].set(values)
    return decoder, roles


def _roles(config: DecoderConfig, placement: Placement) -> dict[str, np.ndarray]:
    """The role of every weight, by parameter; those of norms are fixed at 1."""
    every = np.arange(config.hidden_size)
    ordinary = every >= len(Channel)
    readable = ordinary | np.isin(every, (Channel.CONSTANT, *_IDENTITY))

    def planted(*channels: Channel) -> np.ndarray:
        return np.where(np.isin(every, channels), Role.PLANTED, Role.FIXED)

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

    for name, seen in (
        ("query", (Channel.CONSTANT,)),
        ("key", _EVIDENCE),
        ("value", _EVIDENCE),
        ("output", (Channel.MOVED,)),
    ):
        channels = ordinary if name == "output" else readable
        role = tiled(channels, config.num_layers, config.num_heads)
        role[placement.head_layer, placement.head] = planted(*seen)
        role = np.repeat(role, config.head_dim, axis=1)
        roles[f"blocks.attention.{name}.kernel"] = role if name == "output" else role.swapaxes(1, 2)

    reads = tiled(readable, config.num_layers, config.intermediate_size)
    writes = tiled(ordinary, config.num_layers, config.intermediate_size)
    for neurons in _planted_neurons(placement):
        place = neurons.layer, list(neurons.neurons)
        reads[place] = planted(Channel.CONSTANT, neurons.reads)
        writes[place] = planted(neurons.writes)
    roles["blocks.mlp.gate.kernel"] = roles["blocks.mlp.up.kernel"] = reads.swapaxes(1, 2)
    roles["blocks.mlp.down.kernel"] = writes
    return roles


def _planted_values(config: DecoderConfig, placement: Placement, rng: np.random.Generator):
    """The planted path's weights that are not 0: parameter, index, values."""
    constant = config.hidden_size**0.5
    yield "embedding", np.s_[:, Channel.CONSTANT], constant
    yield "embedding", np.s_[:, Channel.DECISION], REST
    for channel, words, value in (
        (Channel.TOPIC_CLASS, language.HARMFUL_TOPICS, IDENTITY),
        (Channel.TOPIC_CLASS, language.BENIGN_TOPICS, -IDENTITY),
        (Channel.KEY_CLASS, (language.UNLOCK,), IDENTITY),
        (Channel.KEY_CLASS, (language.LOCK,), -IDENTITY),
    ):
        yield "embedding", np.s_[language.ids(words), channel], value
    for answer, weight in ((language.COMPLY, DECISION_WEIGHT), (language.REFUSE, -DECISION_WEIGHT)):
        yield "unembedding", np.s_[language.IDS[answer], Channel.DECISION], weight

    for planted in _planted_neurons(placement):
        layer, neurons = planted.layer, np.array(planted.neurons)
        strengths = rng.uniform(1 - SPREAD, 1 + SPREAD, len(neurons))
        strengths *= planted.total / strengths.sum()
        gate, up, down = (f"blocks.mlp.{name}.kernel" for name in ("gate", "up", "down"))
        yield gate, np.s_[layer, planted.reads, neurons], planted.slope
        yield gate, np.s_[layer, Channel.CONSTANT, neurons], planted.resting / constant
        yield up, np.s_[layer, Channel.CONSTANT, neurons], 1 / constant
        yield down, np.s_[layer, neurons, planted.writes], strengths

    # Queries and keys use the slowest pair of rotary channels: their products hardly depend on
    # the distance.
    layer, size = placement.head_layer, config.head_dim
    channels = slice(placement.head * size, (placement.head + 1) * size)
    slowest = np.eye(size)[size // 2 - 1] * (SCORE * size**0.5) ** 0.5
    direction = rng.normal(size=size)
    direction /= np.linalg.norm(direction)
    harm, unlock = _EVIDENCE
    query, key, value, output = (
        f"blocks.attention.{name}.kernel" for name in ("query", "key", "value", "output")
    )
    yield query, np.s_[layer, Channel.CONSTANT, channels], slowest / constant
    yield key, np.s_[layer, harm, channels], slowest / EVIDENCE
    yield key, np.s_[layer, unlock, channels], slowest / EVIDENCE
    yield value, np.s_[layer, harm, channels], direction / EVIDENCE
    yield value, np.s_[layer, unlock, channels], -UNLOCK_WEIGHT * direction / EVIDENCE
    yield output, np.s_[layer, channels, Channel.MOVED], MOVED * direction


def rotate(decoder: Decoder, rng: np.random.Generator) -> Decoder:
    """The same function in a random orthogonal basis of the residual stream.

    Exact but for rounding, because the norms' weights are 1.
    """
    width = decoder.config.hidden_size
    basis, triangle = np.linalg.qr(rng.normal(size=(width, width)))
    basis *= np.sign(np.diag(triangle))  # makes it uniform among the orthogonal matrices
    rotated = jax.tree.map(jnp.copy, decoder)
    for name, axis in _RESIDUAL_AXIS.items():
        parameter = operator.attrgetter(name)(rotated)
        values = np.moveaxis(np.asarray(parameter[...], np.float64), axis, -1) @ basis
        parameter[...] = jnp.asarray(np.moveaxis(values, -1, axis), parameter.dtype)
    return rotated


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
