"""The effect engine.

An intervention changes the residual stream by some D at some point of the network. What follows is
the same for every granularity: carry D through the later blocks and read the metric. So

    enter(site, layer, unit) -> D, and the stage where it joins the residual stream
    carry(stage, D)          -> the change of the last block's output
    read_changes             -> dY

Differences alone are carried (`engine.difference`): the base run is computed once for a whole batch
of edits, and rounding is relative to the effect.

Shapes are named in `models.shapes` and `engine.capture`; U are all units of a piece of work, which
go through the model in chunks of n batches of B.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxmed.engine import capture, cost
from jaxmed.engine.capture import Frame
from jaxmed.engine.difference import difference
from jaxmed.engine.plan import ALL_POSITIONS, Units
from jaxmed.engine.rules import rules
from jaxmed.question.metrics import (
    VOCABULARY_CHUNK,
    Metric,
    Reading,
    logsumexp_last_axis,
)
from models import products
from models.decoder import Decoder, Trace
from models.sites import Site

# The modules whose inside a site is; what they write goes through a norm in some families.
_INSIDE = (Site.HEAD, Site.NEURON)


@functools.partial(jax.jit, static_argnames=("site", "group_size"))
def enter(
    decoder: Decoder,
    change: Float[Array, "L S ..."],
    written: Float[Array, "L S d"] | None,
    layers: Int[Array, "*chunk"],
    units: Int[Array, "*chunk"],
    positions: Int[Array, "*chunk"],
    site: Site,
    group_size: int,
) -> Float[Array, "*chunk S d"]:
    """D: what each unit's edit adds to the residual stream where it joins it.

    Args:
        decoder: the model.
        change: edited value minus base value of the site, 0 at positions that are not edited.
        written: the base run's `writes`.
        layers, units, positions: the units, as in `Units`.
        site: the site.
        group_size: adjacent neurons that make one unit.
    """
    layers = jnp.minimum(layers, change.shape[0] - 1)
    if site not in _INSIDE:
        return _at_position(change[layers], positions)
    if site == Site.HEAD:
        kernel = decoder.blocks.attention.output.kernel[...]
        kernel = kernel.reshape(kernel.shape[0], *change.shape[2:], -1)

        def of_head(unit):
            layer, head = unit
            weight = products.ready(kernel[layer, head], decoder.products, change.dtype)
            return products.multiplied(change[layer, :, head], weight, decoder.products)

        write, gathered = of_head, change.shape[-1]
    else:
        kernel = decoder.blocks.mlp.down.kernel[...]

        def of_neurons(unit):
            layer, group = unit
            members = group * group_size + jnp.arange(group_size)
            moved = change[layer, :, members].T
            moved = jnp.where(members < change.shape[-1], moved, 0)
            weight = products.numbers(kernel[layer, members]).astype(change.dtype)
            # Written as a sum: for one neuron it is no product of matrices.
            return jnp.sum(moved[..., None] * weight, axis=1)

        write, gathered = of_neurons, group_size

    def add(unit):
        return _through_norm(decoder, site, unit[0], written, write(unit))

    together = max(1, cost.GATHERED // (gathered * kernel.shape[-1]))
    added = jax.lax.map(add, (layers.reshape(-1), units.reshape(-1)), batch_size=together)
    return _at_position(added.reshape(*layers.shape, *added.shape[1:]), positions)


def writes(
    decoder: Decoder, trace: Trace, site: Site, start: Int[ArrayLike, ""], size: int
) -> Float[Array, "L S d"] | None:
    """What the modules that a site is inside of write, before the norm that follows.

    None where no norm follows: what a unit adds then does not depend on it.
    """
    if site not in _INSIDE or not decoder.config.post_norm:
        return None
    value = capture.take(getattr(trace, site.value), jnp.arange(size) + start)
    return _writes(decoder, value, site)


@functools.partial(jax.jit, static_argnames=("site",))
def _writes(decoder, value, site):
    modules = decoder.blocks.mlp if site == Site.NEURON else decoder.blocks.attention
    return jax.lax.map(lambda of_layer: of_layer[0].write(of_layer[1]), (modules, value))


def _through_norm(
    decoder: Decoder,
    site: Site,
    layer: Int[Array, ""],
    written: Float[Array, "L S d"] | None,
    change: Float[Array, "S d"],
) -> Float[Array, "S d"]:
    """The change of what a module adds, when what it writes changes."""
    if written is None:
        return change
    blocks = decoder.blocks
    norms = blocks.mlp_post_norm if site == Site.NEURON else blocks.attention_post_norm
    norm = jax.tree.map(lambda stacked: stacked[layer], norms)
    return difference(norm, rules=rules(decoder.products))((written[layer],), (change,))[1]


def direction_writes(
    decoder: Decoder,
    change: Float[Array, "L S ..."],
    site: Site,
    units: Units,
    vectors: Float[np.ndarray, "V size"],
) -> tuple[Float[Array, "U S"], Float[Array, "U d"]]:
    """v . change of every direction v of a site, and what v adds to the residual stream.

    Args:
        decoder: the model.
        change: as in `enter`.
        site: the site.
        units: the directions, by their places in `vectors`; in the order of their layers.
        vectors: the directions.
    """
    layers = units.layers
    along, written = [], []
    # Layer by layer: no more than one layer's weights are needed in the activations' type.
    for layer in np.unique(layers):
        here = jnp.asarray(vectors[units.units[layers == layer]], change.dtype)
        found = _direction_writes(decoder, change, layer, here, site)
        along.append(found[0])
        written.append(found[1])
    return jnp.concatenate(along), jnp.concatenate(written)


@functools.partial(jax.jit, static_argnames=("site",))
def _direction_writes(decoder, change, layer, vectors, site):
    here = jax.lax.dynamic_index_in_dim(change, layer, keepdims=False)
    along = vectors @ here.reshape(here.shape[0], -1).T
    if site in _INSIDE:
        block = decoder.block(layer)
        module = block.mlp.down if site == Site.NEURON else block.attention.output
        weight = products.ready(module.kernel[...], decoder.products, vectors.dtype)
        vectors = products.multiplied(vectors, weight, decoder.products.of_values)
    return along, vectors


@functools.partial(jax.jit, static_argnames=("site",))
def enter_directions(
    decoder: Decoder,
    along: Float[Array, "U S"],
    added: Float[Array, "U d"],
    written: Float[Array, "L S d"] | None,
    layers: Int[Array, "*chunk"],
    which: Int[Array, "*chunk"],
    positions: Int[Array, "*chunk"],
    site: Site,
) -> Float[Array, "*chunk S d"]:
    """D of directions, as `enter` gives it of other units: v (v . change), written."""
    change = along[which][..., None] * added[which][..., None, :]
    if written is not None:
        layers = jnp.minimum(layers, written.shape[0] - 1).reshape(-1)
        through = functools.partial(_through_norm, decoder, site)
        flat = change.reshape(-1, *change.shape[-2:])
        change = jax.vmap(lambda layer, c: through(layer, written, c))(layers, flat).reshape(
            change.shape
        )
    return _at_position(change, positions)


def _at_position(written: Float[Array, "*chunk S d"], positions: Int[Array, "*chunk"]):
    """What is written, where the unit is edited at one position only, at that one."""
    positions = positions[..., None]
    here = (positions == ALL_POSITIONS) | (positions == jnp.arange(written.shape[-2]))
    return jnp.where(here[..., None], written, 0)


@functools.partial(jax.jit, donate_argnames=("differences",))
def carry(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n B S d"],
) -> Float[Array, "n B S d"]:
    """The exact change of the last block's output when D joins the residual stream.

    Each row's D joins at its own stage. The loop over layers starts at the first that any row
    needs, and in each layer the loop over batches stops after the last batch that has joined: both
    are known at run time only, so that one compilation serves all layers and granularities, and
    nothing is computed for a batch before its stage. A layer's weights are fetched and made ready,
    and its base values computed, once for all batches.

    Args:
        decoder: the model; `Decoder.at_precision` says how differences are multiplied.
        frame: the base run.
        stages: where each D joins, in increasing order; past the last stage for a row that is
            padding.
        differences: D; its buffer is reused for the result.
    """
    traits = decoder.traits
    first_stages = jnp.min(stages, axis=1)

    def run_half(f, value, stage, differences):
        """What reads the stream at a stage, for the rows that have joined by then; the others
        wait."""

        def run_batch(index, differences):
            batch = differences[index]
            moved = batch + changes_of(decoder, f, value, batch)
            joined = (stages[index] <= stage)[:, None, None]
            batch = jnp.where(joined, moved, batch)
            return jax.lax.dynamic_update_index_in_dim(differences, batch, index, axis=0)

        with jax.named_scope(f.__name__):
            return jax.lax.fori_loop(0, jnp.sum(first_stages <= stage), run_batch, differences)

    def run_layer(layer, differences):
        block = decoder.ready(decoder.block(layer))
        prefix = _at_layer(frame.prefix, layer)

        def attend(x):
            return block.attend(x, frame.span, traits.at(layer), prefix, _untapped)[0]

        def feed(x):
            return block.feed(x, _untapped)

        if decoder.config.parallel:

            def both(x):
                return attend(x) + feed(x)

            return run_half(both, frame.inputs[layer], 2 * layer, differences)
        differences = run_half(attend, frame.inputs[layer], 2 * layer, differences)
        return run_half(feed, frame.middles[layer], 2 * layer + 1, differences)

    return jax.lax.fori_loop(
        jnp.min(first_stages) // 2, decoder.config.num_layers, run_layer, differences
    )


@functools.partial(jax.jit, static_argnames=("metric",))
def read_changes(
    decoder: Decoder,
    residual: Float[Array, "S d"],
    stages: Int[Array, "n B"],
    differences: Float[Array, "n B S d"],
    reading: Reading,
    last_prompt: Int[Array, ""],
    metric: Metric,
) -> Float[Array, "n B"]:
    """dY: the exact change of the metric when the last block's output changes.

    Args:
        decoder: the model.
        residual: the base run's output of the last block.
        stages: as in `carry`; of batches that are all padding nothing is read.
        differences: the changes of that output.
        reading: what the metric reads.
        last_prompt: index in the span of the last prompt token, from which the reading's offsets
            count.
        metric: the metric.
    """

    def y(residual):
        return read(decoder, metric, residual, reading, last_prompt)

    def read_batch(index, found):
        batch = changes_of(decoder, y, residual, differences[index])
        return jax.lax.dynamic_update_index_in_dim(found, batch, index, axis=0)

    last = 2 * decoder.config.num_layers
    live = jnp.sum(jnp.min(stages, axis=1) <= last)
    nothing = jnp.zeros(stages.shape, differences.dtype)
    return jax.lax.fori_loop(0, live, read_batch, nothing)


def changes_of(
    decoder: Decoder, f: Callable, value: Float[Array, "S d"], changes: Float[Array, "B S d"]
):
    """f(value + change) - f(value) for every change of a batch; the value stays unbatched."""
    exact = difference(f, rules=rules(decoder.products))
    return jax.vmap(lambda change: exact((value,), (change,))[1])(changes)


def _untapped(site, value):
    return value


def _at_layer(prefix, layer):
    """A layer's keys and values of the prefix."""
    if prefix is None:
        return None
    return dataclasses.replace(prefix, keys=prefix.keys[layer], values=prefix.values[layer])


