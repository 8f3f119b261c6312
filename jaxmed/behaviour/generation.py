"""Text that a model generates, plain or under interventions that last through generation.

Prompts are padded on the left, so that all rows of a batch write their next key and value in the
same slot of the cache; each row keeps its own rotary positions. A batch takes two compiled
functions: one runs the prompts, one is the loop over generated tokens. Both are the same for all
prompts of a bucket of lengths, all sampling settings and all holds of a site.

What a prompt is answered depends on the prompt, its own seed and its own holds: batches are of one
size, rows that no prompt fills hold a dummy, and a prompt is padded to the bucket of its own length
and not of its neighbours'. So the same program computes it in any company and order. Another
`batch_size` (as another `memory` may bring) or bucket of `max_tokens` is another program, which may
round otherwise in the last bits: its tokens are the same unless two tie within that rounding.

Products are float32 on every device (see `jax.default_matmul_precision`).

Shapes are named in `models.layers`; B are the rows of a batch, N the padded length of a prompt, M
the generated tokens that there is room for, C = N + M the slots of the cache, V the vocabulary.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmed.engine import capture
from jaxmed.engine import memory as memory_lib
from models import checkpoint
from models import edits as editing
from models.config import DecoderConfig
from models.decoder import Block, Decoder
from models.edits import Hold, Part
from models.errors import InputError
from models.layers import Cache
from models.sites import Site

# Rows of a batch, if they fit the memory.
_ROWS = {"cpu": 16}
_ROWS_ON_ACCELERATORS = 64
# Lengths of up to this many generated tokens share their compilations.
_FEWEST = 16
# Logits of teacher-forced positions that are in memory at once.
_LOGITS = 2**22

PRECISION = "float32"  # of matrix products


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default the likeliest, up to 128.

    Attributes:
        max_tokens: generated tokens at most, the stop token included.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn which together have this probability
            (arXiv 1904.09751); 1 for all.
        top_k: only the so many likeliest tokens are drawn; 0 for all.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Response:
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
    sampling: Sampling = Sampling(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    holds: Sequence[Hold] = (),
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Response]:
    """One response to each prompt.

    Args:
        decoder: the model.
        prompts: token ids.
        stop: tokens that end a response; if there are none, all go on to the limit.
        sampling: how tokens are chosen.
        seeds: one for each prompt, in [0, 2^32); which number it is by default.
        holds: interventions, made together; a shift of each prompt's own has them in their order.
        batch_size: rows of a batch; by default as many as fit the memory, up to a constant.
        memory: bytes for all but the decoder; `memory.free()` by default.
        progress: told after each batch how many prompts it has answered.

    Raises:
        InputError: a prompt is empty, too long for the model or has a token outside the
            vocabulary, a setting or a seed is out of range, the memory does not suffice, or the
            holds drive the logits out of the range of their type.
        ValueError: a hold does not fit the model or the prompts.
    """
    config = decoder.config
    seeds = range(len(prompts)) if seeds is None else seeds
    _check(config, prompts, stop, sampling, seeds)
    check_batch_size(batch_size)
    holds = fitted(config, holds, len(prompts))
    room = capture.bucket(sampling.max_tokens, _FEWEST)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.blocks))
    sizes = _batch_sizes(decoder, holds, prompts, room, 1, weights, memory, batch_size)
    blocks = _unstacked(decoder)
    is_stop = np.zeros(config.vocab_size, bool)
    is_stop[list(stop)] = True
    responses = [None] * len(prompts)
    for members, rows in _batches(prompts, sizes):
        batch = [prompts[member] for member in members]
        padding = rows - len(batch)
        found = _answer(
            *(decoder, blocks, batch + [(0,)] * padding, room, is_stop, sampling),
            np.array([seeds[member] for member in members] + [0] * padding, np.uint32),
            of_prompts(holds, members + members[:1] * padding),
            len(batch),
        )
        for member, response in zip(members, found, strict=False):
            if response is None:
                raise InputError(_not_finite(holds))
            responses[member] = response
        if progress is not None:
            progress(len(batch))
    return responses


@dataclasses.dataclass(frozen=True)
class PerToken:
    """A number for every token of every response.

    Attributes:
        values: [token] of each sequence.
    """

    values: tuple[np.ndarray, ...]

    @property
    def means(self) -> np.ndarray:
        """Of each sequence, float64."""
        return np.array([np.mean(values, dtype=float) for values in self.values])

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each response."""
        return np.array([len(values) for values in self.values])


