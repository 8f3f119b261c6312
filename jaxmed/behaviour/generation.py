"""Text that a model generates, plain or under interventions that last through generation.

The rows of a batch are at steps of their own. A row that has ended is given the next prompt that
waits, while the others go on: a list of prompts takes two compiled functions, one that runs prompts
and gives them to rows (`fill`), and one that is the loop over generated tokens (`advance`). Both
are the same for all prompts of a bucket of lengths, all sampling settings and all holds of a site.

What a prompt is answered depends on the prompt, its own seed and its own holds: batches are of one
size, a prompt is padded (on the left) to the bucket of its own length and not of its neighbours',
and a row's keys and values lie where they would lie in any other. So the same program computes it
in any company and order. Another `batch_size` (as another `memory` may bring) or bucket of
`max_tokens` is another program, which may round otherwise in the last bits: its tokens are the same
unless two tie within that rounding.

Products with weights are made as the decoder's `at_precision` says, in float32 or as exactly; all
others are float32 on every device.

Shapes are named in `models.shapes`; B are the rows of a batch, G those whose prompts are run
together, N the padded length of a prompt, M the generated tokens that there is room for, C = N + M
the slots of a row's keys and values, V the vocabulary.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from jaxmed.behaviour import batches, holding
from jaxmed.behaviour.sampling import Choice, Sampling
from jaxmed.engine import cost, shard
from jaxmed.engine.cost import Devices
from models import edits
from models.decoder import Decoder
from models.edits import Hold, Part
from models.errors import InputError
from models.layers import Cache, Span
from models.products import numbers, stored

PRECISION = "float32"  # of products of activations
CACHE_DTYPES = ("", "bfloat16")  # of keys and values that are kept; "" is the activations' own
# After so many steps at most, rows that have ended are given prompts that wait.
_STEPS = 32
_NOBODY = -1
_WIDENED = 2**22  # numbers of a vocabulary's vectors that are widened together


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: without the stop token.
        stopped: whether the model ended it by a stop token; if not, the limit did.
    """

    tokens: tuple[int, ...]
    stopped: bool


@jax.default_matmul_precision(PRECISION)
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
    seeds: Sequence[int] | None = None,
    holds: Sequence[Hold] = (),
    cache_dtype: str = "",
    batch_size: int | None = None,
    memory: int | None = None,
    ended: Callable[[dict[int, Generated]], object] | None = None,
) -> list[Generated]:
    """One response to each prompt.

    Args:
        decoder: the model.
        prompts: token ids.
        stop: tokens that end a response; if there are none, all go on to the limit.
        sampling: how tokens are chosen.
        seeds: one for each prompt, in [0, 2^32); which number it is by default.
        holds: interventions, made together; a shift of each prompt's own has them in their order.
        cache_dtype: type that keys and values are kept in, one of `CACHE_DTYPES`.
        batch_size: rows of a batch; by default as many as fit the memory, up to a constant.
        memory: bytes for all but the decoder; `memory.free()` by default.
        ended: told of responses as they end, by the numbers of their prompts.

    Raises:
        InputError: a prompt is empty, too long for the model or has a token outside the
            vocabulary, a setting or a seed is out of range, the memory does not suffice, or the
            holds drive the logits out of the range of their type.
        ValueError: a hold does not fit the model or the prompts.
    """
    config = decoder.config
    seeds = range(len(prompts)) if seeds is None else seeds
    sampling.check()
    _check_seeds(seeds, len(prompts))
    _check_stop(stop, config.vocab_size)
    if cache_dtype not in CACHE_DTYPES:
        raise InputError(f"cache_dtype = {cache_dtype!r}: not one of {', '.join(CACHE_DTYPES[1:])}")
    batches.check_prompts(config, prompts, sampling.max_tokens)
    holds = holding.fitted(config, holds, len(prompts))
    room = batches.room_for(sampling.max_tokens)
    kept_as = jnp.dtype(cache_dtype or decoder.compute_dtype)
    rows = batches.answered_together(
        decoder,
        holds,
        prompts,
        room=room,
        kept_as=kept_as,
        converted=_converted(decoder),
        memory=memory,
        batch_size=batch_size,
    )
    responses = {}
    for length, members in batches.by_length(prompts, lambda length: len(prompts)):
        for found in _responses(
            decoder,
            holds,
            {member: prompts[member] for member in members},
            seeds=np.array(seeds, np.uint32),
            rows=rows[length],
            length=length,
            room=room,
            kept_as=kept_as,
            is_stop=np.isin(np.arange(config.vocab_size), list(stop)),
            sampling=sampling,
        ):
            responses |= found
            if ended is not None:
                ended(found)
    return [responses[index] for index in range(len(prompts))]


