"""The effect engine.

An intervention changes the residual stream by some D at some point of the network. What follows is
the same for every granularity: carry D through the later blocks and read the metric. So

    enter(site, layer, unit) -> D, and the stage where it joins the residual stream
    carry(stage, D)          -> the change of the last block's output, or of its input
    read_changes             -> dY

Differences alone are carried (`engine.difference`): the base run is computed once for a whole batch
of edits, and rounding is relative to the effect.

Shapes are named in `models.shapes` and `engine.capture`; U are all units of a piece of work, which
go through the model in chunks of n batches of B.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmed.engine import capture, cost, shard
from jaxmed.engine.capture import Frame
from jaxmed.engine.difference import difference
from jaxmed.engine.hoisting import hoisted
from jaxmed.engine.plan import ALL_POSITIONS, Units
from jaxmed.engine.rules import rules, with_change
from jaxmed.engine.shard import WHOLE
from jaxmed.question.joined import Readings
from jaxmed.question.metrics import (
    VOCABULARY_CHUNK,
    Metric,
    logsumexp_last_axis,
)
from models import products
from models.config import DecoderConfig
from models.decoder import Decoder, Trace
from models.products import Products
from models.shapes import AnyArray, Layer, Rows
from models.sites import Site

# The modules whose inside a site is; what they write goes through a norm in some families.
_INSIDE = (Site.HEAD, Site.NEURON)


@functools.partial(jax.jit, static_argnames=("site", "group_size"))
def enter(
    decoder: Decoder,
    change: Float[Array, "L S ..."],
    written: Float[Array, "L S d"] | None,
    layers: Int[Array, "n B"],
    units: Int[Array, "n B"],
    positions: Int[Array, "n B"],
    site: Site,
    group_size: int,
) -> Float[Array, "n S B d"]:
    """D: what each unit's edit adds to the residual stream where it joins it.

    Args:
        decoder: the model.
        change: edited value minus base value of the site, 0 at positions that are not edited.
        written: the base run's `writes`.
        layers, units, positions: the units, as in `Units`.
        site: the site.
        group_size: adjacent neurons that make one unit.
    """

    def step(decoder, change, written, layers, units, positions):
        if site not in _INSIDE:
            added = change[jnp.minimum(layers, change.shape[0] - 1)]
        else:
            added = _written(decoder, change, written, layers, units, site, group_size)
        return _at_position(added, positions)

    return shard.over(
        step,
        decoder,
        *(change, written, layers, units, positions),
        given=(WHOLE, WHOLE, shard.rows(1), shard.rows(1), shard.rows(1)),
        gives=shard.rows(2),
    )


def _written(
    decoder: Decoder,
    change: Float[Array, "L S ..."],
    written: Float[Array, "L S d"] | None,
    layers: Int[Array, "n B"],
    units: Int[Array, "n B"],
    site: Site,
    group_size: int,
) -> Float[Array, "n B S d"]:
    """What units inside of a module write, at all positions; arguments as of `enter`."""
    layer_count = change.shape[0]
    if site == Site.HEAD:

        def of_head(unit, take):
            layer, head = unit
            weight = products.ready(take(layer, head), decoder.products, change.dtype)
            return products.multiplied(change[layer, :, head], weight, decoder.products)

        write, taken = of_head, change.shape[-1]
    else:

        def of_neurons(unit, take):
            layer, group = unit
            members = group * group_size + jnp.arange(group_size)
            moved = change[layer, :, members].T
            moved = jnp.where(members < change.shape[-1], moved, 0)
            weight = products.numbers(take(layer, members)).astype(change.dtype)
            # Written as a sum: for one neuron it is no product of matrices.
            return jnp.sum(moved[..., None] * weight, axis=1)

        write, taken = of_neurons, group_size
    together = max(1, cost.GATHERED // (taken * decoder.config.hidden_size))
    flat = jnp.minimum(layers, layer_count - 1).reshape(-1), units.reshape(-1)

    def of_all(take):
        def add(unit):
            return _through_norm(decoder, site, unit[0], written, write(unit, take))

        return jax.lax.map(add, flat, batch_size=together)

    def kernel_of(blocks):
        module = blocks.attention.output if site == Site.HEAD else blocks.mlp.down
        return module.kernel[...]

    if not decoder.parts:
        kernel = kernel_of(decoder.blocks).reshape(*change.shape[:1], *change.shape[2:], -1)
        added = of_all(lambda layer, which: kernel[layer, which])
        return added.reshape(*layers.shape, *added.shape[1:])

    # A device has parts of the kernels: each layer's is gathered in turn.
    def with_layer(layer, added):
        kernel = kernel_of(decoder.block(layer)).reshape(*change.shape[2:], -1)
        here = (layers == layer).reshape(-1, 1, 1)
        return jnp.where(here, of_all(lambda _, which: kernel[which]), added)

    first = shard.earliest(decoder, jnp.min(layers))
    last = shard.latest(decoder, jnp.max(jnp.where(layers < layer_count, layers, -1)))
    nothing = jnp.zeros((layers.size, change.shape[1], decoder.config.hidden_size), change.dtype)
    added = jax.lax.fori_loop(first, last + 1, with_layer, nothing)
    return added.reshape(*layers.shape, *added.shape[1:])


def goes_through_norm(config: DecoderConfig, site: Site) -> bool:
    """Whether a norm follows the module that a site is inside of: what a unit adds then depends on
    all that the module writes."""
    return site in _INSIDE and config.post_norm


def writes(
    decoder: Decoder, trace: Trace, site: Site, start: Int[ArrayLike, ""], size: int
) -> Float[Array, "L S d"]:
    """What the modules that a site is inside of write, before the norm that follows."""
    value = capture.take(getattr(trace, site.value), jnp.arange(size) + start)
    return _writes(decoder, value, site)


@functools.partial(jax.jit, static_argnames=("site",))
def _writes(decoder, value, site):
    def step(decoder, value):
        def of_layer(given):
            block, value = given
            block = decoder.whole(block)
            return (block.mlp if site == Site.NEURON else block.attention).write(value)

        return jax.lax.map(of_layer, (decoder.blocks, value))

    return shard.over(step, decoder, value, given=(WHOLE,), gives=WHOLE)


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
    def step(decoder, change, layer, vectors):
        here = jax.lax.dynamic_index_in_dim(change, layer, keepdims=False)
        along = vectors @ here.reshape(here.shape[0], -1).T
        if site in _INSIDE:
            block = decoder.block(layer)
            module = block.mlp.down if site == Site.NEURON else block.attention.output
            weight = products.ready(module.kernel[...], decoder.products, vectors.dtype)
            vectors = products.multiplied(vectors, weight, decoder.products.of_values)
        return along, vectors

    return shard.over(step, decoder, change, layer, vectors, given=(WHOLE,) * 3, gives=WHOLE)


@functools.partial(jax.jit, static_argnames=("site",))
def enter_directions(
    decoder: Decoder,
    along: Float[Array, "U S"],
    added: Float[Array, "U d"],
    written: Float[Array, "L S d"] | None,
    layers: Int[Array, "n B"],
    which: Int[Array, "n B"],
    positions: Int[Array, "n B"],
    site: Site,
) -> Float[Array, "n S B d"]:
    """D of directions, as `enter` gives it of other units: v (v . change), written."""

    def step(decoder, along, added, written, layers, which, positions):
        change = along[which][..., None] * added[which][..., None, :]
        if written is not None:
            layers = jnp.minimum(layers, written.shape[0] - 1).reshape(-1)
            through = functools.partial(_through_norm, decoder, site)
            flat = change.reshape(-1, *change.shape[-2:])
            change = jax.vmap(lambda layer, c: through(layer, written, c))(layers, flat).reshape(
                change.shape
            )
        return _at_position(change, positions)

    return shard.over(
        step,
        decoder,
        *(along, added, written, layers, which, positions),
        given=(WHOLE, WHOLE, WHOLE, shard.rows(1), shard.rows(1), shard.rows(1)),
        gives=shard.rows(2),
    )


def _at_position(
    written: Float[Array, "n B S d"], positions: Int[Array, "n B"]
) -> Float[Array, "n S B d"]:
    """What is written, where the unit is edited at one position only, at that one."""
    positions = positions[..., None]
    here = (positions == ALL_POSITIONS) | (positions == jnp.arange(written.shape[-2]))
    return jnp.swapaxes(jnp.where(here[..., None], written, 0), -3, -2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """Neurons whose change is given in each row, at the edited positions.

    Attributes:
        change: their new value minus that of the base run, [L, S, I].
        edited: which positions of the span are edited, [S].
        members: which neurons, [n, B, L, I].
    """

    change: Float[Array, "L S I"]
    edited: Bool[AnyArray, "S"]
    members: Bool[AnyArray, "n B L I"]

    def at(self, layer, batch) -> tuple[Float[Array, "S I"], Bool[AnyArray, "B S I"]]:
        """The change of a layer's neurons, and which of them have it in each row of a batch."""
        members = self.members[batch, :, layer, None]
        return self.change[layer], members & self.edited[:, None]