# Prompt and response.
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


def logprobs(
    decoder: Decoder,
    sequences: Sequences,
    *,
    holds: Sequence[Hold] = (),
    batch_size: int | None = None,
    memory: int | None = None,
) -> PerToken:
    """Log-probability (natural) of each response token, given what stands before it.

    The perplexity of a response is exp(-mean). Holds act as in `generate`: on the positions of
    response tokens as on those of generated ones.

    Args:
        decoder: the model.
        sequences: prompt and response of each, token ids.
        holds, batch_size, memory: as in `generate`.

    Raises:
        InputError, ValueError: as in `generate`; or a response is empty.
    """
    return _forced(_logprobs, decoder, sequences, holds, batch_size, memory)


def kl(
    decoder: Decoder,
    sequences: Sequences,
    holds: Sequence[Hold],
    *,
    batch_size: int | None = None,
    memory: int | None = None,
) -> PerToken:
    """KL(plain || edited) in nats, of the distributions that each response token is drawn from.

    Holds of nothing give exactly 0. Arguments and errors are those of `logprobs`.
    """
    return _forced(_divergences, decoder, sequences, holds, batch_size, memory)


@jax.default_matmul_precision(PRECISION)
def _forced(read: Callable, decoder, sequences, holds, batch_size, memory) -> PerToken:
    """What `read` reads of teacher-forced responses, in batches."""
    for number, (_, response) in enumerate(sequences):
        if not len(response):
            raise InputError(f"response {number} is empty: there is nothing to read")
    check_batch_size(batch_size)
    runs = [(*prompt, *response) for prompt, response in sequences]
    check_prompts(decoder.config, [prompt for prompt, _ in sequences], 0)
    check_prompts(decoder.config, runs, 0)
    holds = fitted(decoder.config, holds, len(sequences))
    sizes = _batch_sizes(decoder, holds, runs, 0, 2, 0, memory, batch_size)
    room = capture.bucket(max((len(response) for _, response in sequences), default=1), _FEWEST)
    found = [None] * len(sequences)
    for members, rows in _batches(runs, sizes):
        filled = members + members[:1] * (rows - len(members))
        tokens = np.zeros((rows, _padded_length(runs[members[0]])), np.int32)
        targets = np.zeros((rows, room), np.int32)
        for row, member in enumerate(filled):
            tokens[row, : len(runs[member]) - 1] = runs[member][:-1]
            targets[row, : len(sequences[member][1])] = sequences[member][1]
        lengths = np.array([len(sequences[member][0]) for member in filled], np.int32)
        ends = np.array([len(runs[member]) - 1 for member in filled], np.int32)
        values = np.asarray(
            read(decoder, of_prompts(holds, filled), tokens, lengths, ends, targets)
        )
        for member, row in zip(members, values, strict=False):
            found[member] = row[: len(sequences[member][1])]
            if not np.isfinite(found[member]).all():
                raise InputError(_not_finite(holds))
    return PerToken(tuple(found))


@jax.jit
def _logprobs(decoder: Decoder, holds, tokens, lengths, ends, targets) -> Float[Array, "B R"]:
    """Log-probabilities of the targets [B, R] that follow the prompts."""
    x = _response_rows(decoder, holds, tokens, lengths, ends, targets.shape[1])

    def read(row):
        x, target = row
        return jax.nn.log_softmax(decoder.unembed(x[None])[0])[target]

    return _by_position(decoder, read, (x, targets))


@jax.jit
def _divergences(decoder: Decoder, holds, tokens, lengths, ends, targets) -> Float[Array, "B R"]:
    """KL(plain || edited) where the targets [B, R] are predicted."""
    runs = tuple(
        _response_rows(decoder, chosen, tokens, lengths, ends, targets.shape[1])
        for chosen in ([], holds)
    )

    def read(rows):
        plain, edited = (jax.nn.log_softmax(decoder.unembed(x[None])[0]) for x in rows)
        # p (d + e^-d - 1) sums to p d, but a rounded normaliser changes it in second order only.
        change = plain - edited
        near = jnp.abs(change) < 1
        small = jnp.exp(plain) * (jnp.expm1(-jnp.where(near, change, 0)) + change)
        large = jnp.exp(plain) * (change - 1) + jnp.exp(edited)
        return jnp.sum(jnp.where(near, small, large))

    return _by_position(decoder, read, runs)


