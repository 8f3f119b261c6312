"""Measures the walls: what everything but the true mediators does to the decision.

By the plain definition of an effect: the whole model is run with explicit edits, at all positions
of the prompt. Shapes: L layers, H heads, I neurons, N pairs, S sets of components, T positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.decoder import Decoder
from models.edits import Edit, Site
from models.organisms import language
from models.organisms.language import Prompt

# Heads [S, L, H] and neurons [S, L, I] of each set.
Sets = tuple[Bool[Array, "S L H"], Bool[Array, "S L I"]]


def ordinary_sets(heads: Bool[Array, "L H"], neurons: Bool[Array, "L I"]) -> Sets:
    """All that are no mediators: each layer's heads, each layer's neurons, and all of them."""
    layers = len(heads)
    chosen = np.eye(2 * layers, dtype=bool).reshape(2 * layers, 2, layers)
    chosen = np.concatenate([chosen, np.ones((1, 2, layers), bool)])
    return chosen[:, 0, :, None] & ~heads, chosen[:, 1, :, None] & ~neurons


def shares(decoder: Decoder, bases: list[Prompt], sets: Sets) -> Float[np.ndarray, "N 2 S"]:
    """NIE / TE and TIE / TE of sets of components under unlock -> lock, for every base prompt."""
    return np.stack(
        [
            np.asarray(
                _shares(
                    decoder,
                    language.padded(prompt.tokens, language.LONGEST_PROMPT),
                    language.padded(prompt.with_key(language.LOCK).tokens, language.LONGEST_PROMPT),
                    len(prompt.tokens),
                    sets,
                )
            )
            for prompt in bases
        ]
    )


@jax.jit
def _shares(
    decoder: Decoder,
    base: Int[Array, "T"],
    source: Int[Array, "T"],
    length: Int[Array, ""],
    sets: Sets,
) -> Float[Array, "2 S"]:
    comply, refuse = language.ids(language.ANSWERS)
    positions = jnp.arange(len(base)) < length

    def run(tokens, edits=()):
        logits, trace = decoder(tokens, edits=list(edits))
        return logits[length - 1, comply] - logits[length - 1, refuse], trace

    def effects(tokens, plain, values):
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
    nie = effects(base, y_base, source_trace)
    tie = -effects(source, y_source, base_trace)
    return jnp.stack([nie, tie]) / (y_source - y_base)
