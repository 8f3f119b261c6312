"""Measures the walls: what everything but the true mediators does to the decision.

By the plain definition of an effect: the whole model is run with explicit edits, at all positions
of the prompt. Shapes: L layers, H heads, I neurons, N pairs, S sets of components, T positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Edit
from models.organisms import language
from models.organisms.language import Prompt
from models.sites import Site

# Heads [S, L, H] and neurons [S, L, I] of each set.
Sets = tuple[Bool[Array, "S L H"], Bool[Array, "S L I"]]


@dataclasses.dataclass(frozen=True)
class Effects:
    """Effects of sets of components on logit C - logit R.

    Attributes:
        te: of every pair, [N].
        nie, tie: of every pair and set, [N, S].
    """

    te: Float[np.ndarray, "N"]
    nie: Float[np.ndarray, "N S"]
    tie: Float[np.ndarray, "N S"]


def sets_of(config: DecoderConfig, members: list[tuple[list[list[int]], list[list[int]]]]) -> Sets:
    """The masks of sets, each given by its heads and its neurons as [layer, unit]."""
    heads = np.zeros((len(members), config.num_layers, config.num_heads), bool)
    neurons = np.zeros((len(members), config.num_layers, config.intermediate_size), bool)
    for number, both in enumerate(members):
        for mask, units in zip((heads, neurons), both, strict=True):
            for layer, unit in units:
                mask[number, layer, unit] = True
    return heads, neurons


def ordinary_sets(heads: Bool[Array, "L H"], neurons: Bool[Array, "L I"]) -> Sets:
    """All that are no mediators: each layer's heads, each layer's neurons, and all of them."""
    layers = len(heads)
    chosen = np.eye(2 * layers, dtype=bool).reshape(2 * layers, 2, layers)
    chosen = np.concatenate([chosen, np.ones((1, 2, layers), bool)])
    return chosen[:, 0, :, None] & ~heads, chosen[:, 1, :, None] & ~neurons


def effects(decoder: Decoder, pairs: list[tuple[Prompt, Prompt]], sets: Sets) -> Effects:
    """The effects of sets of components, for every pair of a base and a source prompt."""
    found = [
        _effects(
            decoder,
            *(language.padded(prompt.tokens, language.LONGEST_PROMPT) for prompt in pair),
            len(pair[0].tokens),
            sets,
        )
        for pair in pairs
    ]
    return Effects(*(np.stack(values) for values in zip(*found, strict=True)))


@jax.jit
def _effects(
    decoder: Decoder,
    base: Int[Array, "T"],
    source: Int[Array, "T"],
    length: Int[Array, ""],
    sets: Sets,
) -> tuple[Float[Array, ""], Float[Array, "S"], Float[Array, "S"]]:
    comply, refuse = language.ids(language.ANSWERS)
    positions = jnp.arange(len(base)) < length

    def run(tokens, edits=()):
        logits, trace = decoder(tokens, edits=list(edits))
        return logits[length - 1, comply] - logits[length - 1, refuse], trace

    def changes(tokens, plain, values):
        def effect(members):
            heads, neurons = members
            edits = [
                Edit.patch(site, layer, positions, value[layer], units[layer])
                for site, value, units in (
                    (Site.HEAD, values.head, heads),
                    (Site.NEURON, values.neuron, neurons),
                )
                for layer in range(decoder.config.num_layers)
            ]
            return run(tokens, edits)[0] - plain

        return jax.lax.map(effect, sets)

    (y_base, base_trace), (y_source, source_trace) = run(base), run(source)
    nie = changes(base, y_base, source_trace)
    tie = -changes(source, y_source, base_trace)
    return y_source - y_base, nie, tie
