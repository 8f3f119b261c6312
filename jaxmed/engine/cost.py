"""What work costs: operations, bytes, and the size of every batch.

All batches but those of the reference are sized here, and all operations counted. How much memory
there is, `engine.memory` tells; what is computed of each pair, `engine.plan`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, plan
from jaxmed.engine.plan import Work
from jaxmed.question import joined, positions
from jaxmed.question.joined import Joined
from jaxmed.question.metrics import VOCABULARY_CHUNK
from jaxmed.question.positions import Positions
from jaxmed.question.question import Question
from models import placement
from models.config import DecoderConfig
from models.errors import InputError


def block_operations(config: DecoderConfig) -> float:
    """Floating-point operations of a block's products with its weights, for one position."""
    return 2.0 * sum(config.block_weights)


def runs(config: DecoderConfig, pair: Pair, question: Question) -> list[Joined]:
    """The runs that the terms of a metric are read off: one for all of them where their prompt is
    edited, unless long responses make scores between them, which no response needs, dearer than
    what it saves; and one for each where responses are edited."""
    terms = question.metric.terms(pair)
    each = joined.apart(terms)
    if question.positions == Positions.RESPONSE:
        return each
    one = joined.together(terms)

    def needed(run: Joined) -> float:
        """Of the blocks for a unit that is edited where the question says."""
        edited = positions.edited(pair, question.positions, question.align)
        last = len(pair.prompt_ids) - 1
        length = last + 1 + int(np.max(run.reading.offsets))
        first = min([last, *edited.base.tolist()])
        return (length - first) * sum(_position_operations(config, first, length - first))

    return [one] if needed(one) <= sum(map(needed, each)) else each


def operations(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    chosen: Mapping[str, np.ndarray] | None = None,
) -> float:
    """Floating-point operations of the matrix products that a pair's scan needs."""
    return sum(
        float(np.sum(needed_operations(config, work, term)))
        for term, work in works(config, pair, question, granularities, chosen)
    )


def layer_operations(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularity: str,
    chosen: Mapping[str, np.ndarray] | None = None,
) -> Float[np.ndarray, "L"]:
    """Those of `operations` that the units of each layer need."""
    total = np.zeros(config.num_layers)
    for term, work in works(config, pair, question, [granularity], chosen):
        needed = needed_operations(config, work, term)
        total += np.bincount(work.units.layers, needed, config.num_layers)
    return total


def works(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    chosen: Mapping[str, np.ndarray] | None = None,
) -> Iterator[tuple[Joined, Work]]:
    """All that is computed of a pair, with what is read of it."""
    for term in runs(config, pair, question):
        for swapped in (False, True):
            for work in plan.plan(config, pair, term, question, granularities, swapped, chosen):
                yield term, work


def needed_operations(
    config: DecoderConfig, work: Work, term: Joined, stages: Int[np.ndarray, "U"] | None = None
) -> Float[np.ndarray, "U"]:
    """What each unit needs, in the blocks that follow it and in the metric.

    Args:
        config: the model.
        work: what is computed.
        term: what is read.
        stages: where the units join the residual stream; by default, where their own writes do.
    """
    if stages is None:
        stages = plan.stage(config, work.site, work.units.layers)
    return unit_operations(config, stages, work.end - work.needed, work.needed, term)


def unit_operations(
    config: DecoderConfig, stages, start, size, term: Joined, padded: bool = False
) -> Float[np.ndarray, "U"]:
    """Two per multiply-add, for units that join the residual stream at these stages and whose spans
    begin at `start` and have `size` positions; 0 past the last stage."""
    last = 2 * config.num_layers
    rows = len(term.reading.offsets) if padded else term.rows
    # In the last block no other position needs more than keys and values.
    asked = np.minimum(size, rows)
    halves = np.maximum(0, last - np.asarray(stages))
    attention, mlp = _position_operations(
        config, capture.prefix_length(start) if padded else start, size
    )
    keys = 2.0 * 2 * config.hidden_size * _kv_width(config)
    # A parallel block is entered before both of its halves.
    attended, fed = halves // 2, (halves + 1) // 2
    blocks = size * (attention * attended + mlp * fed)
    blocks -= (size - asked) * ((attention - keys) * (attended > 0) + mlp * (fed > 0))
    tokens = max(np.size(part.reading.tokens) for part in term.reading.parts)
    tokens = config.vocab_size if term.whole_vocabulary else tokens
    read = 2.0 * rows * config.hidden_size * tokens
    return np.where(np.asarray(stages) <= last, blocks + read, 0.0)