def _response_rows(decoder, holds, tokens, lengths, ends, room: int) -> Float[Array, "B R d"]:
    """The last block's output at the positions that predict response tokens."""
    positions = jnp.arange(tokens.shape[1])

    def run(tokens, length, end, holds):
        parts = jnp.where(positions < length, Part.LAST, Part.GENERATED)
        parts = jnp.where(positions < length - 1, Part.PROMPT, parts)
        x, _ = _run_blocks(decoder, holds, tokens, positions < end, parts)
        return jnp.take(x, length - 1 + jnp.arange(room), axis=0, mode="clip")

    return _over_rows(run, holds)(tokens, lengths, ends, holds)


def _by_position(decoder: Decoder, read: Callable, rows) -> Float[Array, "B R"]:
    """`read` of each position; the whole vocabulary's logits are there for a few at a time."""
    shape = jax.tree.leaves(rows)[0].shape[:2]
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), rows)
    together = max(1, _LOGITS // decoder.config.vocab_size)
    return jax.lax.map(read, flat, batch_size=together).reshape(shape)


def _answer(decoder, blocks, prompts, room, is_stop, sampling, seeds, holds, filled):
    """The responses to the first `filled` rows of a batch; None where logits were not finite."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _padded_length(prompts[0])), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) :] = prompt
    choice = Choice(
        keys=jax.vmap(jax.random.key)(seeds),
        temperature=np.float32(sampling.temperature),
        top_p=np.float32(sampling.top_p),
        top_k=np.int32(sampling.top_k),
    )
    x, cache = _prefill(decoder, holds, tokens, lengths, room)
    generated = _decode(
        *(decoder, blocks, holds, x, cache, lengths, choice, is_stop),
        np.arange(len(prompts)) < filled,
        np.int32(sampling.max_tokens),
        room,
    )
    return [
        Response(tuple(row[:count].tolist()), bool(stopped)) if finite else None
        for row, count, stopped, finite in zip(*map(np.asarray, generated), strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """A layer's keys and values, laid out as the products with them read them.

    The newest ones are written at the start of the next step, before what is kept is read: written
    after it was read, all that is kept would be copied in every step.

    Attributes:
        keys, values: of the slots, [B, K, C, h].
        newest_key, newest_value: of the last position that was run, [B, 1, K, h].
    """

    keys: Float[Array, "B K C h"]
    values: Float[Array, "B K C h"]
    newest_key: Float[Array, "B 1 K h"]
    newest_value: Float[Array, "B 1 K h"]

    def with_newest_at(self, slot: Int[Array, ""]) -> "Kept":
        """With the newest ones in their slot."""

        def write(kept, newest):
            return jax.lax.dynamic_update_slice(kept, newest.swapaxes(1, 2), (0, 0, slot, 0))

        return dataclasses.replace(
            self,
            keys=write(self.keys, self.newest_key),
            values=write(self.values, self.newest_value),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How the tokens of a batch are chosen; arrays, so that one program serves all settings.

    Attributes:
        keys: of each row, from its seed.
        temperature, top_p, top_k: as in `Sampling`.
    """

    keys: Key[Array, "B"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]

    def __call__(self, logits: Float[Array, "B V"], step: Int[Array, ""]) -> Int[Array, "B"]:
        """The tokens of a step; where nothing is drawn, nothing is sorted."""

        def draw():
            scores = logits.astype(jnp.float32) / self.temperature
            restricted = (self.top_k > 0) | (self.top_p < 1)
            scores = jax.lax.cond(restricted, jax.vmap(self.restrict), lambda x: x, scores)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(self.keys)
            return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

        def likeliest():
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.cond(self.temperature > 0, draw, likeliest)

    def restrict(self, scores: Float[Array, "V"]) -> Float[Array, "V"]:
        """Log-probabilities, up to a constant, with -inf where a token is not to be drawn.

        First the top k, ties with the last of them included; then, of what is left, the fewest
        tokens that reach the probability top p. That order, and which of equals go, are those of
        transformers.
        """
        size = len(scores)
        ascending = jnp.argsort(scores)
        last = scores[ascending[size - jnp.clip(self.top_k, 1, size)]]
        scores = jnp.where((self.top_k > 0) & (scores < last), -jnp.inf, scores)
        below = jnp.cumsum(jax.nn.softmax(scores[ascending]))
        dropped = (below <= 1 - self.top_p) & (jnp.arange(size) < size - 1) & (self.top_p < 1)
        return jnp.where(jnp.zeros(size, bool).at[ascending].set(dropped), -jnp.inf, scores)


@functools.partial(jax.jit, static_argnames="room")
def _prefill(
    decoder: Decoder, holds, tokens: Int[Array, "B N"], lengths: Int[Array, "B"], room: int
) -> tuple[Float[Array, "B d"], list[Kept]]:
    """The last block's output at the last position of prompts padded on the left, and what is kept
    of all positions, with room for the tokens that follow."""
    size = tokens.shape[1]
    parts = jnp.where(jnp.arange(size) == size - 1, Part.LAST, Part.PROMPT)

    def run(tokens, length, holds):
        valid = jnp.arange(size) >= size - length
        x, kept = _run_blocks(decoder, holds, tokens, valid, parts, keep=("keys", "values"))
        return x[-1], kept["keys"], kept["values"]

    def padded(stacked):
        return jnp.pad(stacked.swapaxes(1, 2), [(0, 0), (0, 0), (0, room), (0, 0)])

    x, *stacked = _over_rows(run, holds)(tokens, lengths, holds)
    layers = [[part[:, layer] for part in stacked] for layer in range(decoder.config.num_layers)]
    cache = [Kept(*map(padded, layer), *(part[:, -1:] for part in layer)) for layer in layers]
    return x, cache


def _run_blocks(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Int[Array, "T"],
    valid: Bool[Array, "T"],
    parts: Int[Array, "T"],
    keep: Sequence[str] = (),
) -> tuple[Float[Array, "T d"], dict[str, Float[Array, "L T ..."]]]:
    """The last block's output for one sequence under holds; and what is kept of all layers."""
    at = decoder.span(jnp.maximum(jnp.cumsum(valid) - 1, 0), valid)

    def change(layer, site, value):
        return editing.hold(holds, site, layer, parts, value)

    return decoder.run_blocks(decoder.embed(tokens, at), at, change, keep=keep)


@functools.partial(jax.jit, static_argnames="room")
def _decode(
    decoder: Decoder,
    blocks: tuple[Block, ...],
    holds,
    x: Float[Array, "B d"],
    cache: list[Kept],
    lengths: Int[Array, "B"],
    choice: Choice,
    is_stop: Bool[Array, "V"],
    going: Bool[Array, "B"],
    max_tokens: Int[Array, ""],
    room: int,
) -> tuple[Int[Array, "B M"], Int[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:
    """Tokens that follow the prompts, how many they are without the stop token, whether there was
    one, and whether all logits were finite. Rows go on until they stop, or have others; those that
    are not going never start.

    What one step's blocks write, the next step reads: the two are not fused, and so round the same
    whatever edits there are.
    """

    def goes_on(state):
        step, _, _, _, going, *_ = state
        return (step < max_tokens) & jnp.any(going)

    def advance(state):
        step, x, cache, tokens, going, counts, finite = state
        logits = decoder.unembed(x)
        finite &= ~going | jnp.all(jnp.isfinite(logits), axis=-1)
        token = choice(logits, step)
        going &= finite & ~is_stop[token]
        written = jnp.where(going, token, 0)[:, None]
        tokens = jax.lax.dynamic_update_slice(tokens, written, (0, step))
        x, cache = _step(decoder, blocks, holds, cache, token, lengths, step, room)
        return step + 1, x, cache, tokens, going, counts + going, finite

    rows = len(lengths)
    nothing = jnp.zeros((rows, room), jnp.int32), going, jnp.zeros(rows, jnp.int32)
    all_finite = jnp.ones(rows, bool)
    state = jax.lax.while_loop(goes_on, advance, (0, x, cache, *nothing, all_finite))
    _, _, _, tokens, unfinished, counts, finite = state
    return tokens, counts, ~unfinished, finite


def _step(decoder, blocks, holds, cache, tokens, lengths, step, room):
    """The last block's output [B, d] at the generated tokens [B] of a step, and the cache with
    them."""
    slots = jnp.arange(cache[0].keys.shape[2])
    filled = len(slots) - room + step
    at = jax.vmap(decoder.span)((lengths + step)[:, None], jnp.ones((len(tokens), 1), bool))
    x = jax.vmap(decoder.embed)(tokens[:, None], at)
    positions = slots - (len(slots) - room - lengths)[:, None]
    valid = (positions >= 0) & (slots < filled)
    parts = jnp.full(1, Part.GENERATED)
    after = []
    for layer, (block, kept) in enumerate(zip(blocks, cache, strict=True)):
        kept = kept.with_newest_at(filled - 1)

        def run(x, at, positions, valid, keys, values, holds, layer=layer, block=block):
            prefix = Cache(keys.swapaxes(0, 1), values.swapaxes(0, 1), positions, valid)
            tap = decoder.tap(
                lambda site, value: editing.hold(holds, site, layer, parts, value),
            )
            return block.run(x, at, decoder.traits.at(layer), prefix, tap)

        x, *newest = _over_rows(run, holds)(x, at, positions, valid, kept.keys, kept.values, holds)
        after.append(Kept(kept.keys, kept.values, *newest))
    return x[:, 0], after


def _over_rows(run: Callable, holds: Sequence[Hold]) -> Callable:
    """`run` for all rows of a batch; its last argument are the holds."""

    def mapped(*arguments):
        axes = [
            Hold(hold.site, None, 0 if hold.of_each_prompt else None, None, None, None)
            for hold in holds
        ]
        return jax.vmap(run, in_axes=(*(0,) * (len(arguments) - 1), axes))(*arguments)

    return mapped


@jax.jit
def _unstacked(decoder: Decoder) -> tuple[Block, ...]:
    """The blocks, each with weights of its own: a loop over stacked ones would copy each layer's
    out of the stack for every token, which takes longer than multiplying with them."""
    return tuple(decoder.block(layer) for layer in range(decoder.config.num_layers))


def _padded_length(prompt: Sequence[int]) -> int:
    return capture.bucket(len(prompt), capture.SHORTEST)


def _not_finite(holds: Sequence[Hold]) -> str:
    cause = ": what is held is too far from its own values" if holds else ": they overflow"
    return f"the model's logits are not finite{cause}"


def _batches(
    prompts: Sequence[Sequence[int]], sizes: Mapping[int, int]
) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts whose lengths are in the same bucket, and how many rows their batch has,
    which they may not fill.

    Args:
        prompts: token ids.
        sizes: of a batch, by the padded length of its prompts.
    """
    lengths = [_padded_length(prompt) for prompt in prompts]
    for length, rows in sizes.items():
        members = [index for index, own in enumerate(lengths) if own == length]
        for first in range(0, len(members), rows):
            yield members[first : first + rows], rows


def fitted(config: DecoderConfig, holds: Sequence[Hold], prompts: int) -> list[Hold]:
    """The holds with scale and shift of the site's full shape, so that all compile to one program.

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
            parts.append(jnp.broadcast_to(part, whole))
        found.append(dataclasses.replace(hold, scale=parts[0], shift=parts[1]))
    return found


def of_prompts(holds: Sequence[Hold], prompts: list[int]) -> list[Hold]:
    """The holds of these prompts alone, in this order."""
    return [
        dataclasses.replace(hold, shift=hold.shift[np.array(prompts)])
        if hold.of_each_prompt
        else hold
        for hold in holds
    ]


def _check(config: DecoderConfig, prompts, stop, sampling: Sampling, seeds) -> None:
    """Raises `InputError` where something cannot be used."""
    if sampling.max_tokens < 1:
        raise InputError(f"max_tokens = {sampling.max_tokens}: must be at least 1")
    if not 0 <= sampling.temperature < math.inf:
        raise InputError(f"temperature = {sampling.temperature}: must be a number from 0 on")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p = {sampling.top_p}: must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise InputError(f"top_k = {sampling.top_k}: must be at least 0")
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"seed {bad[0]}: must be in [0, 2^32)")
    if bad := [token for token in stop if not 0 <= token < config.vocab_size]:
        raise InputError(
            f"stop token {bad[0]} is outside the vocabulary of {config.vocab_size}: the tokenizer "
            "is not that of the model"
        )
    check_prompts(config, prompts, sampling.max_tokens)


def check_prompts(config: DecoderConfig, prompts, more: int) -> None:
    """Raises `InputError` for the first prompt that cannot be run with so many more tokens."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: a response needs a token to follow")
        if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise InputError(
                f"prompt {number} has the token {bad[0]}, outside the vocabulary of "
                f"{config.vocab_size}"
            )
        if len(prompt) + more > config.max_positions:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and {more} more are to follow: the "
                f"model has {config.max_positions} positions; shorten it, or ask for fewer"
            )


def check_batch_size(batch_size: int | None) -> None:
    """Raises `InputError` if it is no number of rows."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be at least 1")


def _batch_sizes(
    decoder: Decoder,
    holds: Sequence[Hold],
    prompts: Sequence[Sequence[int]],
    room: int,
    runs: int,
    weights: int,
    memory: int | None,
    batch_size: int | None,
) -> dict[int, int]:
    """Rows of a batch by the padded length of its prompts, the longest first.

    Args:
        decoder, holds, prompts: what is run.
        room: slots of the cache for generated tokens.
        runs: how many there are of each prompt.
        weights: bytes of weights that are there a second time.
        memory: bytes; `memory.free()` by default.
        batch_size: rows of all batches; by default a power of two that fits the memory.

    Raises:
        InputError: the longest prompt does not fit.
    """
    lengths = sorted(set(map(_padded_length, prompts)), reverse=True)
    if batch_size:
        return dict.fromkeys(lengths, batch_size)
    left = (memory_lib.free() if memory is None else memory) - weights
    return {length: _most_rows(decoder, holds, length, room, runs, left) for length in lengths}


def _most_rows(decoder: Decoder, holds, length: int, room: int, runs: int, left: int) -> int:
    config = decoder.config
    width, hidden = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # The prompt's keys and values are there twice while the cache is made of them.
    cache = 2 * config.num_layers * kv * (2 * length + room)
    run = length * (10 * width + 4 * hidden + 3 * heads) + 3 * config.num_heads * length**2
    held = sum(hold.shift[0].size for hold in holds if hold.of_each_prompt)
    row = runs * cache + run + held + 6 * config.vocab_size
    row *= decoder.compute_dtype.itemsize
    if left < row:
        raise InputError(
            f"the memory that is left, {left / 2**30:.4f} GiB, is too little for a single prompt "
            f"of {length} tokens, {row / 2**30:.4f} GiB: take a larger device, shorter prompts or "
            "fewer tokens"
        )
    most = _ROWS.get(jax.default_backend(), _ROWS_ON_ACCELERATORS)
    return min(most, 1 << ((left // row).bit_length() - 1))


def stop_tokens(folder: str | os.PathLike, tokenizer) -> frozenset[int]:
    """Tokens that end a checkpoint's responses.

    Those of its generation_config.json (which names the end of a turn, where a chat has one) and
    config.json, and the tokenizer's own end of sequence.

    Args:
        folder: the checkpoint's.
        tokenizer: its tokenizer; None if it has none.

    Raises:
        InputError: a file is not JSON, or what it names are not token ids.
    """
    found = set() if tokenizer is None else {tokenizer.eos_token_id}
    for name in (checkpoint.GENERATION_CONFIG, "config.json"):
        file = pathlib.Path(folder) / name
        if not file.is_file():
            continue
        try:
            named = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: not a JSON object ({error})") from None
        named = named if isinstance(named, list) else [named]
        if bad := [token for token in named if type(token) not in (int, type(None))]:
            raise InputError(f"{file}: eos_token_id is {bad[0]!r}, which is no token id")
        found.update(named)
    return frozenset(found - {None})
