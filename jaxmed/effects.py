"""The effect engine, and the plain definition that it is tested against.

An intervention changes the residual stream by some D at some point of the network. What follows is
the same for every granularity: carry D through the later blocks and read the metric. So

    enter(site, layer, unit) -> D, and the stage where it joins the residual stream
    carry(stage, D)          -> dY

Stage 2 l is the input of block l, stage 2 l + 1 lies between its attention and its MLP, stage 2 L
is the output of the last block. Differences alone are carried (`jaxmed.difference`): the base run
is computed once for a whole batch of edits, and rounding is relative to the effect.

Shapes are named in `models.layers` and `jaxmed.capture`; B is a batch of units, U all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed import alignment, capture
from jaxmed.alignment import Align, Edited, Positions
from jaxmed.capture import Frame
from jaxmed.data import DataError, Pair
from jaxmed.difference import difference
from jaxmed.metrics import LogitDifference, Metric, Reading, Term
from models.config import DecoderConfig
from models.decoder import Decoder, Trace
from models.edits import Edit, Site

# The sites that make up each granularity, in the order of the results' site axis.
SITES: dict[str, tuple[Site, ...]] = {
    "layer": (Site.LAYER,),
    "module": (Site.ATTENTION, Site.MLP),
    "head": (Site.HEAD,),
    "token": (Site.RESIDUAL, Site.ATTENTION, Site.MLP),
    "neuron": (Site.NEURON,),
}

_LAYER_SITES = tuple(site for site in Site if site != Site.EMBEDDING)
_DEFINED_AT_ONCE = 64  # units that the plain definition runs as a batch
_ALL = -1  # the position of a unit that is edited at every edited position


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of every pair.

    Attributes:
        metric: the metric Y.
        positions: which positions are edited. The token granularity edits each aligned prompt
            position alone, whatever is asked here.
        align: how base and source prompt are laid against each other.
        group_size: adjacent neurons that are edited together.
    """

    metric: Metric
    positions: Positions = Positions.LAST
    align: Align = Align.END
    group_size: int = 1


@dataclasses.dataclass(frozen=True)
class PairEffects:
    """Effects of one pair.

    Attributes:
        y_base, y_source: the metric of the two plain runs.
        nie, tie: by granularity, [layer], [layer, 2], [layer, head], [layer, 3, position] or
            [layer, group].
    """

    y_base: float
    y_source: float
    nie: dict[str, np.ndarray]
    tie: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Effects:
    """Effects of one granularity.

    Attributes:
        nie, tie: [pair, layer, ...] float32, as in the results' files (design, section 8).
        te, y_base, y_source: [pair] float32.
    """

    nie: np.ndarray
    tie: np.ndarray
    y_base: np.ndarray
    y_source: np.ndarray

    @property
    def te(self) -> np.ndarray:
        """Total effect, Y(x') - Y(x)."""
        return self.y_source - self.y_base


@dataclasses.dataclass(frozen=True)
class Units:
    """Units of one site, flattened; each is patched alone.

    Attributes:
        layers: the layer of each, [U].
        units: index of the head or of the neuron group, [U]; 0 for other sites.
        positions: index in the span of the one position that is edited, [U]; -1 for all of them.
    """

    layers: np.ndarray
    units: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def grid(cls, layers: int, units: int = 1, positions=(_ALL,)) -> "Units":
        """Every layer with every unit at every position, in that order."""
        axes = np.meshgrid(np.arange(layers), np.arange(units), positions, indexing="ij")
        return cls(*(axis.reshape(-1).astype(np.int32) for axis in axes))

    def batches(self, size: int, padding_layer: int) -> Iterator["Units"]:
        """Equal batches; the last is filled up with units of a layer that does not exist."""
        extra = -len(self) % size
        fill = {"layers": padding_layer, "units": 0, "positions": _ALL}
        padded = [
            np.pad(getattr(self, name), (0, extra), constant_values=value)
            for name, value in fill.items()
        ]
        for start in range(0, len(self), size):
            yield Units(*(field[start : start + size] for field in padded))