def _position_operations(config: DecoderConfig, start, size):
    """Of the products of attention and MLP, for one of `size` positions after `start` others."""
    projections, mlp = config.block_weights
    # Scores and values: each a product with the prefix, and two with the span.
    attention = 2 * _head_width(config) * (start + 2 * size)
    return 2.0 * (projections + attention), 2.0 * mlp


# --- Batches of the engine ---------------------------------------------------------------------

# Positions that go through a block together. Fewer leave matrix products short of work; on a CPU,
# more do not fit its caches.
_TOGETHER = {"cpu": 512}
_TOGETHER_ON_ACCELERATORS = 8192
_BATCHES = 8  # that share one reading of a layer's weights
_FEW = 8  # as many times smaller are the batches of a short list of units
# Pairs of a block, at most; more runs would not fill the device any better.
_PAIRS = {"cpu": 8}
_PAIRS_ON_ACCELERATORS = 32
_CAPTURED = 0.25  # of the memory, at most, that the captured runs of a block of pairs take
GATHERED = 2**20  # numbers of the weights that are gathered at once for units that enter
UNITS_OF_A_BLOCK = 2**17  # of a pair, at most, where a layer has no more
# Floating-point operations of it, at most: about a minute's.
_OPERATIONS = {"cpu": 1e13}
_OPERATIONS_ON_ACCELERATORS = 5e15


def positions_together(platform: str) -> int:
    """Positions that go through a block together."""
    return _TOGETHER.get(platform, _TOGETHER_ON_ACCELERATORS)


def operations_of_a_block(platform: str) -> float:
    """Floating-point operations of a block of one pair's units, at most, if a layer takes no more:
    about a minute's."""
    return _OPERATIONS.get(platform, _OPERATIONS_ON_ACCELERATORS)


