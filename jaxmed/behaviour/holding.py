"""Runs of a batch in which units are held: what generation and likelihood share.

Shapes are those of one sequence, named in `models.shapes`; B are the rows of a batch, L the layers.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxmed.engine import shard
from models import edits
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold
from models.shapes import AnyArray, Residual, Stacked, Tokens, Valid
from models.sites import Site


def fitted(config: DecoderConfig, holds: Sequence[Hold], prompts: int) -> list[Hold]:
    """The holds with scale and shift of the site's full shape, so that all compile to one program.
    Shifts of each prompt's own stay on the host: a batch has those of its prompts.

    Raises:
        ValueError: a hold does not fit the model or the number of prompts.
    """
    heads = config.num_heads, config.head_dim
    inside = {Site.HEAD: heads, Site.NEURON: (config.intermediate_size,)}
    found = []
    for hold in holds:
        if hold.site == Site.EMBEDDING:
            raise ValueError("a hold is on a site of the layers, not on embedding")
        shape = (config.num_layers, *inside.get(hold.site, (config.hidden_size,)))
        own = (prompts, *shape) if hold.of_each_prompt else shape
        parts = []
        for name, part, whole in (("scale", hold.scale, shape), ("shift", hold.shift, own)):
            if part.ndim != len(whole) or any(
                size not in (1, full) for size, full in zip(part.shape, whole, strict=True)
            ):
                raise ValueError(
                    f"the hold of {hold.site} has a {name} of {part.shape}; it must be {whole}, or "
                    "1 where all are the same"
                )
            parts.append(np.broadcast_to(np.asarray(part), whole))
        shift = parts[1] if hold.of_each_prompt else jnp.asarray(parts[1])
        found.append(dataclasses.replace(hold, scale=jnp.asarray(parts[0]), shift=shift))
    return found


def of_prompts(holds: Sequence[Hold], prompts: Int[AnyArray, "B"]) -> list[Hold]:
    """The holds of these prompts alone, in this order."""
    return [
        dataclasses.replace(hold, shift=hold.shift[prompts]) if hold.of_each_prompt else hold
        for hold in holds
    ]


def over_rows(run: Callable, holds: Sequence[Hold]) -> Callable:
    """`run` for all rows of a batch; its last argument are the holds."""

    def mapped(*arguments):
        return jax.vmap(run, in_axes=(*(0,) * (len(arguments) - 1), list(map(_axes, holds))))(
            *arguments
        )

    return mapped


def over_devices(step: Callable, decoder: Decoder, holds: Sequence[Hold], *of_rows: Array) -> Array:
    """step(decoder, holds, *of_rows) of every device's own rows, which are along the first axis of
    what is given and of what it returns."""
    own = shard.rows(0)
    parts, structure = jax.tree.flatten(list(holds))

    def on_each(decoder, parts, *of_rows):
        return step(decoder, jax.tree.unflatten(structure, parts), *of_rows)

    given = (places(holds), *(own,) * len(of_rows))
    return shard.over(on_each, decoder, parts, *of_rows, given=given, gives=own)


def places(holds: Sequence[Hold]) -> list[PartitionSpec]:
    """How the arrays of holds are spread over devices: a shift of each prompt's own by prompts."""
    shifts = [hold.shift for hold in holds if hold.of_each_prompt]
    return [
        shard.rows(0) if any(part is shift for shift in shifts) else shard.WHOLE
        for part in jax.tree.leaves(list(holds))
    ]


def _axes(hold: Hold):
    """Which axis of a hold's arrays is that of the prompts."""
    if not hold.of_each_prompt:
        return None
    return jax.tree.map(lambda part: 0 if part is hold.shift else None, hold)


def run_blocks(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Tokens,
    valid: Valid,
    parts: Int[Array, "T"],
    keep: Sequence[str] = (),
) -> tuple[Residual, dict[str, Stacked]]:
    """Runs one sequence under holds.

    Args:
        decoder: the model.
        holds: made together.
        tokens: token ids.
        valid: which of them are no padding, which may stand on either side.
        parts: the `Part` that each position belongs to.
        keep: what is kept of all layers, as in `Decoder.run_blocks`.

    Returns:
        The last block's output; and what is kept, by name.
    """
    at = decoder.span(jnp.maximum(jnp.cumsum(valid) - 1, 0), valid)

    def change(layer, site, value):
        return edits.hold(holds, site, layer, parts, value)

    return decoder.run_blocks(decoder.embed(tokens, at), at, change, keep=keep)


def not_finite(holds: Sequence[Hold]) -> str:
    """What is told where logits are not finite."""
    cause = ": what is held is too far from its own values" if holds else ": they overflow"
    return f"the model's logits are not finite{cause}"