def _check_seeds(seeds: Sequence[int], prompts: int) -> None:
    if len(seeds) != prompts:
        raise InputError(f"{len(seeds)} seeds for {prompts} prompts")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"seed {bad[0]}: must be in [0, 2^32)")


def _check_stop(stop: Collection[int], vocabulary: int) -> None:
    if bad := [token for token in stop if not 0 <= token < vocabulary]:
        raise InputError(
            f"stop token {bad[0]} is outside the vocabulary of {vocabulary}: the tokenizer is not "
            "that of the model"
        )


def _responses(
    decoder: Decoder,
    holds: Sequence[Hold],
    prompts: Mapping[int, Sequence[int]],
    *,
    seeds: UInt[np.ndarray, "prompt"],
    rows: int,
    length: int,
    room: int,
    kept_as: jnp.dtype,
    is_stop: Bool[np.ndarray, "V"],
    sampling: Sampling,
) -> Iterator[dict[int, Generated]]:
    """Responses to prompts of one padded length, by their numbers, as they end.

    Raises:
        InputError: logits are not finite.
    """
    layers = layered(decoder)
    choice = Choice.of(sampling)
    own = rows // Devices.of(decoder.mesh).number
    together = cost.prompts_together(length, own, jax.default_backend())
    waiting = collections.deque(prompts)
    answered = np.full(rows, _NOBODY)  # which prompt a row answers
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    state = empty(decoder, layers, rows=rows, length=length, room=room, kept_as=kept_as)
    while waiting or (answered != _NOBODY).any():
        free = np.flatnonzero(answered == _NOBODY)
        # Of each device as many as of any other.
        fresh = free[np.argsort(free % own, kind="stable")][: len(waiting)]
        for row in fresh:
            answered[row] = waiting.popleft()
            prompt = prompts[int(answered[row])]
            tokens[row] = batches.padded([prompt], length, left=True)
            lengths[row] = len(prompt)
        of_rows = np.maximum(answered, 0)
        held = holding.of_prompts(holds, of_rows)
        if len(fresh):
            state = fill(
                decoder,
                layers,
                held,
                state,
                fresh=_of_devices(fresh, together, own, rows // own),
                count=np.bincount(fresh // own, minlength=rows // own).astype(np.int32),
                tokens=tokens,
                lengths=lengths,
                together=together,
            )
        state = advance(
            decoder,
            layers,
            held,
            state,
            lengths=lengths,
            seeds=seeds[of_rows],
            choice=choice,
            is_stop=is_stop,
            max_tokens=np.int32(sampling.max_tokens),
            most_steps=np.int32(_STEPS if waiting else room),
            most_ended=np.int32(min(together, len(waiting)) if waiting else own),
        )
        parts = state.going, state.finite, state.counts, state.tokens
        going, finite, counts, written = map(np.asarray, parts)
        ended = np.flatnonzero((answered != _NOBODY) & ~going)
        if not finite[ended].all():
            raise InputError(holding.not_finite(holds))
        found = {
            int(answered[row]): Generated(
                tuple(written[row, : counts[row]].tolist()), bool(counts[row] < sampling.max_tokens)
            )
            for row in ended
        }
        answered[ended] = _NOBODY
        if found:
            yield found


def _of_devices(
    fresh: Int[np.ndarray, "F"], together: int, own: int, devices: int
) -> Int[np.ndarray, "device R"]:
    """Rows in whole groups, each by its place among those of its device; with one that does not
    exist where there are no more."""
    padded = np.full((devices, -(-own // together) * together), own, np.int32)
    for device, of_device in enumerate(padded):
        here = fresh[fresh // own == device] - own * device
        of_device[: len(here)] = here
    return padded


# --- Layers --------------------------------------------------------------------------------------

# What there is of every layer: stacked along a leading axis, or a tuple with one for each.
Layers = Any


def layered(decoder: Decoder) -> Layers:
    """The blocks as the loop over tokens reads them.

    A stack is read layer by layer. XLA's CPU backend then copies a layer's weights out of the
    stack. For those that are widened as they are read this costs nothing; for others it takes
    longer than to multiply a few rows with them. So the latter are made an array for each layer,
    which lies where it lies in the stack.
    """
    stacked = jax.tree.leaves(decoder.blocks)
    in_memory = all(len(leaf.sharding.device_set) == 1 for leaf in stacked)
    if decoder.products.platform != "cpu" or decoder.dtype.itemsize < 4 or not in_memory:
        return decoder.blocks
    host = jax.tree.map(np.asarray, decoder.blocks)

    def block(layer):
        return jax.tree.map(lambda leaf: jax.device_put(leaf[layer], may_alias=True), host)

    return tuple(map(block, range(decoder.config.num_layers)))


def _through(run: Callable, x: Float[Array, "B T d"], blocks: Layers, cache: Layers):
    """x after `run(x, layer, block, cache)` of every layer; and what each gives beside it."""
    if not isinstance(blocks, tuple):
        count = len(jax.tree.leaves(blocks)[0])
        return lax.scan(lambda x, own: run(x, *own), x, (jnp.arange(count), blocks, cache))
    found = []
    for layer, block in enumerate(blocks):
        x, beside = run(x, layer, block, None if cache is None else cache[layer])
        found.append(beside)
    return x, tuple(found)


def _in_chunks(decoder: Decoder) -> bool:
    """Whether logits are made for a part of the vocabulary after the other. XLA's CPU backend would
    else have all its vectors in memory a second time, widened."""
    how = decoder.products
    return how.platform == "cpu" and how.parts is None and decoder.dtype.itemsize < 4


def _tokens_of_a_chunk(decoder: Decoder) -> int:
    config = decoder.config
    return min(config.vocab_size, max(1, _WIDENED // config.hidden_size))


def _converted(decoder: Decoder) -> int:
    """Numbers of weights that are in memory a second time, gathered or in another form: a layer's,
    and the vocabulary's or a chunk of them."""
    if (gathered := batches.gathered(decoder)) or decoder.dtype.itemsize >= 4:
        return gathered
    config = decoder.config
    tokens = _tokens_of_a_chunk(decoder) if _in_chunks(decoder) else config.vocab_size
    return sum(config.block_weights) + tokens * config.hidden_size


# --- Rows ----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rows of a batch have come to.

    Attributes:
        x: the last block's output at the last position that was run.
        cache: of every layer keys and values of the slots, [B, K, C, h], laid out as the products
            with them read them.
        newest: of every layer keys and values of the last position that was run, [B, 1, K, h].
            They are written to their slots at the start of the next step, before what is kept is
            read: written after it was read, all that is kept would be copied in every step.
        tokens: those that were generated; beyond `counts` they mean nothing.
        counts: how many they are.
        going: which rows go on.
        finite: whether all logits were.
    """

    x: Float[Array, "B d"]
    cache: Layers
    newest: Layers
    tokens: Int[Array, "B M"]
    counts: Int[Array, "B"]
    going: Bool[Array, "B"]
    finite: Bool[Array, "B"]


def _fields(rows: Rows) -> tuple:
    """What rows have come to, which `_over` spreads."""
    return tuple(getattr(rows, field.name) for field in dataclasses.fields(rows))


def _over(
    step: Callable[..., Rows],
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    rows: Rows | None,
    of_rows: tuple = (),
    whole: tuple = (),
) -> Rows:
    """step(decoder, layers, holds, rows, *of_rows, *whole) of every device's own rows, which are
    along the first axis of what is `of_rows`."""
    own, along = shard.rows(0), shard.rows(0 if isinstance(layers, tuple) else 1)
    fields = (own, along, along, own, own, own, own)
    given, structure = jax.tree.flatten(list(holds))

    def on_each(decoder, given, rows, *arguments):
        of_device = layers if isinstance(layers, tuple) else decoder.blocks
        rows = None if rows is None else Rows(*rows)
        holds = jax.tree.unflatten(structure, given)
        return _fields(step(decoder, of_device, holds, rows, *arguments))

    found = shard.over(
        on_each,
        decoder,
        *(given, None if rows is None else _fields(rows), *of_rows, *whole),
        given=(
            holding.places(holds),
            shard.WHOLE if rows is None else fields,
            *(own,) * len(of_rows),
            *(shard.WHOLE,) * len(whole),
        ),
        gives=fields,
    )
    return Rows(*found)


@functools.partial(jax.jit, static_argnames=("rows", "length", "room", "kept_as"))
def empty(
    decoder: Decoder, layers: Layers, *, rows: int, length: int, room: int, kept_as: jnp.dtype
) -> Rows:
    """Rows that answer nothing."""
    own = rows // Devices.of(decoder.mesh).number

    def step(decoder, layers, holds, rows):
        return _empty(decoder, layers, rows=own, length=length, room=room, kept_as=kept_as)

    return _over(step, decoder, layers, [], None)


def _empty(
    decoder: Decoder, layers: Layers, *, rows: int, length: int, room: int, kept_as: jnp.dtype
) -> Rows:
    """Those of one device."""
    config = decoder.config

    def of_layers(*shape):
        def zeros(*stack):
            part = stored(jnp.zeros((*stack, *shape), kept_as))
            return part, part

        if isinstance(layers, tuple):
            return tuple(zeros() for _ in layers)
        return zeros(config.num_layers)

    return Rows(
        x=jnp.zeros((rows, config.hidden_size), decoder.compute_dtype),
        cache=of_layers(rows, config.num_kv_heads, length + room, config.head_dim),
        newest=of_layers(rows, 1, config.num_kv_heads, config.head_dim),
        tokens=jnp.zeros((rows, room), jnp.int32),
        counts=jnp.zeros(rows, jnp.int32),
        going=jnp.zeros(rows, bool),
        finite=jnp.ones(rows, bool),
    )


@functools.partial(jax.jit, static_argnames="together", donate_argnames="rows")
def fill(
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    rows: Rows,
    *,
    fresh: Int[Array, "device R"],
    count: Int[Array, "device"],
    tokens: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    together: int,
) -> Rows:
    """Runs prompts, and has their rows begin.

    Args:
        decoder, layers: the model.
        holds: of all rows.
        rows: what they have come to.
        fresh: which rows of each device begin, in whole groups; one that does not exist stands for
            none.
        count: how many begin.
        tokens: all rows' prompts, padded on the left.
        lengths: of the prompts.
        together: rows of a group, whose prompts are run together.
    """

    def step(decoder, layers, holds, rows, fresh, count, tokens, lengths):
        def run_group(state):
            done, rows = state
            group = lax.dynamic_slice_in_dim(fresh[0], done, together)
            x, keys_values = _run_prompts(
                decoder, layers, holding.of_prompts(holds, group), tokens[group], lengths[group]
            )
            return done + together, _begun(rows, group, x, keys_values)

        most = shard.latest(decoder, count[0])
        return lax.while_loop(lambda state: state[0] < most, run_group, (0, rows))[1]

    return _over(step, decoder, layers, holds, rows, (fresh, count, tokens, lengths))


def _run_prompts(
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    tokens: Int[Array, "G N"],
    lengths: Int[Array, "G"],
) -> tuple[Float[Array, "G d"], Layers]:
    """The last block's output at the prompts' last positions; keys and values at all."""
    place = jnp.arange(tokens.shape[1])
    valid = place >= len(place) - lengths[:, None]
    at = jax.vmap(decoder.span)(jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0), valid)
    parts = jnp.where(place == len(place) - 1, Part.LAST, Part.PROMPT)
    x = jax.vmap(decoder.embed)(tokens, at)
    x, keys_values = _run_blocks(decoder, layers, holds, x, at, parts)
    return x[:, -1], keys_values


def _begun(rows: Rows, group: Int[Array, "G"], x: Float[Array, "G d"], keys_values: Layers) -> Rows:
    """The rows, those of the group at the end of their prompts; see `_run_prompts`."""

    def write_prompt(kept, new):
        new = _in_type_of(kept, new.swapaxes(-2, -3))
        return kept.at[..., group, :, : new.shape[-2], :].set(new, mode="drop")

    def write_newest(kept, new):
        return kept.at[..., group, :, :, :].set(_in_type_of(kept, new[..., -1:, :, :]), mode="drop")

    def put(values, new):
        return values.at[group].set(new, mode="drop")

    return dataclasses.replace(
        rows,
        x=put(rows.x, x),
        cache=jax.tree.map(write_prompt, rows.cache, keys_values),
        newest=jax.tree.map(write_newest, rows.newest, keys_values),
        counts=put(rows.counts, 0),
        going=put(rows.going, True),
        finite=put(rows.finite, True),
    )


@functools.partial(jax.jit, donate_argnames="rows")
def advance(
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    rows: Rows,
    *,
    lengths: Int[Array, "B"],
    seeds: UInt[Array, "B"],
    choice: Choice,
    is_stop: Bool[Array, "V"],
    max_tokens: Int[Array, ""],
    most_steps: Int[Array, ""],
    most_ended: Int[Array, ""],
) -> Rows:
    """Generates tokens until so many steps are made, or so many rows of a device do not go on: it
    then waits for the others, but where they gather weights from each other.

    What one step's blocks write, the next step reads: the two are not fused, and so round the same
    whatever edits there are.

    Args:
        decoder, layers: the model.
        holds, lengths, seeds: of the rows: of what they answer.
        rows: what they have come to.
        choice: how tokens are chosen.
        is_stop: which tokens end a response.
        max_tokens: of a response.
        most_steps: after which it ends.
        most_ended: rows of a device that do not go on, at which it ends.
    """

    def until(decoder, layers, holds, rows, lengths, seeds, choice, is_stop, max_tokens, *most):
        most_steps, most_ended = most

        def goes_on(state):
            step, rows = state
            here = (step < most_steps) & (jnp.sum(~rows.going) < most_ended)
            return shard.latest(decoder, here.astype(jnp.int32)) > 0

        def step(state):
            done, rows = state
            logits = _logits(decoder, rows.x)
            finite = rows.finite & (~rows.going | jnp.all(jnp.isfinite(logits), axis=-1))
            token = choice(logits, seeds, rows.counts)
            going = rows.going & finite & ~is_stop[token]
            tokens = rows.tokens.at[jnp.arange(len(token)), rows.counts].set(token, mode="drop")
            counts = rows.counts + going
            x, cache, newest = _step(decoder, layers, holds, rows, token, lengths)
            going &= counts < max_tokens
            return done + 1, Rows(x, cache, newest, tokens, counts, going, finite)

        return lax.while_loop(goes_on, step, (0, rows))[1]

    return _over(
        *(until, decoder, layers, holds, rows, (lengths, seeds)),
        (choice, is_stop, max_tokens, most_steps, most_ended),
    )


def _logits(decoder: Decoder, x: Float[Array, "B d"]) -> Float[Array, "B V"]:
    """Logits of all tokens."""
    if not _in_chunks(decoder):
        return decoder.unembed(x)
    size, chunk = decoder.config.vocab_size, _tokens_of_a_chunk(decoder)

    def add(number, logits):
        first = jnp.minimum(number * chunk, size - chunk)
        found = decoder.unembed(x, first + jnp.arange(chunk), alike=True)
        return lax.dynamic_update_slice_in_dim(logits, found, first, axis=-1)

    return lax.fori_loop(0, -(-size // chunk), add, jnp.zeros((len(x), size), x.dtype))


def _step(
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    rows: Rows,
    token: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B d"], Layers, Layers]:
    """Runs each row's next token; x, cache and newest as in `Rows`."""
    size = jax.tree.leaves(rows.cache)[0].shape[-2] - rows.tokens.shape[1]
    filled = size + rows.counts

    def write(kept, newest):
        newest = jnp.moveaxis(newest[..., 0, :, :], -3, 0)
        return kept.at[..., jnp.arange(len(filled)), :, filled - 1, :].set(newest)

    cache = jax.tree.map(write, rows.cache, rows.newest)
    slots = jnp.arange(size + rows.tokens.shape[1])
    positions = slots - (size - lengths)[:, None]
    seen = positions, (positions >= 0) & (slots < filled[:, None])
    one = jnp.ones((len(token), 1), bool)
    at = jax.vmap(decoder.span)((lengths + rows.counts)[:, None], one)
    x = jax.vmap(decoder.embed)(token[:, None], at)
    parts = jnp.full(1, Part.GENERATED)
    x, newest = _run_blocks(decoder, layers, holds, x, at, parts, cache, seen)
    return x[:, 0], cache, jax.tree.map(_in_type_of, rows.newest, newest)


def _in_type_of(kept: Shaped[Array, "..."], new: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Keys or values as they are kept."""
    return stored(new.astype(numbers(kept).dtype))


def _run_blocks(
    decoder: Decoder,
    layers: Layers,
    holds: Sequence[Hold],
    x: Float[Array, "B T d"],
    at: Span,
    parts: Int[Array, "T"],
    cache: Layers = None,
    seen: tuple[Int[Array, "B C"], Bool[Array, "B C"]] | None = None,
) -> tuple[Float[Array, "B T d"], Layers]:
    """Runs all blocks on some positions of each row.

    Args:
        decoder, layers: the model.
        holds: of the rows.
        x: what enters the first block.
        at: the positions.
        parts: which `Part` each belongs to.
        cache: keys and values that come before, as in `Rows`; None where nothing does.
        seen: positions of its slots, and which of them hold something.

    Returns:
        The last block's output; and of every layer keys and values, [B, T, K, h].
    """

    def run_layer(x, layer, block, kept):
        block = decoder.whole(block)

        def run_row(x, at, kept, seen, holds):
            prefix = None
            if kept is not None:
                keys, values = (numbers(part).swapaxes(0, 1) for part in kept)
                prefix = Cache(keys, values, *seen)
            tap = decoder.tap(lambda site, value: edits.hold(holds, site, layer, parts, value))
            x, key, value = block.run(x, at, decoder.traits.at(layer), prefix, tap)
            return x, (key, value)

        return holding.over_rows(run_row, holds)(x, at, kept, seen, holds)

    return _through(run_layer, x, layers, cache)
