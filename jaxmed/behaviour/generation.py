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

Products with weights are made as the decoder's `at_precision` says, in float32 or as exactly; all
others are float32 on every device.

Shapes are named in `models.shapes`; B are the rows of a batch, N the padded length of a prompt, M
the generated tokens that there is room for, C = N + M the slots of the cache, V the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxmed.behaviour import batches, holding
from jaxmed.behaviour.sampling import Choice, Sampling
from models import edits
from models.decoder import Block, Decoder
from models.edits import Hold, Part
from models.errors import InputError
from models.layers import Cache, Span

PRECISION = "float32"  # of products of activations


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
    batch_size: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Generated]:
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
    sampling.check()
    _check_seeds(seeds, len(prompts))
    _check_stop(stop, config.vocab_size)
    batches.check_prompts(config, prompts, sampling.max_tokens)
    holds = holding.fitted(config, holds, len(prompts))
    room = batches.room_for(sampling.max_tokens)
    rows = batches.sizes(
        decoder,
        holds,
        prompts,
        room=room,
        weights=_copied(decoder),
        memory=memory,
        batch_size=batch_size,
    )
    blocks = unstacked(decoder)
    is_stop = np.zeros(config.vocab_size, bool)
    is_stop[list(stop)] = True
    responses = {}
    for length, members in batches.by_length(prompts, rows.__getitem__):
        dummies = rows[length] - len(members)
        found = _answer(
            decoder,
            blocks,
            [prompts[member] for member in members] + [(0,)] * dummies,
            filled=len(members),
            length=length,
            room=room,
            seeds=np.array([seeds[member] for member in members] + [0] * dummies, np.uint32),
            holds=holding.of_prompts(holds, members + members[:1] * dummies),
            is_stop=is_stop,
            sampling=sampling,
        )
        for member, response in zip(members, found, strict=True):
            if response is None:
                raise InputError(holding.not_finite(holds))
            responses[member] = response
        if progress is not None:
            progress(len(members))
    return [responses[index] for index in range(len(prompts))]


def _copied(decoder: Decoder) -> int:
    """Bytes of weights that are there a second time: of the blocks as they are unstacked, and of
    what is made of 16-bit ones once for all tokens."""
    blocks = jax.tree.leaves(decoder.blocks)
    table = decoder.embedding if decoder.unembedding is None else decoder.unembedding
    made = [leaf.size for leaf in (*blocks, table[...]) if leaf.dtype.itemsize == 2]
    return sum(leaf.nbytes for leaf in blocks) + 4 * sum(made)


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


def _answer(
    decoder: Decoder,
    blocks: tuple[Block, ...],
    prompts: Sequence[Sequence[int]],
    *,
    filled: int,
    length: int,
    room: int,
    seeds: UInt[np.ndarray, "B"],
    holds: Sequence[Hold],
    is_stop: Bool[np.ndarray, "V"],
    sampling: Sampling,
) -> list[Generated | None]:
    """The responses to the first `filled` rows of a batch; None where logits were not finite."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    choice = Choice(
        keys=jax.vmap(jax.random.key)(seeds),
        temperature=jnp.float32(sampling.temperature),
        top_p=jnp.float32(sampling.top_p),
        top_k=jnp.int32(sampling.top_k),
    )
    tokens = batches.padded(prompts, length, left=True)
    x, cache = prefill(decoder, holds, tokens, lengths, room)
    generated = decode(
        decoder,
        blocks,
        holds,
        x,
        cache,
        lengths=lengths,
        choice=choice,
        is_stop=is_stop,
        going=np.arange(len(prompts)) < filled,
        max_tokens=np.int32(sampling.max_tokens),
        room=room,
    )
    rows = list(zip(*map(np.asarray, generated), strict=True))
    return [
        Generated(tuple(row[:count].tolist()), bool(stopped)) if finite else None
        for row, count, stopped, finite in rows[:filled]
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


@functools.partial(jax.jit, static_argnames="room")
def prefill(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    room: int,
) -> tuple[Float[Array, "B d"], list[Kept]]:
    """The last block's output at the last position of prompts padded on the left, and what is kept
    of all positions, with room for the tokens that follow."""
    size = tokens.shape[1]
    parts = jnp.where(jnp.arange(size) == size - 1, Part.LAST, Part.PROMPT)

    def run(tokens, length, holds):
        valid = jnp.arange(size) >= size - length
        x, kept = holding.run_blocks(decoder, holds, tokens, valid, parts, keep=("keys", "values"))
        return x[-1], kept["keys"], kept["values"]

    def padded(stacked):
        return jnp.pad(stacked.swapaxes(1, 2), [(0, 0), (0, 0), (0, room), (0, 0)])

    x, *stacked = holding.over_rows(run, holds)(tokens, lengths, holds)
    layers = [[part[:, layer] for part in stacked] for layer in range(decoder.config.num_layers)]
    cache = [Kept(*map(padded, layer), *(part[:, -1:] for part in layer)) for layer in layers]
    return x, cache


@functools.partial(jax.jit, static_argnames="room")
def decode(
    decoder: Decoder,
    blocks: tuple[Block, ...],
    holds: Sequence[Hold],
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


def _step(
    decoder: Decoder,
    blocks: tuple[Block, ...],
    holds: Sequence[Hold],
    cache: list[Kept],
    tokens: Int[Array, "B"],
    lengths: Int[Array, "B"],
    step: Int[Array, ""],
    room: int,
) -> tuple[Float[Array, "B d"], list[Kept]]:
    """The last block's output at the generated tokens of a step, and the cache with them."""
    slots = jnp.arange(cache[0].keys.shape[2])
    filled = len(slots) - room + step
    at = jax.vmap(decoder.span)((lengths + step)[:, None], jnp.ones((len(tokens), 1), bool))
    x = jax.vmap(decoder.embed)(tokens[:, None], at)
    positions = slots - (len(slots) - room - lengths)[:, None]
    valid = (positions >= 0) & (slots < filled)
    after = []
    for layer, (block, kept) in enumerate(zip(blocks, cache, strict=True)):
        kept = kept.with_newest_at(filled - 1)
        run = holding.over_rows(functools.partial(_run_block, decoder, block, layer), holds)
        x, *newest = run(x, at, positions, valid, kept.keys, kept.values, holds)
        after.append(Kept(kept.keys, kept.values, *newest))
    return x[:, 0], after


def _run_block(
    decoder: Decoder,
    block: Block,
    layer: int,
    x: Float[Array, "1 d"],
    at: Span,
    positions: Int[Array, "C"],
    valid: Bool[Array, "C"],
    keys: Float[Array, "K C h"],
    values: Float[Array, "K C h"],
    holds: Sequence[Hold],
) -> tuple[Float[Array, "1 d"], Float[Array, "1 K h"], Float[Array, "1 K h"]]:
    """A block's output at one generated token of one row, and its keys and values there."""
    prefix = Cache(keys.swapaxes(0, 1), values.swapaxes(0, 1), positions, valid)
    parts = jnp.full(1, Part.GENERATED)
    tap = decoder.tap(lambda site, value: edits.hold(holds, site, layer, parts, value))
    return block.run(x, at, decoder.traits.at(layer), prefix, tap)


@jax.jit
def unstacked(decoder: Decoder) -> tuple[Block, ...]:
    """The blocks, each with weights of its own: a loop over stacked ones would copy each layer's
    out of the stack for every token, which takes longer than multiplying with them."""
    return tuple(decoder.block(layer) for layer in range(decoder.config.num_layers))
