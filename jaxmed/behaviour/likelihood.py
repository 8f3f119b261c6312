"""How likely given responses are, plain or with units held: log-probabilities, and divergence.

Responses are teacher-forced, and padded on the right. Products are made as in `generation`; B are
the rows of a batch, R the length that responses are padded to.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.behaviour import batches, holding
from jaxmed.behaviour.generation import PRECISION
from jaxmed.engine import cost
from models.decoder import Decoder
from models.edits import Hold, Part
from models.errors import InputError

# Prompt and response, token ids.
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class PerToken:
    """A number for every token of every response.

    Attributes:
        values: [token] of each sequence.
    """

    values: tuple[Float[np.ndarray, "token"], ...]

    @property
    def means(self) -> Float[np.ndarray, "sequence"]:
        """Of each sequence, float64."""
        return np.array([np.mean(values, dtype=float) for values in self.values])

    @property
    def counts(self) -> Int[np.ndarray, "sequence"]:
        """Tokens of each response."""
        return np.array([len(values) for values in self.values])


def logprobs(
    decoder: Decoder,
    sequences: Sequences,
    *,
    holds: Sequence[Hold] = (),
    batch_size: int | None = None,
    memory: int | None = None,
) -> PerToken:
    """Log-probability (natural) of each response token, given what stands before it.

    The perplexity of a response is exp(-mean). Holds act as in `generation.generate`: on the
    positions of response tokens as on those of generated ones.

    Args:
        decoder: the model.
        sequences: prompt and response of each, token ids.
        holds, batch_size, memory: as in `generation.generate`.

    Raises:
        InputError, ValueError: as in `generation.generate`; or a response is empty.
    """
    return _forced(response_logprobs, decoder, sequences, holds, batch_size, memory)


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
    return _forced(response_divergences, decoder, sequences, holds, batch_size, memory)


@jax.default_matmul_precision(PRECISION)
def _forced(
    read: Callable[..., Float[Array, "B R"]],
    decoder: Decoder,
    sequences: Sequences,
    holds: Sequence[Hold],
    batch_size: int | None,
    memory: int | None,
) -> PerToken:
    """What `read` reads of teacher-forced responses, in batches."""
    for number, (_, response) in enumerate(sequences):
        if not len(response):
            raise InputError(f"response {number} is empty: there is nothing to read")
    runs = [(*prompt, *response) for prompt, response in sequences]
    batches.check_prompts(decoder.config, [prompt for prompt, _ in sequences])
    batches.check_prompts(decoder.config, runs)
    holds = holding.fitted(decoder.config, holds, len(sequences))
    rows = batches.sizes(decoder, holds, runs, runs=2, memory=memory, batch_size=batch_size)
    room = batches.room_for(max((len(response) for _, response in sequences), default=1))
    found = {}
    for length, members in batches.by_length(runs, rows.__getitem__):
        filled = members + members[:1] * (rows[length] - len(members))
        values = read(
            decoder,
            holding.of_prompts(holds, np.array(filled)),
            tokens=batches.padded([runs[member][:-1] for member in filled], length),
            lengths=np.array([len(sequences[member][0]) for member in filled], np.int32),
            ends=np.array([len(runs[member]) - 1 for member in filled], np.int32),
            targets=batches.padded([sequences[member][1] for member in filled], room),
        )
        for member, row in zip(members, np.asarray(values), strict=False):
            found[member] = row[: len(sequences[member][1])]
            if not np.isfinite(found[member]).all():
                raise InputError(holding.not_finite(holds))
    return PerToken(tuple(found[index] for index in range(len(sequences))))


@jax.jit
def response_logprobs(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    ends: Int[Array, "B"],
    targets: Int[Array, "B R"],
) -> Float[Array, "B R"]:
    """Log-probabilities of the targets that follow the prompts."""

    def step(decoder, holds, tokens, lengths, ends, targets):
        x = _response_rows(decoder, holds, tokens, lengths, ends, targets.shape[1])

        def read(row):
            x, target = row
            return jax.nn.log_softmax(decoder.unembed(x[None])[0])[target]

        return _by_position(decoder, read, (x, targets))

    return holding.over_devices(step, decoder, holds, tokens, lengths, ends, targets)


@jax.jit
def response_divergences(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    ends: Int[Array, "B"],
    targets: Int[Array, "B R"],
) -> Float[Array, "B R"]:
    """KL(plain || edited) where the targets are predicted."""

    def step(decoder, holds, tokens, lengths, ends, targets):
        runs = tuple(
            _response_rows(decoder, chosen, tokens, lengths, ends, targets.shape[1])
            for chosen in ([], holds)
        )

        def read(rows):
            plain, edited = (jax.nn.log_softmax(decoder.unembed(x[None])[0]) for x in rows)
            # p (d + e^-d - 1) sums to p d, but a rounded normaliser changes it in second order
            # only.
            change = plain - edited
            near = jnp.abs(change) < 1
            small = jnp.exp(plain) * (jnp.expm1(-jnp.where(near, change, 0)) + change)
            large = jnp.exp(plain) * (change - 1) + jnp.exp(edited)
            return jnp.sum(jnp.where(near, small, large))

        return _by_position(decoder, read, runs)

    return holding.over_devices(step, decoder, holds, tokens, lengths, ends, targets)


def _response_rows(
    decoder: Decoder,
    holds: Sequence[Hold],
    tokens: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    ends: Int[Array, "B"],
    room: int,
) -> Float[Array, "B R d"]:
    """The last block's output at the positions that predict response tokens, `room` of them."""
    positions = jnp.arange(tokens.shape[1])

    def run(tokens, length, end, holds):
        parts = jnp.where(positions < length, Part.LAST, Part.GENERATED)
        parts = jnp.where(positions < length - 1, Part.PROMPT, parts)
        x, _ = holding.run_blocks(decoder, holds, tokens, positions < end, parts)
        return jnp.take(x, length - 1 + jnp.arange(room), axis=0, mode="clip")

    return holding.over_rows(run, holds)(tokens, lengths, ends, holds)


def _by_position(decoder: Decoder, read: Callable, rows) -> Float[Array, "B R"]:
    """`read` of each position; the whole vocabulary's logits are there for a few at a time."""
    shape = jax.tree.leaves(rows)[0].shape[:2]
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), rows)
    together = cost.logits_at_once(decoder.config)
    return jax.lax.map(read, flat, batch_size=together).reshape(shape)