@dataclasses.dataclass(frozen=True)
class _RowLogits:
    """The logits at rows of the last block's output, a chunk of the vocabulary at a time."""

    decoder: Decoder
    rows: Float[Array, "R d"]

    def of(self, tokens: Int[Array, "K"]) -> Float[Array, "R K"]:
        """Logits of the given tokens."""
        return self.decoder.unembed(self.rows, tokens)

    def log_normaliser(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary."""
        size = self.decoder.config.vocab_size
        chunk = min(VOCABULARY_CHUNK, size)
        lowest = jnp.finfo(self.rows.dtype).min / 4

        def add(total, start):
            tokens = start + jnp.arange(chunk)
            logits = self.of(jnp.minimum(tokens, size - 1))
            logits = jnp.where(tokens < size, logits, lowest)
            both = jnp.stack([total, logsumexp_last_axis(logits)], axis=-1)
            return logsumexp_last_axis(both), None

        nothing = jnp.full(self.rows.shape[0], lowest)
        return jax.lax.scan(add, nothing, jnp.arange(0, size, chunk))[0]


def read(decoder, metric, residual, reading, last_prompt):
    """Y, from the last block's output at the positions of a run or a span, [S, d]."""
    rows = residual[last_prompt + reading.offsets]
    return metric.value(_RowLogits(decoder, rows), reading)


@functools.partial(jax.jit, static_argnames=("metric",))
def plain_value(
    decoder: Decoder, trace: Trace, reading: Reading, last_prompt: Int[Array, ""], metric: Metric
) -> Float[Array, ""]:
    """Y of a captured run whose last prompt token is at `last_prompt`."""
    return read(decoder, metric, capture.kept(trace, "residual")[-1], reading, last_prompt)
