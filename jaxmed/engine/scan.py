"""A scan: NIE and TIE of every unit of a pair."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost, plan, propagate
from jaxmed.engine import memory as memory_lib
from jaxmed.engine.capture import Frame
from jaxmed.engine.plan import Work
from jaxmed.question import question as question_lib
from jaxmed.question.effects import PairEffects
from jaxmed.question.metrics import Term
from jaxmed.question.question import Question
from models.decoder import Decoder, Trace


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
    chosen: Mapping[str, np.ndarray] | None = None,
    rotation: Float[np.ndarray, "d d"] | None = None,
    matmul_precision: str = "float32",
    memory: int | None = None,
    on_operations: Callable[[float], None] = lambda operations: None,
) -> PairEffects:
    """NIE and TIE of every unit of one pair by the engine.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        granularities: which to compute.
        chosen: by granularity, which units to compute, as a mask of its effects; all by default.
            The effects of the others are NaN.
        rotation: turns what each edit adds to the residual stream, for a control; see
            `controls.rotated_strengths`.
        matmul_precision: of products with differences; "float32" or "bfloat16". Plain runs are
            always float32.
        memory: bytes for the runs and the differences; `memory.free()` by default.
        on_operations: told of the floating-point operations that have been done since last told.

    Raises:
        DataError: the pair does not fit the model or the question.
        InputError: the memory does not suffice for one unit.
        ValueError: a mask is not of its effects.
    """
    granularities, chosen = list(granularities), dict(chosen or {})
    result_shapes = question_lib.shapes(decoder.config, pair, question, granularities)
    for name, mask in chosen.items():
        if mask.dtype != bool or mask.shape != result_shapes.get(name):
            raise ValueError(f"chosen['{name}'] is no mask of its effects, or they are not asked")
    memory = memory_lib.free() if memory is None else memory

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        works = plan.plan(decoder.config, pair, term, question, granularities, swapped, chosen)
        for start, size in sorted({(work.start, work.size) for work in works}):
            frame = capture.frame(decoder, base.trace, start, size)
            for work in works:
                if (work.start, work.size) == (start, size):
                    found = _scan_work(
                        *(decoder, base, source, frame, work, term, question),
                        *(rotation, matmul_precision, memory, on_operations),
                    )
                    yield work.granularity, work.place, found

    with jax.default_matmul_precision("float32"):
        found = pair_effects(decoder, pair, question, result_shapes, capture.capture, evaluate)
    for name, mask in chosen.items():
        for side in (found.nie, found.tie):
            side[name][~mask] = np.nan
    return found


def _scan_work(
    decoder: Decoder,
    base: Run,
    source: Run,
    frame: Frame,
    work: Work,
    term: Term,
    question: Question,
    rotation: Float[np.ndarray, "d d"] | None,
    matmul_precision: str,
    memory: int,
    on_operations: Callable[[float], None],
) -> np.ndarray:
    """dY of the units of one piece of work, [U]."""
    change = capture.edited_difference(
        base.trace, source.trace, work.site, work.edited, work.start, work.size
    )
    written = propagate.writes(decoder, base.trace, work.site, work.start, work.size)
    last_prompt = base.prompt_length - 1 - work.start
    dtype = decoder.embedding[...].dtype
    size = cost.batching(decoder.config, dtype, work, term, memory, jax.default_backend())
    found = []
    if work.vectors is not None:
        directions = propagate.direction_writes(decoder, change, work)
        work = dataclasses.replace(work, units=work.units.numbered())
    # A chunk is collected when the next one is under way, so that the device does not wait.
    under_way = None
    for part in work.units.chunks(*size, padding_layer=decoder.config.num_layers):
        where = (part.layers, part.units, part.positions)
        if work.vectors is None:
            entering = propagate.enter(
                decoder, change, written, *where, work.site, question.group_size
            )
        else:
            entering = propagate.enter_directions(decoder, *directions, written, *where, work.site)
        if rotation is not None:
            entering = entering @ rotation.astype(entering.dtype)
        stages = plan.stage(decoder.config, work.site, part.layers)
        residual = propagate.carry(decoder, frame, stages, entering, matmul_precision)
        y = propagate.read_changes(
            *(decoder, frame.inputs[-1], stages, residual, term.reading, last_prompt),
            *(question.metric, matmul_precision),
        )
        if under_way is not None:
            found.append(_collect(under_way, on_operations))
        under_way = y, cost.batch_operations(decoder.config, work, term, stages)
    found.append(_collect(under_way, on_operations))
    return np.concatenate(found)[: len(work.units)]


def _collect(under_way: tuple[Array, float], on_operations: Callable[[float], None]) -> np.ndarray:
    """The effects of a chunk, once they are computed."""
    y, operations = under_way
    y = np.asarray(y).reshape(-1)
    on_operations(operations)
    return y


def pair_effects(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    result_shapes: dict[str, tuple[int, ...]],
    capture_run: Callable[[Decoder, tuple[int, ...]], Trace],
    evaluate: Callable[[Run, Run, Term, bool], Iterator],
) -> PairEffects:
    """Both runs of every term; sums what `evaluate` yields: (name of the result, place, dY)."""
    question_lib.check(decoder.config, pair, question, result_shapes)
    totals = [{name: np.zeros(shape) for name, shape in result_shapes.items()} for _ in range(2)]
    y = np.zeros(2)
    for term in question.metric.terms(pair):
        runs = []
        for index, prompt in enumerate((pair.prompt_ids, pair.counterfactual_ids)):
            tokens = prompt + term.response
            run = Run(tokens, len(prompt), capture_run(decoder, tokens))
            y[index] += term.sign * float(
                propagate.plain_value(
                    decoder, run.trace, term.reading, len(prompt) - 1, question.metric
                )
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
        aligned = question_lib.token_columns(pair, question)
        for total in totals:
            total["token"][..., np.setdiff1d(np.arange(total["token"].shape[-1]), aligned)] = np.nan
    if "direction" in result_shapes:
        for total in totals:
            total["direction"][~question.directions.given] = np.nan
    return PairEffects(float(y[0]), float(y[1]), *totals)