@functools.partial(jax.jit, donate_argnames=("differences",))
def carry(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n S B d"],
    blocks: Int[ArrayLike, ""],
    forced: Forced | None = None,
) -> Float[Array, "n S B d"]:
    """The exact change of a block's output when D joins the residual stream.

    Each row's D joins at its own stage. The loop over layers starts at the first that any row
    needs, and in each layer the loop over batches stops after the last batch that has joined: both
    are known at run time only, so that one compilation serves all layers and granularities, and
    nothing is computed for a batch before its layer. A layer's weights are fetched and made ready,
    and its base values computed, once for all batches (`hoisted`).

    Args:
        decoder: the model; `Decoder.at_precision` says how differences are multiplied.
        frame: the base run.
        stages: where each D joins, in increasing order; past the last stage for a row that is
            padding.
        differences: D; its buffer is reused for the result.
        blocks: how many of the model's blocks D is carried through; see `blocks_to_carry`.
        forced: neurons whose change is given, whatever is carried to them. A row joins by the stage
            whose reader has the first of them.
    """

    def step(decoder, frame, stages, differences, blocks, *forced):
        return _carried(decoder, frame, stages, differences, blocks, _forced(*forced))

    return shard.over(
        step,
        decoder,
        *(frame, stages, differences, blocks, *_fields(forced)),
        given=(WHOLE, shard.rows(1), shard.rows(2), WHOLE, *_FIELDS),
        gives=shard.rows(2),
    )


