"""A scan: NIE and TIE of every unit of a pair."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
from models.shapes import AnyArray


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


# From the run that is patched, the run whose values are put in, the term, and whether the former is
# the source run, to what was found: the name of an array of effects, an index of it, and dY there.
Evaluate = Callable[[Run, Run, Term, bool], Iterable[tuple[str, Any, np.ndarray]]]


def scan_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    *,
    chosen: Mapping[str, np.ndarray] | None = None,
    rotation: Float[AnyArray, "d d"] | None = None,
    memory: int | None = None,
    on_operations: Callable[[float], None] = lambda operations: None,
) -> PairEffects:
    """NIE and TIE of every unit of one pair by the engine.

    Args:
        decoder: the model; `Decoder.at_precision` says how differences are multiplied.
        pair: the pair.
        question: the metric and the positions.
        granularities: which to compute.
        chosen: by granularity, which units to compute, as a mask of its effects; all by default.
            The effects of the others are NaN.
        rotation: turns what each edit adds to the residual stream, for a control; see
            `controls.rotated_strengths`.
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
    conditions = _Conditions(
        memory=memory_lib.free() if memory is None else memory,
        rotation=rotation,
        on_operations=on_operations,
    )

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        works = plan.plan(decoder.config, pair, term, question, granularities, swapped, chosen)
        for start, size in sorted({(work.start, work.size) for work in works}):
            frame = capture.frame(decoder, base.trace, start, size)
            for work in works:
                if (work.start, work.size) == (start, size):
                    found = _scan_work(
                        decoder,
                        base=base,
                        source=source,
                        frame=frame,
                        work=work,
                        term=term,
                        question=question,
                        conditions=conditions,
                    )
                    yield work.granularity, work.place, found

    with jax.default_matmul_precision("float32"):
        found = pair_effects(decoder, pair, question, result_shapes, evaluate)
    for name, mask in chosen.items():
        found.nie[name][~mask] = np.nan
        found.tie[name][~mask] = np.nan
    return found


@dataclasses.dataclass(frozen=True)
class _Conditions:
    """How a scan is made.

    Attributes:
        rotation, on_operations: as in `scan_pair`.
        memory: bytes.
    """

    memory: int
    rotation: Float[AnyArray, "d d"] | None
    on_operations: Callable[[float], None]


def _scan_work(
    decoder: Decoder,
    *,
    base: Run,
    source: Run,
    frame: Frame,
    work: Work,
    term: Term,
    question: Question,
    conditions: _Conditions,
) -> Float[np.ndarray, "U"]:
    """dY of the units of one piece of work."""
    config = decoder.config
    change = capture.edited_difference(
        base.trace, source.trace, work.site, work.edited, work.start, work.size
    )
    written = propagate.writes(decoder, base.trace, work.site, work.start, work.size)
    batches, rows = cost.batching(
        config, decoder.dtype, work, term, conditions.memory, jax.default_backend()
    )
    units, directions = work.units, None
    if work.vectors is not None:
        directions = propagate.direction_writes(decoder, change, work.site, units, work.vectors)
        units = units.numbered()
    found: list[np.ndarray] = []
    # A chunk is collected when the next one is under way, so that the device does not wait.
    under_way: tuple[Array, float] | None = None
    for part in units.chunks(batches=batches, rows=rows, padding_layer=config.num_layers):
        if directions is None:
            entering = propagate.enter(
                decoder,
                change,
                written,
                part.layers,
                part.units,
                part.positions,
                work.site,
                question.group_size,
            )
        else:
            along, added = directions
            entering = propagate.enter_directions(
                decoder, along, added, written, part.layers, part.units, part.positions, work.site
            )
        if conditions.rotation is not None:
            entering = entering @ conditions.rotation.astype(entering.dtype)
        stages = plan.stage(config, work.site, part.layers)
        residual = propagate.carry(decoder, frame, stages, entering)
        y = propagate.read_changes(
            decoder,
            frame.inputs[-1],
            stages,
            residual,
            term.reading,
            base.prompt_length - 1 - work.start,
            question.metric,
            term.whole_vocabulary,
        )
        if under_way is not None:
            found.append(_collect(under_way, conditions.on_operations))
        under_way = y, cost.batch_operations(config, work, term, stages)
    if under_way is not None:
        found.append(_collect(under_way, conditions.on_operations))
    return np.concatenate(found)[: len(units)]


def _collect(
    under_way: tuple[Array, float], on_operations: Callable[[float], None]
) -> Float[np.ndarray, "chunk"]:
    """The effects of a chunk, once they are computed."""
    y, operations = under_way
    y = np.asarray(y).reshape(-1)
    on_operations(operations)
    return y


def pair_effects(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    result_shapes: Mapping[str, tuple[int, ...]],
    evaluate: Evaluate,
) -> PairEffects:
    """NIE and TIE of one pair, however they are found: both runs of every term, and the terms' sum.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        result_shapes: by name, of the arrays of effects.
        evaluate: finds the changes dY of a term.

    Raises:
        DataError: the pair does not fit the model or the question.
    """
    question_lib.check(decoder.config, pair, question, result_shapes)
    nie, tie = ({name: np.zeros(shape) for name, shape in result_shapes.items()} for _ in range(2))
    y_base = y_source = 0.0
    for term in question.metric.terms(pair):
        base, base_y = _captured(decoder, pair.prompt_ids, term, question)
        source, source_y = _captured(decoder, pair.counterfactual_ids, term, question)
        y_base += term.sign * base_y
        y_source += term.sign * source_y
        for name, place, changes in evaluate(base, source, term, False):
            nie[name][place] += term.sign * changes
        # TIE = Y(x') - Y(x', Z<-Z(x)): the patch is made in the source run, and counted down.
        for name, place, changes in evaluate(source, base, term, True):
            tie[name][place] -= term.sign * changes
    for total in (nie, tie):
        # What is no unit has no effect, not one of 0.
        if "token" in total:
            aligned = question_lib.token_columns(pair, question)
            total["token"][..., np.setdiff1d(np.arange(total["token"].shape[-1]), aligned)] = np.nan
        if "direction" in total and question.directions is not None:
            total["direction"][~question.directions.given] = np.nan
    return PairEffects(y_base=y_base, y_source=y_source, nie=nie, tie=tie)


def _captured(
    decoder: Decoder, prompt: tuple[int, ...], term: Term, question: Question
) -> tuple[Run, float]:
    """The plain run of a prompt with a term's response, and what the metric reads of it."""
    tokens, last_prompt = prompt + term.response, len(prompt) - 1
    trace = capture.capture(decoder, tokens)
    y = propagate.plain_value(decoder, trace, term.reading, last_prompt, question.metric)
    return Run(tokens, len(prompt), trace), float(y)
