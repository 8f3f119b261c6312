"""What work costs: operations, bytes, and the size of every batch."""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, plan
from jaxmed.engine.plan import Work
from jaxmed.question.metrics import VOCABULARY_CHUNK, Term
from jaxmed.question.question import Question
from models.config import DecoderConfig
from models.errors import InputError


def block_weights(config: DecoderConfig) -> tuple[int, int]:
    """Numbers in the matrices of a block's attention and MLP."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    matrices = 3 if config.gated_mlp else 2
    width = config.hidden_size
    return width * config.head_dim * heads, matrices * width * config.intermediate_size


def operations(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    chosen: Mapping[str, np.ndarray] | None = None,
) -> float:
    """Floating-point operations of the matrix products that a pair's scan needs."""
    return sum(
        batch_operations(config, work, term, plan.stage(config, work.site, work.units.layers))
        for term in question.metric.terms(pair)
        for swapped in (False, True)
        for work in plan.plan(config, pair, term, question, granularities, swapped, chosen)
    )


def batch_operations(config: DecoderConfig, work: Work, term: Term, stages) -> float:
    """Two per multiply-add, in the blocks that follow each unit and in the metric."""
    width, head_dim = config.hidden_size, config.head_dim
    projections, mlp = block_weights(config)
    # Scores and values: each a product with the prefix, and two with the span.
    attention = 2 * config.num_heads * head_dim * (work.start + 2 * work.size)
    last = 2 * config.num_layers
    real = np.asarray(stages)[np.asarray(stages) <= last]
    halves = np.sum(last - real), np.sum((last - real + 1) // 2)
    blocks = (projections + attention) * (halves[0] - halves[1]) + mlp * halves[1]
    tokens = config.vocab_size if term.whole_vocabulary else np.size(term.reading.tokens)
    read = len(real) * len(term.reading.offsets) * width * tokens
    return 2.0 * (work.size * float(blocks) + float(read))


def run_operations(config: DecoderConfig, pair: Pair, question: Question) -> float:
    """Floating-point operations of plain runs of a pair's prompts with all their responses."""
    width, head_dim = config.hidden_size, config.head_dim
    weights = sum(block_weights(config))
    total = 0.0
    for term in question.metric.terms(pair):
        for prompt in (pair.prompt_ids, pair.counterfactual_ids):
            length = len(prompt) + len(term.response)
            attention = 2 * config.num_heads * head_dim * length
            total += 2.0 * config.num_layers * length * (weights + attention)
            total += 2.0 * len(term.reading.offsets) * width * config.vocab_size
    return total


# Positions that go through a block together. Fewer leave matrix products short of work; on a CPU,
# more do not fit its caches.
_TOGETHER = {"cpu": 512}
_TOGETHER_ON_ACCELERATORS = 8192
_BATCHES = 8  # that share one reading of a layer's weights
_FEW = 16  # as many times smaller are the batches of a short list of units
GATHERED = 2**20  # numbers of the weights that are gathered at once for units that enter


def batching(
    config: DecoderConfig, dtype, work: Work, term: Term, memory: int, platform: str
) -> tuple[int, int]:
    """Batches of a chunk, and units of a batch, that fit the memory.

    A batch goes through a block at once; a chunk's batches do so one after another, before the next
    layer's turn, so that a layer's weights are fetched once for all of them. There are two sizes of
    batches and no more, so that little is compiled.

    Args:
        config: the model.
        dtype: of its parameters in memory.
        work: what is to be computed.
        term: what is read.
        memory: bytes.
        platform: JAX's name of the kind of device.

    Raises:
        InputError: not even one unit fits.
    """
    most = _TOGETHER.get(platform, _TOGETHER_ON_ACCELERATORS)
    rows = max(1, most // work.size)
    if 2 * len(work.units) <= rows:
        rows = max(1, rows // _FEW)
    fixed, each, held = _bytes(config, np.dtype(dtype), work, term, platform)
    fits = int((memory - fixed) // (each + _BATCHES * held))
    if fits < 1:
        raise InputError(
            f"the memory that is left, {memory / 2**30:.4f} GiB, is too little for a single unit "
            f"with {work.size} positions, {(fixed + each + _BATCHES * held) / 2**30:.4f} GiB: give "
            "more with --memory_gb, or take a larger device or shorter prompts"
        )
    return _BATCHES, min(rows, 1 << (fits.bit_length() - 1))


def _bytes(
    config: DecoderConfig, dtype: np.dtype, work: Work, term: Term, platform: str
) -> tuple[int, int, int]:
    """Bytes that carrying takes beside the weights: at any rate, for each unit of a batch, and for
    each unit of a chunk."""
    number = max(4, dtype.itemsize)  # of activations, which are float32 at least
    width, hidden = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = sum(block_weights(config))
    # Both runs' traces; the change of a site, and the frame, on the span and before it.
    run = capture.bucket(work.start + work.size + len(term.response), capture.SHORTEST)
    site = max(width, heads, hidden)
    kept = 2 * run * (4 * width + heads + hidden + 2 * kv)
    kept += (
        work.size * (site + (3 if config.post_norm else 2) * width)
        + 2 * _prefix_size(work.start) * kv
    )
    kept = config.num_layers * kept + sum(_vector_numbers(config, work))
    # Attention of a plain run, one layer at a time.
    attention = 3 * config.num_heads * run**2
    # A layer's weights are read in the activations' precision; those of all layers together on a
    # CPU, whose compiler slices no 16-bit floats.
    layers = config.num_layers + 1 if platform == "cpu" and dtype.itemsize < 4 else 2
    fixed = max(layers * weights, attention) + kept + GATHERED
    position = 10 * width + 4 * hidden + 3 * heads
    position += 5 * config.num_heads * (_prefix_size(work.start) + work.size)
    each = max(work.size * position, _reading_numbers(config, term))
    held = 2 * work.size * width
    return number * fixed, number * each, number * held


def runs_at_once(config: DecoderConfig, term: Term, length: int, memory: int) -> int:
    """How many whole runs of that length fit the memory: a power of two, at least 1, at most 64."""
    heads = config.num_heads * config.head_dim
    numbers = length * (10 * config.hidden_size + 4 * config.intermediate_size + 4 * heads)
    numbers += 4 * config.num_heads * length**2 + _reading_numbers(config, term)
    fits = memory // (4 * numbers)
    return min(64, 1 << (max(1, fits).bit_length() - 1))


def _vector_numbers(config: DecoderConfig, work: Work) -> tuple[int, int]:
    """Numbers that directions take, and what they write."""
    if work.vectors is None:
        return 0, 0
    return work.vectors.size, len(work.vectors) * (config.hidden_size + work.size)


def _reading_numbers(config: DecoderConfig, term: Term) -> int:
    """Numbers that reading the metric takes for each unit."""
    rows = len(term.reading.offsets)
    chunk = min(VOCABULARY_CHUNK, config.vocab_size) if term.whole_vocabulary else 0
    return rows * (4 * config.hidden_size + 6 * chunk)


def _prefix_size(start: int) -> int:
    return capture.bucket(start, capture.SHORTEST) if start else 0