def _fields(forced: Forced | None) -> tuple[AnyArray | None, ...]:
    """Its arrays, which are on the devices each in its own way; see `_FIELDS`."""
    return (None,) * 3 if forced is None else (forced.change, forced.edited, forced.members)


_FIELDS = (WHOLE, WHOLE, shard.rows(1))


def _forced(change, edited, members) -> Forced | None:
    """That of `_fields`."""
    return None if change is None else Forced(change, edited, members)


def _carried(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n S B d"],
    blocks: Int[ArrayLike, ""],
    forced: Forced | None,
) -> Float[Array, "n S B d"]:
    """`carry` of the rows of one device."""
    first_stages = jnp.min(stages, axis=1)

    def run_layer(layer, differences):
        halves = _halves(decoder, frame, layer, forced)

        def run_batch(index, differences):
            batch = differences[index]
            given = _given(forced, layer, index)
            for half in halves:
                batch = half.add(batch, stages[index], given)
                batch = _laid_out(batch, decoder.products)
            return jax.lax.dynamic_update_index_in_dim(differences, batch, index, axis=0)

        live = jnp.sum(first_stages <= halves[-1].stage)
        return jax.lax.fori_loop(0, live, run_batch, differences)

    first = shard.earliest(decoder, jnp.min(first_stages) // 2)
    return jax.lax.fori_loop(first, blocks, run_layer, differences)


@dataclasses.dataclass(frozen=True)
class _Half:
    """A half of a block, or a whole one whose modules are parallel.

    Attributes:
        name: of what it does.
        stage: where it reads the residual stream.
        change: of what it adds to the stream, by that of the stream, and what `_given` gives.
        rows: where in the span it adds; None for everywhere.
    """

    name: str
    stage: Int[ArrayLike, ""]
    change: Callable
    rows: Rows | None

    def add(
        self, batch: Float[Array, "S B d"], stages: Int[Array, "B"], given: tuple
    ) -> Float[Array, "R B d"]:
        """The change of the stream after it. A row of the batch that has not joined waits."""
        in_axes = (1, None, 0)[: 1 + len(given)]
        with jax.named_scope(self.name):
            added = jax.vmap(self.change, in_axes, out_axes=1)(batch, *given)
            batch = batch if self.rows is None else batch[self.rows]
            return jnp.where((stages <= self.stage)[:, None], batch + added, batch)


def _given(
    forced: Forced | None, layer: Layer, batch: Int[ArrayLike, ""], rows: Rows | None = None
) -> tuple:
    """What is given of a layer's neurons in a batch, at some rows of the span or at all."""
    if forced is None:
        return ()
    change, members = forced.at(layer, batch)
    return (change, members) if rows is None else (change[rows], members[:, rows])


def _halves(
    decoder: Decoder,
    frame: Frame,
    layer: Layer,
    forced: Forced | None,
    rows: Rows | None = None,
) -> list[_Half]:
    """A block, half by half. With rows, all of the span goes in, and what comes out is at these."""
    block = decoder.ready(decoder.block(layer))
    prefix = _at_layer(frame.prefix, layer)
    inputs, middles = frame.inputs[layer], frame.middles[layer]

    def attend(x, *_):
        traits = decoder.traits.at(layer)
        return block.attend(x, frame.span, traits, prefix, _untapped, rows)[0]

    def feed(x, *given):
        def tap(site, value):
            return with_change(value, *given) if given and site == Site.NEURON else value

        return block.feed(x, tap)

    def both(x, *given):
        return attend(x) + feed(x if rows is None else x[rows], *given)

    # Of the base run nothing is forced.
    of_layer = _given(forced, layer, 0, rows)
    unforced = [jnp.zeros(given.shape[-2:], given.dtype) for given in of_layer]
    if decoder.config.parallel:
        return [_Half("both", 2 * layer, change_of(decoder, both, inputs, *unforced), rows)]
    middles = middles if rows is None else middles[rows]
    return [
        _Half("attend", 2 * layer, change_of(decoder, attend, inputs, *unforced), rows),
        _Half("feed", 2 * layer + 1, change_of(decoder, feed, middles, *unforced), None),
    ]


def blocks_to_carry(config: DecoderConfig, size: int, reading: Readings) -> int:
    """How many blocks `carry` goes through: all, but for the last where few positions of the span
    are read. `read_changes` runs that one, at these."""
    return config.num_layers - (len(reading.offsets) < size)


@functools.partial(jax.jit, static_argnames=("metric", "whole_vocabulary"))
def read_changes(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n S B d"],
    reading: Readings,
    last_prompt: Int[Array, ""],
    metric: Metric,
    whole_vocabulary: bool,
    forced: Forced | None = None,
) -> Float[Array, "n B"]:
    """dY: the exact change of the metric, by what `carry` gives for `blocks_to_carry`.

    Args:
        decoder: the model.
        frame: the base run.
        stages: as in `carry`; of batches that are all padding nothing is read.
        differences: the changes of the last block's output, or of its input.
        reading: what the metric reads.
        last_prompt: index in the span of the last prompt token, from which the reading's offsets
            count.
        metric: the metric.
        whole_vocabulary: as in `metrics.Term`.
        forced: as in `carry`.
    """

    def step(decoder, frame, stages, differences, reading, last_prompt, *forced):
        return _changes_read(
            *(decoder, frame, stages, differences, reading, last_prompt),
            *(metric, whole_vocabulary, _forced(*forced)),
        )

    return shard.over(
        step,
        decoder,
        *(frame, stages, differences, reading, last_prompt, *_fields(forced)),
        given=(WHOLE, shard.rows(1), shard.rows(2), WHOLE, WHOLE, *_FIELDS),
        gives=shard.rows(1),
    )


def _changes_read(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n S B d"],
    reading: Readings,
    last_prompt: Int[Array, ""],
    metric: Metric,
    whole_vocabulary: bool,
    forced: Forced | None,
) -> Float[Array, "n B"]:
    """`read_changes` of the rows of one device."""
    rows = last_prompt + reading.offsets
    base = frame.inputs[-1][rows]
    ended = _at_the_end(decoder, frame, stages, differences, rows, forced)
    live = jnp.sum(jnp.min(stages, axis=1) <= 2 * decoder.config.num_layers)

    def in_batches(change: Callable, shape: tuple, *others: Float[Array, "n *R B"]):
        """The change of each batch, from those of its rows and what else has changed in it."""
        in_axes = (1, *[-1] * len(others))

        def run_batch(index, found):
            moved = ended[index], *(other[index] for other in others)
            batch = jax.vmap(change, in_axes, out_axes=-1)(*moved)
            return jax.lax.dynamic_update_index_in_dim(found, batch, index, axis=0)

        return jax.lax.fori_loop(0, live, run_batch, jnp.zeros(shape, differences.dtype))

    if not whole_vocabulary:

        def y(x):
            return _value(metric, _RowLogits(decoder, x), reading)

        return in_batches(change_of(decoder, y, base), stages.shape)

    # Chunk by chunk of the vocabulary: its weights and base logits serve all batches.
    def with_chunk(state, start):
        total, changes = state

        def added(x, total):
            return _RowLogits(decoder, x).add_chunk(total, start)

        change = change_of(decoder, added, base, total)
        changes = in_batches(change, changes.shape, changes)
        return (added(base, total), changes), None

    def y_of_both(x, total):
        return _value(metric, _RowLogits(decoder, x, total), reading)

    nothing = _RowLogits(decoder, base).of_no_chunk()
    unchanged = jnp.zeros((len(stages), *nothing.shape, stages.shape[1]), differences.dtype)
    (total, changes), _ = jax.lax.scan(
        with_chunk, (nothing, unchanged), _chunk_starts(decoder.config)
    )
    change = change_of(decoder, y_of_both, base, total)
    return in_batches(change, stages.shape, changes)


def _at_the_end(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "n S B d"],
    rows: Rows,
    forced: Forced | None,
) -> Float[Array, "n R B d"]:
    """The changes of the last block's output at some rows. Of the other positions of a span only
    keys and values matter in that block, so that it is run here where the rows are fewer."""
    ended = differences[:, rows]
    if len(rows) >= differences.shape[1]:
        return ended
    layer = decoder.config.num_layers - 1
    halves = _halves(decoder, frame, layer, forced, rows)

    def run_batch(index, ended):
        batch = differences[index]
        given = _given(forced, layer, index, rows)
        for half in halves:
            batch = half.add(batch, stages[index], given)
        return jax.lax.dynamic_update_index_in_dim(ended, batch, index, axis=0)

    live = jnp.sum(jnp.min(stages, axis=1) <= halves[-1].stage)
    return jax.lax.fori_loop(0, live, run_batch, ended)


