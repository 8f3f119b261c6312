"""What is asked of every pair, and what must be computed for it: units, positions, spans, cost.

Everything here is known before a model is run.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jaxmed import alignment, capture
from jaxmed.alignment import Align, Edited, Positions
from jaxmed.data import DataError, Pair
from jaxmed.directions import Directions
from jaxmed.metrics import VOCABULARY_CHUNK, Metric, Term
from models.config import DecoderConfig
from models.edits import Site
from models.errors import InputError

# The sites that make up each granularity, in the order of the results' site axis. Those of the
# direction granularity are the user's.
SITES: dict[str, tuple[Site, ...]] = {
    "layer": (Site.LAYER,),
    "module": (Site.ATTENTION, Site.MLP),
    "head": (Site.HEAD,),
    "token": (Site.RESIDUAL, Site.ATTENTION, Site.MLP),
    "neuron": (Site.NEURON,),
    "direction": (),
}

# The position of a unit that is edited at every edited position.
ALL_POSITIONS = -1


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of every pair.

    Attributes:
        metric: the metric Y.
        positions: which positions are edited. The token granularity edits each aligned prompt
            position alone, whatever is asked here.
        align: how base and source prompt are laid against each other.
        group_size: adjacent neurons that are edited together.
        directions: what the direction granularity patches.
    """

    metric: Metric
    positions: Positions = Positions.LAST
    align: Align = Align.END
    group_size: int = 1
    directions: Directions | None = None


@dataclasses.dataclass(frozen=True)
class Units:
    """Units of one site, flattened; each is patched alone.

    Attributes:
        layers: the layer of each, in increasing order, [U].
        units: index of the head, of the neuron group or of the direction, [U]; 0 for other sites.
        positions: index in the span of the one position that is edited, [U]; -1 for all of them.
    """

    layers: np.ndarray
    units: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def grid(cls, layers: int, units: int = 1, positions=(ALL_POSITIONS,)) -> "Units":
        """Every layer with every unit at every position, in that order."""
        axes = np.meshgrid(np.arange(layers), np.arange(units), positions, indexing="ij")
        return cls(*(axis.reshape(-1).astype(np.int32) for axis in axes))

    def subset(self, which: np.ndarray) -> "Units":
        """Those units that a mask [U] or an array of indices chooses."""
        return Units(self.layers[which], self.units[which], self.positions[which])

    def numbered(self) -> "Units":
        """The same, with their places in this list for units."""
        return dataclasses.replace(self, units=np.arange(len(self), dtype=np.int32))

    def chunks(self, batches: int, rows: int, padding_layer: int) -> Iterator["Units"]:
        """Equal chunks [batches, rows]; the last is filled up with units of a layer that does not
        exist."""
        size = batches * rows
        extra = -len(self) % size
        fill = {"layers": padding_layer, "units": 0, "positions": ALL_POSITIONS}
        padded = [
            np.pad(getattr(self, name), (0, extra), constant_values=value)
            for name, value in fill.items()
        ]
        for start in range(0, len(self), size):
            yield Units(*(f[start : start + size].reshape(batches, rows) for f in padded))


@dataclasses.dataclass(frozen=True)
class Work:
    """Units of one site that share a span: what one loop over batches computes.

    Attributes:
        granularity: what the units are counted under.
        site: the site.
        units: the units; their positions are relative to the span's start.
        edited: the edited positions.
        start, size: the span's first position, and its padded length.
        place: index of the units in the granularity's effects.
        vectors: where the units are directions of the site, theirs, [U', size of the site]; `units`
            are then indices into them.
    """

    granularity: str
    site: Site
    units: Units
    edited: Edited
    start: int
    size: int
    place: tuple[np.ndarray, ...]
    vectors: np.ndarray | None = None

    def only(self, chosen: np.ndarray) -> "Work":
        """The units that a mask of the granularity's effects chooses."""
        here = chosen[self.place]
        return dataclasses.replace(
            self, units=self.units.subset(here), place=tuple(index[here] for index in self.place)
        )


