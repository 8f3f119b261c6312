"""Sequences of tokens in batches: those of like length together, as many as fit the memory.

B are the rows of a batch, N the length that all its sequences are padded to.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from jaxmed.engine import capture, cost
from jaxmed.engine import memory as device_memory
from jaxmed.engine.cost import Devices
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold
from models.errors import InputError

# Responses of up to this many tokens share their compilations.
_FEWEST = 16


def padded_length(tokens: Sequence[int]) -> int:
    """The length that a sequence is padded to: that of its bucket."""
    return capture.run_length(len(tokens))


def room_for(tokens: int) -> int:
    """The length that responses of up to this many tokens are padded to."""
    return capture.bucket(tokens, _FEWEST)


def by_length(
    sequences: Sequence[Sequence[int]], rows: Callable[[int], int]
) -> Iterator[tuple[int, list[int]]]:
    """Batches of sequences that are padded to the same length.

    Args:
        sequences: token ids.
        rows: gives the most rows of a batch, by the padded length of its sequences.

    Yields:
        The padded length, and the indices of the batch's sequences. The longest come first: if the
        memory does not suffice, that shows at once.
    """
    lengths = [padded_length(tokens) for tokens in sequences]
    for length in sorted(set(lengths), reverse=True):
        members = [index for index, own in enumerate(lengths) if own == length]
        most = rows(length)
        for first in range(0, len(members), most):
            yield length, members[first : first + most]


def padded(
    sequences: Sequence[Sequence[int]], length: int, *, left: bool = False
) -> Int[np.ndarray, "B N"]:
    """Token ids with zeros after them, or before them."""
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, own in zip(tokens, sequences, strict=True):
        start = length - len(own) if left else 0
        row[start : start + len(own)] = own
    return tokens


def sizes(
    decoder: Decoder,
    holds: Sequence[Hold],
    sequences: Sequence[Sequence[int]],
    *,
    kept: int = 0,
    runs: int = 1,
    memory: int | None = None,
    batch_size: int | None = None,
) -> dict[int, int]:
    """Rows of a batch, on all devices, by the padded length of its sequences, the longest first.

    Args:
        decoder, holds, sequences: what is run.
        kept: numbers that are kept of every position.
        runs: how many there are of each sequence.
        memory: bytes; `memory.free()` by default.
        batch_size: rows of all batches; by default a power of two that fits the memory.

    Raises:
        InputError: the longest sequence does not fit, or `batch_size` is no number of rows.
    """

    def fits(length, memory):
        return cost.rows_at_once(
            decoder.config,
            decoder.compute_dtype,
            length=length,
            memory=memory,
            platform=jax.default_backend(),
            runs=runs,
            held=kept * length + _own_numbers(holds),
            converted=gathered(decoder),
        )

    return _sizes(decoder, sequences, fits, memory, batch_size)


def answered_together(
    decoder: Decoder,
    holds: Sequence[Hold],
    prompts: Sequence[Sequence[int]],
    *,
    room: int,
    kept_as: DTypeLike,
    converted: int = 0,
    memory: int | None = None,
    batch_size: int | None = None,
) -> dict[int, int]:
    """As `sizes`, of batches in which text is generated.

    Args:
        decoder, holds, prompts: what is run.
        room: slots of a row for generated tokens.
        kept_as: type of keys and values.
        converted: numbers of weights that are in memory in another form as well.
        memory, batch_size: as in `sizes`.
    """

    def fits(length, memory):
        return cost.answers_at_once(
            decoder.config,
            decoder.compute_dtype,
            kept_as,
            length=length,
            room=room,
            memory=memory,
            platform=jax.default_backend(),
            held=_own_numbers(holds),
            converted=converted,
        )

    return _sizes(decoder, prompts, fits, memory, batch_size)


def _sizes(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    fits: Callable[[int, int], int],
    memory: int | None,
    batch_size: int | None,
) -> dict[int, int]:
    """As `sizes`, by how many rows fit on a device."""
    devices = Devices.of(decoder.mesh)
    lengths = sorted(set(map(padded_length, sequences)), reverse=True)
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: must be at least 1")
        return dict.fromkeys(lengths, devices.filled(batch_size))
    left = device_memory.free() if memory is None else memory
    left = devices.memory(left, jax.default_backend())
    return {length: devices.number * fits(length, left) for length in lengths}


def gathered(decoder: Decoder) -> int:
    """Numbers of weights that a device has of others' parts at one time: a layer's, and the
    vocabulary's; 0 where it has all that it needs."""
    if Devices.of(decoder.mesh).storing == 1:
        return 0
    config = decoder.config
    return sum(config.block_weights) + config.vocab_size * config.hidden_size


def _own_numbers(holds: Sequence[Hold]) -> int:
    """Of each prompt's own shifts."""
    return sum(hold.shift[0].size for hold in holds if hold.of_each_prompt)


def check_prompts(config: DecoderConfig, prompts: Sequence[Sequence[int]], more: int = 0) -> None:
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