def change_of(decoder: Decoder, f: Callable, *values: Shaped[Array, "..."]) -> Callable:
    """The function of changes d -> f(values + d) - f(values); what depends on the values alone is
    computed now."""
    exact = difference(f, rules=rules(decoder.products))
    change = hoisted(lambda changes: exact(values, changes)[1], values)
    return lambda *changes: change(changes)


def _laid_out(batch: Float[Array, "S B d"], how: Products) -> Float[Array, "S B d"]:
    """A batch with its rows one after another in memory. The TPU's compiler may lay them side by
    side, which takes two copies of a chunk and half as long again in the MLP."""
    if how.platform != "tpu":
        return batch
    return with_layout_constraint(batch, Layout(major_to_minor=(0, 1, 2)))


def _untapped(site, value):
    return value


def _at_layer(prefix, layer):
    """A layer's keys and values of the prefix."""
    if prefix is None:
        return None
    return dataclasses.replace(prefix, keys=prefix.keys[layer], values=prefix.values[layer])


@dataclasses.dataclass(frozen=True)
class _RowLogits:
    """The logits at rows of the last block's output, a chunk of the vocabulary at a time.

    Attributes:
        decoder: the model.
        rows: of the last block's output.
        total: the log-normalisers, where they are known.
    """

    decoder: Decoder
    rows: Float[Array, "R d"]
    total: Float[Array, "R"] | None = None

    def of(self, tokens: Int[Array, "K"]) -> Float[Array, "R K"]:
        """Logits of the given tokens."""
        return self.decoder.unembed(self.rows, tokens)

    def log_normaliser(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary."""
        return self._all_chunks if self.total is None else self.total

    @functools.cached_property
    def _all_chunks(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary, formed once for all terms."""

        def add(total, start):
            return self.add_chunk(total, start), None

        return jax.lax.scan(add, self.of_no_chunk(), _chunk_starts(self.decoder.config))[0]

    def of_no_chunk(self) -> Float[Array, "R"]:
        """Log-sum-exp over no token, and finite."""
        return jnp.full(self.rows.shape[0], jnp.finfo(self.rows.dtype).min / 4)

    def add_chunk(self, total: Float[Array, "R"], start: Int[Array, ""]) -> Float[Array, "R"]:
        """Log-sum-exp over the tokens of a total and those of the chunk that starts there."""
        size = self.decoder.config.vocab_size
        tokens = start + jnp.arange(min(VOCABULARY_CHUNK, size))
        logits = self.decoder.unembed(self.rows, jnp.minimum(tokens, size - 1), alike=True)
        logits = jnp.where(tokens < size, logits, jnp.finfo(logits.dtype).min / 4)
        both = jnp.stack([total, logsumexp_last_axis(logits)], axis=-1)
        return logsumexp_last_axis(both)


def _chunk_starts(config: DecoderConfig) -> Int[Array, "chunk"]:
    """First tokens of the vocabulary's chunks."""
    return jnp.arange(0, config.vocab_size, min(VOCABULARY_CHUNK, config.vocab_size))


@dataclasses.dataclass(frozen=True)
class _PartLogits:
    """The logits of one term, whose rows are some of a run's."""

    of_run: _RowLogits
    rows: Int[AnyArray, "R"]

    def of(self, tokens: Int[AnyArray, "K"]) -> Float[Array, "R K"]:
        """Logits of the given tokens."""
        return self.of_run.decoder.unembed(self.of_run.rows[self.rows], tokens)

    def log_normaliser(self) -> Float[Array, "R"]:
        """Log-sum-exp over the vocabulary."""
        return self.of_run.log_normaliser()[self.rows]


def _value(metric: Metric, logits: _RowLogits, reading: Readings) -> Float[Array, ""]:
    """Y, as the sum of its terms."""
    values = (
        part.sign * metric.value(_PartLogits(logits, part.rows), part.reading)
        for part in reading.parts
    )
    return functools.reduce(operator.add, values)


def read(decoder, metric, residual, reading, last_prompt):
    """Y, from the last block's output at the positions of a run, [N, d]."""
    rows = residual[last_prompt + reading.offsets]
    return _value(metric, _RowLogits(decoder, rows), reading)


@functools.partial(jax.jit, static_argnames=("metric",))
def plain_value(
    decoder: Decoder, trace: Trace, reading: Readings, last_prompt: Int[Array, ""], metric: Metric
) -> Float[Array, ""]:
    """Y of a captured run whose last prompt token is at `last_prompt`."""

    def step(decoder, residual, reading, last_prompt):
        return read(decoder, metric, residual, reading, last_prompt)

    residual = capture.kept(trace, "residual")[-1]
    return shard.over(
        step, decoder, residual, reading, last_prompt, given=(WHOLE,) * 3, gives=WHOLE
    )