def group_count(config: DecoderConfig, group_size: int) -> int:
    """Number of neuron groups in a layer; the last may be smaller than the others."""
    return -(-config.intermediate_size // group_size)


# --- The engine --------------------------------------------------------------------------------


def stage(site: Site, layer: Int[Array, "B"]) -> Int[Array, "B"]:
    """Where in the network a site's write joins the residual stream."""
    if site == Site.EMBEDDING:
        return 2 * layer
    return 2 * layer + (1 if site in (Site.ATTENTION, Site.HEAD) else 2)


@functools.partial(jax.jit, static_argnames=("site", "group_size"))
def enter(
    decoder: Decoder,
    change: Float[Array, "L S ..."],
    layers: Int[Array, "B"],
    units: Int[Array, "B"],
    positions: Int[Array, "B"],
    site: Site,
    group_size: int,
) -> Float[Array, "B S d"]:
    """D: what each unit's edit adds to the residual stream where it joins it.

    Args:
        decoder: the model.
        change: edited value minus base value of the site, 0 at positions that are not edited.
        layers, units, positions: the units, as in `Units`.
        site: the site.
        group_size: adjacent neurons that make one unit.
    """
    layers = jnp.minimum(layers, change.shape[0] - 1)
    if site == Site.HEAD:
        kernel = decoder.blocks.attention.output.kernel[...]
        weights = kernel.reshape(kernel.shape[0], *change.shape[2:], -1)[layers, units]
        written = jnp.einsum("bsh,bhd->bsd", change[layers, :, units], weights.astype(change.dtype))
    elif site == Site.NEURON:
        members = units[:, None] * group_size + jnp.arange(group_size)
        exists = members < change.shape[-1]
        members = jnp.minimum(members, change.shape[-1] - 1)
        kernel = decoder.blocks.mlp.down.kernel[...]
        weights = kernel[layers[:, None], members].astype(change.dtype)
        moved = jnp.where(exists[..., None], change[layers[:, None], :, members], 0)
        written = jnp.einsum("bgs,bgd->bsd", moved, weights)
    else:
        written = change[layers]
    here = (positions[:, None] == _ALL) | (positions[:, None] == jnp.arange(change.shape[1]))
    return jnp.where(here[..., None], written, 0)


@functools.partial(jax.jit, static_argnames=("metric",))
def carry(
    decoder: Decoder,
    frame: Frame,
    stages: Int[Array, "B"],
    entering: Float[Array, "B S d"],
    reading: Reading,
    last_prompt: Int[Array, ""],
    metric: Metric,
) -> Float[Array, "B"]:
    """dY: the exact change of the metric when D joins the residual stream.

    Each row's D joins at its own stage; before it the row's difference is exactly 0. The loop
    starts at the first layer that any row needs, which is known at run time only: one compilation
    serves all layers and granularities.

    Args:
        decoder: the model.
        frame: the base run.
        stages: where each D joins; past the last stage for a row that is padding.
        entering: D.
        reading: what the metric reads.
        last_prompt: index in the span of the last prompt token, from which the reading's offsets
            count.
        metric: the metric.
    """
    last = 2 * decoder.config.num_layers
    windows = decoder.windows

    def join(differences, now):
        return jnp.where((stages == now)[:, None, None], entering, differences)

    def run_layer(layer, differences):
        block = decoder.block(layer)
        prefix = _at_layer(frame.prefix, layer)

        def attend(x):
            return block.attend(x, frame.span, windows[layer], prefix, _untapped)[0]

        def feed(x):
            return block.feed(x, _untapped)

        differences = join(differences, 2 * layer)
        differences += _change(attend, frame.inputs[layer], differences)
        differences = join(differences, 2 * layer + 1)
        return differences + _change(feed, frame.middles[layer], differences)

    differences = jax.lax.fori_loop(
        jnp.min(stages) // 2, last // 2, run_layer, jnp.zeros_like(entering)
    )

    def read(residual):
        return _value(decoder, metric, residual, reading, last_prompt)

    return _change(read, frame.inputs[-1], join(differences, last))


def _change(f: Callable, value: Float[Array, "S d"], changes: Float[Array, "B S d"]):
    """f(value + change) - f(value) for every change of a batch; the value stays unbatched."""
    return jax.vmap(lambda change: difference(f)((value,), (change,))[1])(changes)


def _untapped(site, value):
    return value


def _at_layer(prefix, layer):
    """A layer's keys and values of the prefix."""
    if prefix is None:
        return None
    return dataclasses.replace(prefix, keys=prefix.keys[layer], values=prefix.values[layer])


def _value(decoder, metric, residual, reading, last_prompt):
    """The metric, from the last block's output."""
    rows = residual[last_prompt + reading.offsets]
    return metric.value(lambda tokens: decoder.unembed(rows, tokens), reading)


@functools.partial(jax.jit, static_argnames=("metric",))
def plain_value(
    decoder: Decoder, trace: Trace, reading: Reading, last_prompt: Int[Array, ""], metric: Metric
) -> Float[Array, ""]:
    """Y of a captured run whose last prompt token is at `last_prompt`."""
    return _value(decoder, metric, trace.residual[-1], reading, last_prompt)


# --- One pair ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A plain run of a prompt and a response.

    Attributes:
        tokens: the prompt's tokens and the response's.
        prompt_length: tokens of the prompt.
        trace: every site's value.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    trace: Trace


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
    """

    granularity: str
    site: Site
    units: Units
    edited: Edited
    start: int
    size: int
    place: tuple[np.ndarray, ...]


def plan(
    config: DecoderConfig,
    pair: Pair,
    term: Term,
    question: Question,
    granularities: Iterable[str],
    swapped: bool,
) -> list[Work]:
    """What is to be computed for one term of a metric in one direction.

    Units whose every edited position comes after the last one that is read are left out: their
    effect is exactly 0. With `swapped` the patches are made in the source run.
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
        for index, site in enumerate(SITES[granularity]):
            units = Units.grid(config.num_layers, _unit_count(config, question, site))
            place = {"module": (units.layers, np.full(len(units), index)), "layer": (units.layers,)}
            place = place.get(granularity, (units.layers, units.units))
            work.append(Work(granularity, site, units, edited, start, size, place))
    return work


def _token_work(config, edited: Edited, columns: np.ndarray, last_read: int) -> list[Work]:
    """Each position alone, in groups of positions whose spans have the same padded length."""
    sizes = np.array([_span(position, last_read, smallest=16)[1] for position in edited.base])
    work = []
    for size in np.unique(sizes):
        here = sizes == size
        start = max(0, last_read + 1 - int(size))
        group = Edited(edited.base[here], edited.source[here])
        units = Units.grid(config.num_layers, positions=group.base - start)
        place = np.tile(columns[here], config.num_layers)
        for index, site in enumerate(SITES["token"]):
            site_place = (units.layers, np.full(len(units), index), place)
            work.append(Work("token", site, units, group, start, int(size), site_place))
    return work


def _span(first: int, last: int, smallest: int = 1) -> tuple[int, int]:
    """Start and padded length of the span that holds all edited and read positions.

    Its length is 1, 4, 16 or a larger power of two: each length is compiled once.
    """
    length = int(last - first) + 1
    size = next((size for size in (1, 4) if smallest <= size and length <= size), 0)
    size = size or capture.bucket(length, smallest=16)
    return max(0, int(last) + 1 - size), size


def _unit_count(config: DecoderConfig, question: Question, site: Site) -> int:
    if site == Site.HEAD:
        return config.num_heads
    return group_count(config, question.group_size) if site == Site.NEURON else 1


def shapes(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Shape of one pair's effects by granularity."""
    layers = config.num_layers
    known = {
        "layer": (layers,),
        "module": (layers, 2),
        "head": (layers, config.num_heads),
        "token": (layers, 3, int(_token_columns(pair, question).max()) + 1),
        "neuron": (layers, group_count(config, question.group_size)),
    }
    return {name: known[name] for name in granularities}


def _token_columns(pair: Pair, question: Question) -> np.ndarray:
    """Where the token granularity stores the aligned positions: counted from the prompt's end."""
    edited = alignment.edited(pair, Positions.PROMPT, question.align)
    return len(pair.prompt_ids) - 1 - edited.base


def check(config: DecoderConfig, pair: Pair, question: Question) -> None:
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
        alignment.edited(pair, question.positions, question.align, len(term.response))


def scan_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    *,
    memory_gb: float = 1.0,
    on_operations: Callable[[float], None] = lambda operations: None,
) -> PairEffects:
    """NIE and TIE of every unit of one pair (design, section 3), by the engine.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        granularities: which to compute.
        memory_gb: memory for the differences of a batch, in GiB; it sets the size of the batch.
        on_operations: told of the floating-point operations that have been done since last told.

    Raises:
        DataError: the pair does not fit the model or the question.
    """
    granularities = list(granularities)

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        works = plan(decoder.config, pair, term, question, granularities, swapped)
        for start, size in sorted({(work.start, work.size) for work in works}):
            same_span = [work for work in works if (work.start, work.size) == (start, size)]
            frame = capture.frame(decoder, base.trace, start, size)
            most = max(len(work.units) for work in same_span)
            batch = batch_size(decoder.config, same_span[0], term, most, memory_gb)
            for work in same_span:
                found = _scan_work(
                    decoder, base, source, frame, work, term, question, batch, on_operations
                )
                yield work.granularity, work.place, found

    result_shapes = shapes(decoder.config, pair, question, granularities)
    return _pair_effects(decoder, pair, question, result_shapes, capture.capture, evaluate)


def _scan_work(
    decoder: Decoder,
    base: Run,
    source: Run,
    frame: Frame,
    work: Work,
    term: Term,
    question: Question,
    batch: int,
    on_operations: Callable[[float], None],
) -> np.ndarray:
    """dY of the units of one piece of work, [U]."""
    rows = work.start + np.arange(work.size)
    source_rows, edited = np.zeros(work.size, np.int32), np.zeros(work.size, bool)
    source_rows[work.edited.base - work.start] = work.edited.source
    edited[work.edited.base - work.start] = True
    change = capture.site_difference(base.trace, source.trace, work.site, rows, source_rows, edited)
    last_prompt = base.prompt_length - 1 - work.start
    changes = []
    for part in work.units.batches(batch, padding_layer=decoder.config.num_layers):
        entering = enter(
            decoder,
            change,
            part.layers,
            part.units,
            part.positions,
            site=work.site,
            group_size=question.group_size,
        )
        stages = stage(work.site, part.layers)
        changes.append(
            np.asarray(
                carry(decoder, frame, stages, entering, term.reading, last_prompt, question.metric)
            )
        )
        on_operations(_operations(decoder.config, work, term, stages))
    return np.concatenate(changes)[: len(work.units)]


def _pair_effects(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    result_shapes: dict[str, tuple[int, ...]],
    capture_run: Callable[[Decoder, tuple[int, ...]], Trace],
    evaluate: Callable[[Run, Run, Term, bool], Iterator],
) -> PairEffects:
    """Both runs of every term; sums what `evaluate` yields: (name of the result, place, dY)."""
    check(decoder.config, pair, question)
    totals = [{name: np.zeros(shape) for name, shape in result_shapes.items()} for _ in range(2)]
    y = np.zeros(2)
    for term in question.metric.terms(pair):
        runs = []
        for index, prompt in enumerate((pair.prompt_ids, pair.counterfactual_ids)):
            tokens = prompt + term.response
            run = Run(tokens, len(prompt), capture_run(decoder, tokens))
            y[index] += term.sign * float(
                plain_value(decoder, run.trace, term.reading, len(prompt) - 1, question.metric)
            )
            runs.append(run)
        for swapped in (False, True):
            # TIE = Y(x') - Y(x', Z<-Z(x)): the patch is made in the source run, and counted down.
            sign = -term.sign if swapped else term.sign
            base, source = reversed(runs) if swapped else runs
            for granularity, place, changes in evaluate(base, source, term, swapped):
                totals[swapped][granularity][place] += sign * changes
    if "token" in result_shapes:
        # Positions that the alignment leaves out have no effect, not one of 0.
        aligned = _token_columns(pair, question)
        for total in totals:
            total["token"][..., np.setdiff1d(np.arange(total["token"].shape[-1]), aligned)] = np.nan
    return PairEffects(float(y[0]), float(y[1]), *totals)


def scan(
    decoder: Decoder,
    pairs: list[Pair],
    granularity: str = "neuron",
    metric: Metric | None = None,
    *,
    positions: str = "last",
    align: str = "end",
    group_size: int = 1,
    matmul_precision: str = "highest",
    memory_gb: float = 1.0,
) -> Effects:
    """NIE and TIE of every unit of one granularity, for every pair, in memory.

    Args:
        decoder: the model.
        pairs: the pairs.
        granularity: layer, module, head, token or neuron.
        metric: the metric; `metrics.LogitDifference()` by default.
        positions: which positions are edited: last, differing, prompt or response.
        align: end, start or span.
        group_size: adjacent neurons that are edited together.
        matmul_precision: as `jax.default_matmul_precision` takes it; accelerators round the
            products of float32 numbers unless told otherwise.
        memory_gb: memory for the differences of a batch, in GiB.

    Raises:
        DataError: a pair does not fit the model or the question; the message names its line.
    """
    question = Question(metric or LogitDifference(), Positions(positions), Align(align), group_size)
    for pair in pairs:
        check(decoder.config, pair, question)
    with jax.default_matmul_precision(matmul_precision):
        found = [
            scan_pair(decoder, pair, question, [granularity], memory_gb=memory_gb) for pair in pairs
        ]
    return Effects(
        nie=stack([effects.nie[granularity] for effects in found]),
        tie=stack([effects.tie[granularity] for effects in found]),
        y_base=np.array([effects.y_base for effects in found], np.float32),
        y_source=np.array([effects.y_source for effects in found], np.float32),
    )


def stack(effects: list[np.ndarray]) -> np.ndarray:
    """Pairs' effects as one array, float32; NaN beyond a pair's last position."""
    size = max(effect.shape[-1] for effect in effects)
    padded = [
        np.pad(
            effect,
            [(0, 0)] * (effect.ndim - 1) + [(0, size - effect.shape[-1])],
            constant_values=np.nan,
        )
        for effect in effects
    ]
    return np.stack(padded).astype(np.float32)


# --- Cost --------------------------------------------------------------------------------------


def operations(
    config: DecoderConfig, pair: Pair, question: Question, granularities: Iterable[str]
) -> float:
    """Floating-point operations of the matrix products that a pair's scan needs."""
    return sum(
        _operations(config, work, term, stage(work.site, work.units.layers))
        for term in question.metric.terms(pair)
        for swapped in (False, True)
        for work in plan(config, pair, term, question, granularities, swapped)
    )


def _operations(config: DecoderConfig, work: Work, term: Term, stages) -> float:
    """Two per multiply-add, in the blocks that follow each unit and in the metric."""
    width, head_dim = config.hidden_size, config.head_dim
    projections = width * head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * width * config.intermediate_size
    # Scores and values: each a product with the prefix, and two with the span.
    attention = 2 * config.num_heads * head_dim * (work.start + 2 * work.size)
    last = 2 * config.num_layers
    real = np.asarray(stages)[np.asarray(stages) <= last]
    halves = np.sum(last - real), np.sum((last - real + 1) // 2)
    blocks = (projections + attention) * (halves[0] - halves[1]) + mlp * halves[1]
    tokens = np.size(term.reading.tokens) if not term.response else config.vocab_size
    read = len(real) * len(term.reading.offsets) * width * tokens
    return 2.0 * (work.size * float(blocks) + float(read))


def batch_size(
    config: DecoderConfig, work: Work, term: Term, most_units: int, memory_gb: float
) -> int:
    """Units of a batch: a power of two that fits the memory, and no more than there are."""
    position = 8 * config.hidden_size + 6 * config.intermediate_size
    position += 4 * config.num_heads * (work.start + 2 * work.size)
    numbers = position * work.size
    if term.response:
        numbers += 6 * len(term.reading.offsets) * config.vocab_size
    fits = int(memory_gb * 2**30 / (4 * numbers))
    return min(capture.bucket(most_units), 1 << max(0, min(fits, 512).bit_length() - 1))


# --- The plain definition ----------------------------------------------------------------------


def define_pair(
    decoder: Decoder, pair: Pair, question: Question, granularities: Iterable[str]
) -> PairEffects:
    """NIE and TIE by their plain definition: the reference that `scan_pair` is tested against.

    The whole model is run again for every unit, with an explicit edit: no padding, no cache, and
    no difference but the last, Y(edited) - Y(plain). Slow.
    """
    granularities = list(granularities)

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        length = len(base.tokens)
        for work in plan(decoder.config, pair, term, question, granularities, swapped):
            values = {
                site: _aligned(source.trace, site, work.edited, length) for site in _LAYER_SITES
            }
            changes = []
            for units in work.units.batches(_DEFINED_AT_ONCE, decoder.config.num_layers):
                positions = np.zeros((len(units), length), bool)
                positions[:, work.edited.base] = True
                alone = units.positions != _ALL
                position = work.start + units.positions[alone, None]
                positions[alone] = np.arange(length) == position
                changes.append(
                    _defined_changes(
                        decoder,
                        np.array(base.tokens),
                        values,
                        _LAYER_SITES.index(work.site),
                        (units.layers, units.units, positions),
                        question.group_size,
                        term.reading,
                        base.prompt_length - 1,
                        metric=question.metric,
                    )
                )
            yield work.granularity, work.place, np.concatenate(changes)[: len(work.units)]

    result_shapes = shapes(decoder.config, pair, question, granularities)
    return _pair_effects(decoder, pair, question, result_shapes, _trace, evaluate)


@functools.partial(jax.jit, static_argnames=("metric",))
def _defined_changes(
    decoder, tokens, values, chosen, units, group_size, reading, last_prompt, metric
) -> Float[Array, "U"]:
    """Y(edited) - Y(plain) for units of the chosen site, given by layer, unit and positions.

    Every site has its edit, and the masks of all but the chosen one are empty: one compilation
    serves all sites.
    """
    config = decoder.config

    def edited_value(unit):
        layer, index, positions = unit
        members = {
            Site.HEAD: jnp.arange(config.num_heads) == index,
            Site.NEURON: jnp.arange(config.intermediate_size) // group_size == index,
        }
        edits = [
            Edit.patch(
                site, layer, positions & (number == chosen), values[site][layer], members.get(site)
            )
            for number, site in enumerate(_LAYER_SITES)
        ]
        return _run_value(decoder, tokens, None, edits, reading, last_prompt, metric)

    plain = _run_value(decoder, tokens, None, [], reading, last_prompt, metric)
    return jax.vmap(edited_value)(units) - plain


def joint_pair(
    decoder: Decoder, pair: Pair, question: Question, sets: Bool[Array, "N L I"]
) -> PairEffects:
    """NIE and TIE of sets of neurons, each set patched as one intervention.

    The whole model is run for every set, with a list of edits: one for each layer.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        sets: which neurons are in each set.

    Returns:
        Effects whose NIE and TIE hold one array, "joint", [N].
    """

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        response = len(term.response)
        edited = alignment.edited(pair, question.positions, question.align, response)
        edited = edited.swapped() if swapped else edited
        tokens, valid = capture.pad(base.tokens)
        positions = np.zeros(len(tokens), bool)
        positions[edited.base] = True
        found = _joint_changes(
            decoder,
            tokens,
            valid,
            _aligned(source.trace, Site.NEURON, edited, len(tokens)),
            positions,
            sets,
            term.reading,
            base.prompt_length - 1,
            metric=question.metric,
        )
        yield "joint", ..., np.asarray(found)

    joint_shape = {"joint": (len(sets),)}
    return _pair_effects(decoder, pair, question, joint_shape, capture.capture, evaluate)


@functools.partial(jax.jit, static_argnames=("metric",))
def _joint_changes(
    decoder, tokens, valid, values, positions, sets, reading, last_prompt, metric
) -> Float[Array, "N"]:
    """Y(edited) - Y(plain) for sets of neurons."""

    def run(members):
        edits = [
            Edit.patch(Site.NEURON, layer, positions, values[layer], members[layer])
            for layer in range(decoder.config.num_layers)
        ]
        return _run_value(decoder, tokens, valid, edits, reading, last_prompt, metric)

    return jax.lax.map(run, sets, batch_size=64) - run(jnp.zeros_like(sets[0]))


def _run_value(decoder, tokens, valid, edits, reading, last_prompt, metric) -> Float[Array, ""]:
    """Y of a run with explicit edits, from its logits."""
    logits, _ = decoder(tokens, edits=edits, valid=valid)
    rows = logits[last_prompt + reading.offsets]
    return metric.value(lambda chosen: rows if chosen is None else rows[:, chosen], reading)


def _aligned(trace: Trace, site: Site, edited: Edited, length: int) -> np.ndarray:
    """The source run's values of a site, moved to the base run's positions, [L, T, ...]."""
    source_rows = np.zeros(length, np.int32)
    source_rows[edited.base] = edited.source
    return np.asarray(getattr(trace, site.value))[:, source_rows]


def _trace(decoder: Decoder, tokens: tuple[int, ...]) -> Trace:
    return _plain_run(decoder, np.array(tokens))


_plain_run = jax.jit(lambda decoder, tokens: decoder(tokens)[1])
