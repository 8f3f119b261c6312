"""Measures the walls: whether anything but the true mediators moves the decision.

The whole model is run on one prompt, with the values that some heads or neurons have on another
prompt put in their place, at all positions of the prompt. What stands behind a wall must leave
logit C - logit R where it is, and what carries the decision must move it as far as the prompt does.

Shapes: L layers, H heads, I neurons, N pairs, S sets of components, T positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.config import DecoderConfig
from models.decoder import Decoder, Trace
from models.edits import Edit
from models.organisms import language
from models.organisms.language import DrawnPrompt
from models.shapes import AnyArray
from models.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sets:
    """Sets of components.

    Attributes:
        heads, neurons: which are in each set, [S, L, H] and [S, L, I].
    """

    heads: Bool[AnyArray, "*S L H"]
    neurons: Bool[AnyArray, "*S L I"]

    def __len__(self) -> int:
        return len(self.heads)

    def __add__(self, others: "Sets") -> "Sets":
        """These sets, and then the others."""
        return Sets(
            np.concatenate([self.heads, others.heads]),
            np.concatenate([self.neurons, others.neurons]),
        )


@dataclasses.dataclass(frozen=True)
class Moves:
    """How far logit C - logit R moves in one run of every pair.

    Attributes:
        whole: to where it is in the pair's other run, [N].
        by_set: where a set has the values of the other run, [N, S].
    """

    whole: Float[np.ndarray, "N"]
    by_set: Float[np.ndarray, "N S"]

    @property
    def shares(self) -> Float[np.ndarray, "S"]:
        """Of the whole way, how much each set moves it, both as means over pairs."""
        return self.by_set.mean(axis=0) / self.whole.mean()


def sets_of(config: DecoderConfig, members: list[tuple[list[list[int]], list[list[int]]]]) -> Sets:
    """The masks of sets, each given by its heads and its neurons as [layer, unit]."""
    heads = np.zeros((len(members), config.num_layers, config.num_heads), bool)
    neurons = np.zeros((len(members), config.num_layers, config.intermediate_size), bool)
    for number, both in enumerate(members):
        for mask, units in zip((heads, neurons), both, strict=True):
            for layer, unit in units:
                mask[number, layer, unit] = True
    return Sets(heads, neurons)


def ordinary_sets(heads: Bool[AnyArray, "L H"], neurons: Bool[AnyArray, "L I"]) -> Sets:
    """All that are no mediators: each layer's heads, each layer's neurons, and all of them."""
    layers = len(heads)
    chosen = np.eye(2 * layers, dtype=bool).reshape(2 * layers, 2, layers)
    chosen = np.concatenate([chosen, np.ones((1, 2, layers), bool)])
    return Sets(chosen[:, 0, :, None] & ~heads, chosen[:, 1, :, None] & ~neurons)


def measure(
    decoder: Decoder, pairs: list[tuple[DrawnPrompt, DrawnPrompt]], sets: Sets
) -> tuple[Moves, Moves]:
    """How far the sets move the decision: in the base runs of pairs, and in their source runs."""
    found = [
        _moves(
            decoder,
            language.padded(base.tokens, language.LONGEST_PROMPT),
            language.padded(source.tokens, language.LONGEST_PROMPT),
            len(base.tokens),
            sets,
        )
        for base, source in pairs
    ]
    base, source = (
        Moves(
            whole=np.stack([whole for whole, _ in of_run]),
            by_set=np.stack([by_set for _, by_set in of_run]),
        )
        for of_run in zip(*found, strict=True)
    )
    return base, source


@jax.jit
def _moves(
    decoder: Decoder,
    base: Int[AnyArray, "T"],
    source: Int[AnyArray, "T"],
    length: Int[Array, ""] | int,
    sets: Sets,
) -> list[tuple[Float[Array, ""], Float[Array, "S"]]]:
    """Of one pair: how far the decision is moved, whole and by each set, in either run."""
    comply, refuse = language.ids(language.ANSWERS)
    positions = jnp.arange(len(base)) < length

    def run(tokens, edits: list[Edit]) -> tuple[Float[Array, ""], Trace]:
        logits, trace = decoder(tokens, edits=edits)
        return logits[length - 1, comply] - logits[length - 1, refuse], trace

    def patches(values: Trace, members: Sets) -> list[Edit]:
        return [
            Edit.patch(site, layer, positions, value[layer], units[layer])
            for site, value, units in (
                (Site.HEAD, values[Site.HEAD], members.heads),
                (Site.NEURON, values[Site.NEURON], members.neurons),
            )
            for layer in range(decoder.config.num_layers)
        ]

    def by_set(tokens, own, values):
        return jax.lax.map(lambda members: run(tokens, patches(values, members))[0] - own, sets)

    (at_base, of_base), (at_source, of_source) = run(base, []), run(source, [])
    return [
        (at_source - at_base, by_set(base, at_base, of_source)),
        (at_base - at_source, by_set(source, at_source, of_base)),
    ]
