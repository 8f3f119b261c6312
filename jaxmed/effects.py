"""The effect engine.

An intervention changes the residual stream by some D at some point of the network. What follows is
the same for every granularity: carry D through the later blocks and read the metric. So

    enter(site, layer, unit) -> D, and the stage where it joins the residual stream
    carry(stage, D)          -> dY

Differences alone are carried (`jaxmed.difference`): the base run is computed once for a whole batch
of edits, and rounding is relative to the effect.

Shapes are named in `models.layers` and `jaxmed.capture`; B is a batch of units, U all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed import capture, planning
from jaxmed.alignment import Align, Positions
from jaxmed.capture import Frame
from jaxmed.data import Pair
from jaxmed.difference import difference
from jaxmed.metrics import LogitDifference, Metric, Reading, Term
from jaxmed.planning import ALL_POSITIONS, Question, Work
from models.decoder import Decoder, Trace
from models.edits import Site
from models.errors import InputError


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
        nie, tie: [pair, layer, ...] float32, as in the results' files.
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
    here = (positions[:, None] == ALL_POSITIONS) | (
        positions[:, None] == jnp.arange(change.shape[1])
    )
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

    def y(residual):
        return read(decoder, metric, residual, reading, last_prompt)

    return _change(y, frame.inputs[-1], join(differences, last))


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


def read(decoder, metric, residual, reading, last_prompt):
    """Y, from the last block's output at the positions of a run or a span, [S, d]."""
    rows = residual[last_prompt + reading.offsets]
    return metric.value(lambda tokens: decoder.unembed(rows, tokens), reading)


@functools.partial(jax.jit, static_argnames=("metric",))
def plain_value(
    decoder: Decoder, trace: Trace, reading: Reading, last_prompt: Int[Array, ""], metric: Metric
) -> Float[Array, ""]:
    """Y of a captured run whose last prompt token is at `last_prompt`."""
    return read(decoder, metric, trace.residual[-1], reading, last_prompt)


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


def scan_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    *,
    memory_gb: float = 1.0,
    on_operations: Callable[[float], None] = lambda operations: None,
) -> PairEffects:
    """NIE and TIE of every unit of one pair by the engine.

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
        works = planning.plan(decoder.config, pair, term, question, granularities, swapped)
        for start, size in sorted({(work.start, work.size) for work in works}):
            same_span = [work for work in works if (work.start, work.size) == (start, size)]
            frame = capture.frame(decoder, base.trace, start, size)
            most = max(len(work.units) for work in same_span)
            batch = planning.batch_size(decoder.config, same_span[0], term, most, memory_gb)
            for work in same_span:
                found = _scan_work(
                    decoder, base, source, frame, work, term, question, batch, on_operations
                )
                yield work.granularity, work.place, found

    result_shapes = planning.shapes(decoder.config, pair, question, granularities)
    return pair_effects(decoder, pair, question, result_shapes, capture.capture, evaluate)


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
        stages = planning.stage(work.site, part.layers)
        changes.append(
            np.asarray(
                carry(decoder, frame, stages, entering, term.reading, last_prompt, question.metric)
            )
        )
        on_operations(planning.batch_operations(decoder.config, work, term, stages))
    return np.concatenate(changes)[: len(work.units)]


def pair_effects(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    result_shapes: dict[str, tuple[int, ...]],
    capture_run: Callable[[Decoder, tuple[int, ...]], Trace],
    evaluate: Callable[[Run, Run, Term, bool], Iterator],
) -> PairEffects:
    """Both runs of every term; sums what `evaluate` yields: (name of the result, place, dY)."""
    planning.check(decoder.config, pair, question, result_shapes)
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
        aligned = planning.token_columns(pair, question)
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
        InputError: the granularity is unknown, or a pair does not fit the model or the question;
            the message names its line.
    """
    if granularity not in planning.SITES:
        raise InputError(f"granularity '{granularity}' is not one of {', '.join(planning.SITES)}")
    question = Question(metric or LogitDifference(), Positions(positions), Align(align), group_size)
    for pair in pairs:
        planning.check(decoder.config, pair, question, [granularity])
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