def group_count(config: DecoderConfig, group_size: int) -> int:
    """Number of neuron groups in a layer; the last may be smaller than the others."""
    return -(-config.intermediate_size // group_size)


def plan(
    config: DecoderConfig,
    pair: Pair,
    term: Term,
    question: Question,
    granularities: Iterable[str],
    swapped: bool,
    chosen: Mapping[str, np.ndarray] | None = None,
) -> list[Work]:
    """What is to be computed for one term of a metric in one direction.

    Units whose every edited position comes after the last one that is read are left out: their
    effect is exactly 0. With `swapped` the patches are made in the source run. Of a granularity
    that `chosen` names, only the units of its mask are planned.
    """
    prompt_length = len(pair.counterfactual_ids if swapped else pair.prompt_ids)
    first_read, last_read = (
        prompt_length - 1 + int(extreme(term.reading.offsets)) for extreme in (np.min, np.max)
    )
    work = []
    for granularity in granularities:
        which = Positions.PROMPT if granularity == "token" else question.positions
        edited = alignment.edited(pair, which, question.align, len(term.response))
        columns = len(pair.prompt_ids) - 1 - edited.base
        edited = edited.swapped() if swapped else edited
        read = edited.base <= last_read
        edited, columns = Edited(edited.base[read], edited.source[read]), columns[read]
        if not len(edited.base):
            continue
        if granularity == "token":
            work += _token_work(config, edited, columns, last_read)
            continue
        start, size = _span(min(edited.base[0], first_read), last_read)
        if granularity == "direction":
            work += _direction_work(question.directions, edited, start, size)
            continue
        for index, site in enumerate(SITES[granularity]):
            units = Units.grid(config.num_layers, unit_count(config, question, site))
            place = {"module": (units.layers, np.full(len(units), index)), "layer": (units.layers,)}
            place = place.get(granularity, (units.layers, units.units))
            work.append(Work(granularity, site, units, edited, start, size, place))
    chosen = chosen or {}
    work = [w.only(chosen[w.granularity]) if w.granularity in chosen else w for w in work]
    return [w for w in work if len(w.units)]


def _direction_work(
    directions: Directions, edited: Edited, start: int, size: int
) -> Iterator[Work]:
    """The given directions, site by site."""
    for index, (site, of_site) in enumerate(zip(directions.sites, directions.of_site, strict=True)):
        count = len(of_site.layers)
        which = np.arange(count, dtype=np.int32)
        units = Units(of_site.layers, which, np.full(count, ALL_POSITIONS, np.int32))
        place = (of_site.layers, np.full(count, index), of_site.numbers)
        yield Work("direction", site, units, edited, start, size, place, of_site.vectors)


def _token_work(config, edited: Edited, columns: np.ndarray, last_read: int) -> list[Work]:
    """Each position alone, in groups of positions whose spans have the same padded length."""
    spans = [_span(position, last_read, smallest=16) for position in edited.base]
    work = []
    for start, size in sorted(set(spans)):
        here = np.array([span == (start, size) for span in spans])
        group = Edited(edited.base[here], edited.source[here])
        units = Units.grid(config.num_layers, positions=group.base - start)
        place = np.tile(columns[here], config.num_layers)
        for index, site in enumerate(SITES["token"]):
            site_place = (units.layers, np.full(len(units), index), place)
            work.append(Work("token", site, units, group, start, size, site_place))
    return work


def _span(first: int, last: int, smallest: int = 1) -> tuple[int, int]:
    """Start and padded length of the span that holds all edited and read positions.

    Its length is 1, 4, 16 or a larger power of two: each length is compiled once.
    """
    length = int(last - first) + 1
    size = next((size for size in (1, 4) if smallest <= size and length <= size), 0)
    size = size or capture.bucket(length, smallest=16)
    return max(0, int(last) + 1 - size), size


def unit_count(config: DecoderConfig, question: Question, site: Site) -> int:
    """Units of a site in each layer."""
    if site == Site.HEAD:
        return config.num_heads
    return group_count(config, question.group_size) if site == Site.NEURON else 1


def shapes(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Shape of one pair's effects by granularity."""
    units = {
        "layer": lambda: (),
        "module": lambda: (len(SITES["module"]),),
        "head": lambda: (config.num_heads,),
        "token": lambda: (len(SITES["token"]), int(token_columns(pair, question).max()) + 1),
        "neuron": lambda: (group_count(config, question.group_size),),
        "direction": lambda: question.directions.given.shape[1:],
    }
    return {name: (config.num_layers, *units[name]()) for name in granularities}


def token_columns(pair: Pair, question: Question) -> np.ndarray:
    """Where the token granularity stores the aligned positions: counted from the prompt's end."""
    edited = alignment.edited(pair, Positions.PROMPT, question.align)
    return len(pair.prompt_ids) - 1 - edited.base


def check(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> None:
    """Raises `DataError` where a pair does not fit the model or the question."""
    for name in ("prompt", "counterfactual", "harmful", "safe"):
        ids = getattr(pair, f"{name}_ids")
        outside = [i for i in ids if not 0 <= i < config.vocab_size]
        if outside:
            raise DataError(
                f"{pair.where}: pair '{pair.id}': token id {outside[0]} of {name}_ids is outside "
                f"the vocabulary of {config.vocab_size}"
            )
    terms = question.metric.terms(pair)
    for name in ("prompt", "counterfactual"):
        length = len(getattr(pair, f"{name}_ids"))
        longest = length + max(len(term.response) for term in terms)
        if not length:
            raise DataError(f"{pair.where}: pair '{pair.id}' has an empty {name}")
        if longest > config.max_positions:
            raise DataError(
                f"{pair.where}: pair '{pair.id}': its {name} with the response has {longest} "
                f"tokens, and the model has {config.max_positions} positions"
            )
    for term in terms:
        for tokens in np.asarray(term.reading.tokens)[np.asarray(term.reading.weights) > 0]:
            if not 0 <= tokens < config.vocab_size:
                raise DataError(
                    f"{pair.where}: pair '{pair.id}': {question.metric.name} reads token id "
                    f"{tokens}, outside the vocabulary of {config.vocab_size}"
                )
    edits = [
        alignment.edited(pair, question.positions, question.align, len(term.response)).base
        for term in terms
    ]
    last_read = len(pair.prompt_ids) - 1 + np.array([np.max(t.reading.offsets) for t in terms])
    if any(map(len, edits)) and not any(
        np.any(e <= r) for e, r in zip(edits, last_read, strict=True)
    ):
        raise DataError(
            f"{pair.where}: pair '{pair.id}': {question.metric.name} reads nothing at or after the "
            f"positions that --positions={question.positions} edits, so every effect would be 0"
        )
    if "token" in granularities:
        alignment.edited(pair, Positions.PROMPT, question.align)


def stage(config: DecoderConfig, site: Site, layer: np.ndarray) -> np.ndarray:
    """Where in the network a site's write joins the residual stream.

    Stage 2 l is the input of block l, stage 2 l + 1 lies between its attention and its MLP (there
    is none where the two are parallel), stage 2 L is the output of the last block.
    """
    if site == Site.EMBEDDING:
        return 2 * layer
    before_mlp = site in (Site.ATTENTION, Site.HEAD) and not config.parallel
    return 2 * layer + (1 if before_mlp else 2)


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
        batch_operations(config, work, term, stage(config, work.site, work.units.layers))
        for term in question.metric.terms(pair)
        for swapped in (False, True)
        for work in plan(config, pair, term, question, granularities, swapped, chosen)
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