class Devices(NamedTuple):
    """Over how many devices rows are spread.

    Attributes:
        number: of all devices.
        storing: of those over which a layer's weights are spread.
    """

    number: int = 1
    storing: int = 1

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh | None) -> "Devices":
        """Those of a decoder's mesh."""
        return cls() if mesh is None else cls(mesh.size, mesh.shape[placement.MODEL])

    def memory(self, memory: int, platform: str) -> int:
        """That of each, in bytes, of what a device of this kind has; on a CPU all share it."""
        return memory // self.number if platform == "cpu" else memory

    def speed(self, platform: str) -> int:
        """As many times as fast as one they are; a CPU's share its cores."""
        return 1 if platform == "cpu" else self.number

    def filled(self, rows: int) -> int:
        """The least number of rows, from this on, of which every device has as many."""
        return -(-rows // self.number) * self.number


ONE_DEVICE = Devices()


class Batching(NamedTuple):
    """How units go through the model.

    Attributes:
        runs: that are patched together.
        batches: of a chunk.
        rows: units of a batch, of each of the runs, on all devices.
    """

    runs: int
    batches: int
    rows: int


def batching(
    config: DecoderConfig,
    dtype: DTypeLike,
    work: Work,
    term: Joined,
    memory: int,
    platform: str,
    *,
    runs: int = 1,
    captured: int = 2,
    devices: Devices = ONE_DEVICE,
    beside: int = 0,
) -> Batching:
    """How many runs are patched together, and batches and their units, that fit the memory.

    A batch goes through a block at once; a chunk's batches do so one after another, before the next
    layer's turn, so that a layer's weights are fetched once for all of them. A short list leaves a
    device idle, and a batch of many layers' units has rows that wait for their layer: so as many
    runs as there are go through together, each with few units. Their number is a power of four, and
    there are two sizes of batches for each and no more, so that little is compiled.

    Args:
        config: the model.
        dtype: of its parameters in memory.
        work: what is to be computed of each run.
        term: what is read.
        memory: bytes of a device, or of all of them where they share it.
        platform: JAX's name of the kind of device.
        runs: in which these units are patched.
        captured: plain runs that are held.
        devices: that share the rows of a batch.
        beside: bytes that are held for each unit of a chunk beside its difference.

    Raises:
        InputError: not even one unit fits.
    """
    memory = devices.memory(memory, platform)
    units = devices.filled(len(work.units)) // devices.number  # of each device
    rows = max(1, positions_together(platform) // work.size)
    together = max(1, min(2 * _BATCHES * rows // units, 2 * runs - 1))
    together = _power_of_four(together)
    while True:
        fixed, each, held = _bytes(
            *(config, np.dtype(dtype), work, term, platform),
            runs=together,
            captured=captured,
            gathered=devices.storing > 1,
        )
        unit = together * (each + _BATCHES * (held + beside))
        fits = int((memory - fixed) // unit)
        if fits >= 1:
            break
        if together == 1:
            raise InputError(
                f"the memory that is left, {memory / 2**30:.4f} GiB, is too little for a single "
                f"unit with {work.size} positions, {(fixed + unit) / 2**30:.4f} GiB: give "
                "more with memory_gb (--memory_gb), or take a larger device or shorter prompts"
            )
        together //= 4
    rows = max(1, rows // together)
    few = max(1, rows // _FEW)
    if units <= 2 * _BATCHES * few:
        rows = few
    return Batching(together, _BATCHES, devices.number * min(rows, _power_of_two(fits)))


def captured_at_once(length: int, platform: str) -> int:
    """Plain runs of that padded length that are captured together: a power of two."""
    return _power_of_two(max(1, positions_together(platform) // length))


def pairs_of_a_block(
    config: DecoderConfig, dtype: DTypeLike, length: int, runs: int, memory: int, platform: str
) -> int:
    """Pairs, at most, whose captured runs are held together: a power of two.

    Args:
        config, dtype, memory, platform: as in `batching`.
        length: of the longest run.
        runs: of each pair.
    """
    number = max(4, np.dtype(dtype).itemsize)
    each = runs * number * config.num_layers * _trace_numbers(config, capture.run_length(length))
    most = _PAIRS.get(platform, _PAIRS_ON_ACCELERATORS)
    return _power_of_two(max(1, min(most, int(_CAPTURED * memory // each))))


def pairs_that_fill(
    units: int,
    size: int,
    platform: str,
    devices: Devices = ONE_DEVICE,
) -> int:
    """Pairs of whose lists, of so many units with spans of that size, a chunk can be made up: a
    power of two. A long list fills it alone, and is done pair by pair."""
    positions = devices.number * positions_together(platform)
    return _power_of_two(max(1, _BATCHES * positions // (units * size)))


def _bytes(
    config: DecoderConfig,
    dtype: np.dtype,
    work: Work,
    term: Joined,
    platform: str,
    *,
    runs: int,
    captured: int,
    gathered: bool,
) -> tuple[int, int, int]:
    """Bytes that carrying takes on a device beside the weights that it stores, of which a layer's
    may have to be gathered: at any rate, and in each run for each unit of a batch, and for each
    unit of a chunk."""
    number = max(4, dtype.itemsize)  # of activations, which are float32 at least
    width, hidden = config.hidden_size, config.intermediate_size
    heads, kv = _head_width(config), _kv_width(config)
    weights = sum(config.block_weights)
    # The traces; in each run the change of a site, and the frame, on the span and before it.
    run = capture.run_length(work.start + work.size + len(term.response))
    site = max(width, heads, hidden)
    kept = captured * _trace_numbers(config, run)
    kept += runs * (
        work.size * (site + (3 if config.post_norm else 2) * width)
        + 2 * capture.prefix_length(work.start) * kv
    )
    kept = config.num_layers * kept + sum(_vector_numbers(config, work))
    # Attention of plain runs that are captured together, one layer at a time.
    at_once = min(captured, captured_at_once(run, platform))
    attention = 3 * config.num_heads * at_once * run**2
    # A layer's weights, their parts where they are cut, and what is made of these on the way; a TPU
    # takes them as they are stored.
    copies = (2 if dtype.itemsize == 2 else 3) + gathered
    weight = dtype.itemsize if platform == "tpu" else number
    fixed = max(weight * copies * weights, number * attention) + number * (kept + GATHERED)
    position = _block_numbers(config)
    position += 5 * config.num_heads * (capture.prefix_length(work.start) + work.size)
    each = max(work.size * position, _reading_numbers(config, term))
    held = 2 * work.size * width
    return fixed, number * each, number * held


def _trace_numbers(config: DecoderConfig, run: int) -> int:
    """Numbers of a layer that a captured run of that padded length keeps."""
    width = 4 * config.hidden_size + _head_width(config)
    return run * (width + config.intermediate_size + 2 * _kv_width(config))


def _vector_numbers(config: DecoderConfig, work: Work) -> tuple[int, int]:
    """Numbers that directions take, and what they write."""
    if work.vectors is None:
        return 0, 0
    return work.vectors.size, len(work.vectors) * (config.hidden_size + work.size)


def _reading_numbers(config: DecoderConfig, term: Joined) -> int:
    """Numbers that reading the metric takes for each unit."""
    rows = len(term.reading.offsets)
    chunk = min(VOCABULARY_CHUNK, config.vocab_size) if term.whole_vocabulary else 0
    return rows * (4 * config.hidden_size + 6 * chunk)


# --- Batches of whole runs ---------------------------------------------------------------------

# Rows of a batch of text, if they fit the memory.
_ROWS = {"cpu": 16}
_ROWS_ON_ACCELERATORS = 64
# Positions of prompts that are run together when rows of a batch begin. More are not multiplied
# faster; with fewer, less is run in vain where a single row begins.
_PROMPT_POSITIONS = {"cpu": 128}
_PROMPT_POSITIONS_ON_ACCELERATORS = 2048
# Tokens of a batch that a judge reads, padding included: attention scores grow with its length.
_JUDGED = 4096
# Logits of the whole vocabulary that are in memory at once where responses are read.
_LOGITS = 2**22


def rows_at_once(
    config: DecoderConfig,
    dtype: DTypeLike,
    *,
    length: int,
    memory: int,
    platform: str,
    runs: int = 1,
    held: int = 0,
    converted: int = 0,
) -> int:
    """How many rows a batch of text has: a power of two that fits the memory, up to a constant.

    Args:
        config: the model.
        dtype: of its activations.
        length: tokens that each row's prompt and response are padded to.
        memory: bytes.
        platform: JAX's name of the kind of device.
        runs: how many runs there are of each row, one beside the other.
        held: numbers of each row's own interventions, and those that are kept of its run.
        converted: numbers of weights that are in memory a second time, gathered or in another form.

    Raises:
        InputError: not even one row fits.
    """
    keys_values = 2 * config.num_layers * _kv_width(config) * 2 * length
    row = runs * keys_values + _run_numbers(config, length) + held + 6 * config.vocab_size
    number = np.dtype(dtype).itemsize
    return _rows(row * number, converted * number, length, memory, platform)


def answers_at_once(
    config: DecoderConfig,
    dtype: DTypeLike,
    kept_as: DTypeLike,
    *,
    length: int,
    room: int,
    memory: int,
    platform: str,
    held: int = 0,
    converted: int = 0,
) -> int:
    """How many prompts are answered together, as `rows_at_once` has it.

    Args:
        config, dtype, memory, platform, converted: as there.
        kept_as: type of keys and values.
        length: tokens that each prompt is padded to.
        room: slots of each row for generated tokens.
        held: numbers of each row's own interventions.
    """
    kept = 2 * config.num_layers * _kv_width(config)
    number = np.dtype(dtype).itemsize
    row = kept * (length + room) * np.dtype(kept_as).itemsize
    row += (held + 6 * config.vocab_size) * number
    prompts = prompts_together(length, most_rows(platform), platform)
    beside = prompts * (2 * kept * length + _run_numbers(config, length)) + converted
    return _rows(row, beside * number, length, memory, platform)


def prompts_together(length: int, rows: int, platform: str) -> int:
    """How many of a batch's prompts are run together before they are answered."""
    positions = _PROMPT_POSITIONS.get(platform, _PROMPT_POSITIONS_ON_ACCELERATORS)
    return max(1, min(rows, positions // length))


def _run_numbers(config: DecoderConfig, length: int) -> int:
    """Of a plain run, in memory at one time."""
    return length * _block_numbers(config) + 3 * config.num_heads * length**2


def _rows(row: int, beside: int, length: int, memory: int, platform: str) -> int:
    """Rows of so many bytes each, and so many beside them all."""
    if memory < beside + row:
        raise InputError(
            f"the memory that is left, {memory / 2**30:.4f} GiB, is too little for a single prompt "
            f"of {length} tokens, {(beside + row) / 2**30:.4f} GiB: take a larger device, shorter "
            "prompts or fewer tokens"
        )
    return min(most_rows(platform), _power_of_two((memory - beside) // row))


def most_rows(platform: str) -> int:
    """Rows of a batch of text where memory is no bound."""
    return _ROWS.get(platform, _ROWS_ON_ACCELERATORS)


def judged_at_once(length: int) -> int:
    """How many texts of that padded length a judge reads together."""
    return max(1, _JUDGED // length)


def logits_at_once(config: DecoderConfig) -> int:
    """At how many positions the logits of the whole vocabulary are in memory together."""
    return max(1, _LOGITS // config.vocab_size)


# --- Numbers -----------------------------------------------------------------------------------


def _power_of_two(fits: int) -> int:
    """The largest that is at most `fits`, which is 1 or more."""
    return 1 << (fits.bit_length() - 1)


def _power_of_four(fits: int) -> int:
    """The largest that is at most `fits`, which is 1 or more."""
    return 1 << (fits.bit_length() - 1 & ~1)


def _head_width(config: DecoderConfig) -> int:
    """Numbers of all query heads at one position."""
    return config.num_heads * config.head_dim


def _kv_width(config: DecoderConfig) -> int:
    """Numbers of the keys, or of the values, of one position."""
    return config.num_kv_heads * config.head_dim


def _block_numbers(config: DecoderConfig) -> int:
    """Activations of a block that are there together, at one position; scores are not counted."""
    return 10 * config.hidden_size + 4 * config.intermediate_size + 3 * _head_width(config)
