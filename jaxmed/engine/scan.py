"""A scan: NIE and TIE of every unit of pairs."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import blocks as blocks_lib
from jaxmed.engine import capture, cost, plan, propagate, shard
from jaxmed.engine import memory as memory_lib
from jaxmed.engine import runs as runs_lib
from jaxmed.engine.blocks import Block, Chosen, Patched
from jaxmed.engine.cost import Batching, Devices
from jaxmed.engine.plan import Units, Work
from jaxmed.engine.runs import Captured
from jaxmed.question import question as question_lib
from jaxmed.question.effects import PairEffects
from jaxmed.question.joined import Joined
from jaxmed.question.question import Question
from models.config import DecoderConfig
from models.decoder import Decoder, Trace
from models.shapes import AnyArray


@dataclasses.dataclass(frozen=True)
class Run:
    """A plain run of a prompt and the responses that are read after it.

    Attributes:
        tokens: the prompt's tokens and the responses'.
        prompt_length: tokens of the prompt.
        trace: every site's value.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    trace: Trace


# From the run that is patched, the run whose values are put in, what is read of them, and whether
# the former is the source run, to what was found: the name of an array of effects, an index of it,
# and dY there.
Evaluate = Callable[[Run, Run, Joined, bool], Iterable[tuple[str, Any, np.ndarray]]]


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
        chosen, rotation, on_operations: as in `Scan`.
        memory: bytes for the runs and the differences; `memory.free()` by default.

    Raises:
        DataError: the pair does not fit the model or the question.
        InputError: the memory does not suffice for one unit.
        ValueError: a mask is not of its effects.
    """
    (found,) = scan_pairs(
        *(decoder, [pair], question, granularities),
        chosen=[chosen or {}],
        rotation=rotation,
        memory=memory,
        on_operations=on_operations,
    )
    return found


def scan_pairs(
    decoder: Decoder,
    pairs: Sequence[Pair],
    question: Question,
    granularities: Iterable[str],
    *,
    chosen: Sequence[Chosen],
    rotation: Float[AnyArray, "d d"] | None = None,
    memory: int | None = None,
    on_operations: Callable[[float], None] = lambda operations: None,
) -> list[PairEffects]:
    """NIE and TIE of several pairs: all blocks of their `Scan`. Arguments and errors as of
    `scan_pair`, but that `chosen` has the masks of each pair."""
    scan = Scan(decoder, pairs, question, chosen=chosen, rotation=rotation)
    blocks = scan.blocks(granularities, memory_lib.free() if memory is None else memory)
    found: list[list[PairEffects]] = [[] for _ in pairs]
    for block in blocks:
        for index, effects in zip(block.pairs, scan.effects(block, on_operations), strict=True):
            found[index].append(effects)
    return list(map(joined, found))


def joined(found: Sequence[PairEffects]) -> PairEffects:
    """The effects of one pair, from those at each granularity."""
    return PairEffects(
        y_base=found[0].y_base,
        y_source=found[0].y_source,
        nie={name: effects for each in found for name, effects in each.nie.items()},
        tie={name: effects for each in found for name, effects in each.tie.items()},
    )


class Scan:
    """NIE and TIE of pairs, block by block.

    The plain runs of the block of pairs that was scanned last are kept for its next granularity.

    Attributes:
        decoder: the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        pairs: Sequence[Pair],
        question: Question,
        *,
        chosen: Sequence[Chosen],
        rotation: Float[AnyArray, "d d"] | None = None,
    ):
        """Nothing is computed yet.

        Args:
            decoder: the model; `Decoder.at_precision` says how differences are multiplied.
            pairs: the pairs.
            question: the metric and the positions.
            chosen: of each pair, by granularity, which units to compute, as a mask of its effects;
                all of a granularity that is not named. The effects of the others are NaN.
            rotation: turns what each edit adds to the residual stream, for a control; see
                `controls.rotated_strengths`.
        """
        self.decoder = decoder
        self._pairs, self._question = list(pairs), question
        self._chosen, self._rotation = list(chosen), rotation
        self._captured: tuple[tuple[int, ...], Captured] | None = None

    def blocks(
        self,
        granularities: Iterable[str],
        memory: int,
        layers_together: Mapping[str, int] | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Block]:
        """The units of work, with the sizes of their batches, which effects depend on by rounding.

        Args:
            granularities: which to compute.
            memory: bytes for the runs and the differences.
            layers_together, indices: as of `blocks.blocks`.

        Raises:
            DataError: a pair does not fit the model or the question.
            InputError: the memory does not suffice for one unit.
            ValueError: a mask is not of its effects.
        """
        config, granularities = self.decoder.config, list(granularities)
        for pair, chosen in zip(self._pairs, self._chosen, strict=True):
            shapes = question_lib.shapes(config, pair, self._question, granularities)
            for name, mask in chosen.items():
                if mask.dtype != bool or mask.shape != shapes.get(name):
                    raise ValueError(
                        f"chosen['{name}'] is no mask of its effects, or they are not asked"
                    )
            question_lib.check(config, pair, self._question, granularities)
        return blocks_lib.blocks(
            *(config, self.decoder.dtype, self._pairs, self._question, granularities),
            chosen=self._chosen,
            memory=memory,
            platform=jax.default_backend(),
            devices=Devices.of(self.decoder.mesh),
            layers_together=layers_together,
            indices=indices,
        )

    def effects(
        self, block: Block, on_operations: Callable[[float], None] = lambda operations: None
    ) -> list[PairEffects]:
        """The effects of a block, of each of its pairs; NaN in layers that are not the block's.

        Args:
            block: of `blocks`.
            on_operations: told of the floating-point operations that have been done since last
                told.
        """
        pairs = [self._pairs[index] for index in block.pairs]
        chosen = [self._chosen[index] for index in block.pairs]
        of_groups = blocks_lib.groups(
            self.decoder.config, pairs, self._question, block.granularity, chosen, block.layers
        )
        under_way, found = _UnderWay(on_operations), []
        with jax.default_matmul_precision("float32"):
            captured = self._capture(block.pairs)
            for group, sizes in zip(of_groups, block.batches, strict=True):
                for runs in blocks_lib.together(group, sizes):
                    found += self._patch(captured, runs, sizes, under_way)
            under_way.finish()
        effects = [
            PairEffects(*y, nie=self._nothing(block, pair), tie=self._nothing(block, pair))
            for y, pair in zip(captured.values(), pairs, strict=True)
        ]
        for changes in found:
            changes.add_to(effects)
        for of_pair, pair, masks in zip(effects, pairs, chosen, strict=True):
            for total in (of_pair.nie, of_pair.tie):
                _leave_out(pair, self._question, total)
                for name in {block.granularity} & set(masks):
                    total[name][~masks[name]] = np.nan
                first, stop = block.layers
                total[block.granularity][:first] = np.nan
                total[block.granularity][stop:] = np.nan
        return effects

    def totals(self, index: int) -> tuple[float, float]:
        """Y of both plain runs of a pair."""
        with jax.default_matmul_precision("float32"):
            ((y_base, y_source),) = self._capture((index,)).values()
        return y_base, y_source

    def _nothing(self, block: Block, pair: Pair) -> dict[str, np.ndarray]:
        """No effect of any of a pair's units."""
        config = self.decoder.config
        shapes = question_lib.shapes(config, pair, self._question, [block.granularity])
        return {name: np.zeros(shape) for name, shape in shapes.items()}

    def _capture(self, indices: tuple[int, ...]) -> Captured:
        """The plain runs of a block's pairs."""
        if self._captured is None or self._captured[0] != indices:
            self._captured = None  # before others take memory
            pairs = [self._pairs[index] for index in indices]
            self._captured = indices, runs_lib.captured(self.decoder, pairs, self._question)
        return self._captured[1]

    def _patch(
        self,
        captured: Captured,
        patched: Sequence[Patched],
        sizes: Batching,
        under_way: "_UnderWay",
    ) -> Iterator["_Changes"]:
        """What becomes of the metric in runs that go through the model together."""
        decoder, question = self.decoder, self._question
        config, term = decoder.config, patched[0].term
        # The last is repeated where there are fewer: they are compiled for one number.
        filled = [*patched, *[patched[-1]] * (sizes.runs - len(patched))]
        starts = np.array([run.start for run in filled], np.int32)
        ends = [captured.last_prompt(run.pair, run.swapped) for run in filled]
        base, source = (
            np.array([captured.place(run.pair, run.swapped ^ other, run.term) for run in filled])
            for other in (False, True)
        )
        size = filled[0].works[0].size
        prefix_size = capture.prefix_length(int(starts.max()))
        frames = runs_lib.frames(decoder, captured.traces, base, starts, size, prefix_size)
        readings = runs_lib.stacked([run.term.reading for run in filled])
        to_carry = propagate.blocks_to_carry(config, size, term.reading)
        for works in zip(*(run.works for run in filled), strict=True):
            units, rows = blocks_lib.merged(works)
            needed = _needed(config, patched, works, rows, len(units))
            enter = self._enter(captured.traces, works, units, base, source)
            if works[0].vectors is not None:
                units = units.numbered()
            # Of sizes that were recorded on another mesh, more rows.
            count = Devices.of(decoder.mesh).filled(sizes.rows)
            chunks = units.chunks(sizes.batches, count, padding_layer=config.num_layers)
            # On the devices before the first is begun, so that none waits for the host.
            parts = shard.spread(
                decoder,
                [(part, plan.stage(config, works[0].site, part.layers)) for part in chunks],
            )
            found = []
            for part, stages in parts:
                entering = enter(part)
                if self._rotation is not None:
                    entering = entering @ self._rotation.astype(entering.dtype)
                differences = runs_lib.carry(decoder, frames, stages, entering, to_carry)
                y = runs_lib.read_changes(
                    *(decoder, frames, stages, differences, readings),
                    *(ends - starts, question.metric, term.whole_vocabulary),
                )
                first = len(found) * stages.size
                found.append(y)
                under_way.add(y, float(np.sum(needed[first : first + stages.size])))
            yield _Changes(patched, works[: len(patched)], rows, found)

    def _enter(
        self,
        traces: Trace,
        works: Sequence[Work],
        units: Units,
        base: Int[np.ndarray, "R"],
        source: Int[np.ndarray, "R"],
    ) -> Callable[[Units], Float[Array, "R n S B d"]]:
        """From a chunk of the units to what their edits add to the residual streams."""
        decoder, site, size = self.decoder, works[0].site, works[0].size
        rows = zip(*(capture.edited_rows(w.edited, w.start, size) for w in works), strict=True)
        changes = runs_lib.changes(traces, base, source, site, *map(np.stack, rows))
        starts = np.array([work.start for work in works], np.int32)
        written = None
        if propagate.goes_through_norm(decoder.config, site):
            written = runs_lib.writes(decoder, traces, base, starts, site, size)
        vectors = works[0].vectors
        if vectors is None:
            group_size = self._question.group_size
            return lambda part: runs_lib.enter(
                *(decoder, changes, written, part.layers, part.units, part.positions),
                *(site, group_size),
            )
        each = [
            propagate.direction_writes(decoder, change, site, units, vectors) for change in changes
        ]
        along, added = jnp.stack([of_run for of_run, _ in each]), each[0][1]
        return lambda part: runs_lib.enter_directions(
            *(decoder, along, added, written, part.layers, part.units, part.positions, site)
        )


@dataclasses.dataclass(frozen=True)
class _Changes:
    """What was found of one site in runs that went through the model together.

    Attributes:
        patched: the runs.
        works: what was computed of each.
        rows: where each run's units are among those that went through the model.
        y: dY, chunk by chunk, [R, n, B]; on the device.
    """

    patched: Sequence[Patched]
    works: Sequence[Work]
    rows: Sequence[np.ndarray]
    y: Sequence[Float[Array, "R n B"]]

    def add_to(self, effects: Sequence[PairEffects]) -> None:
        """Adds them to the effects of the block's pairs."""
        y = np.concatenate([np.asarray(chunk).reshape(len(chunk), -1) for chunk in self.y], axis=1)
        for run, work, rows, found in zip(self.patched, self.works, self.rows, y, strict=False):
            of_pair = effects[run.pair]
            # TIE = Y(x') - Y(x', Z<-Z(x)): the patch is made in the source run, and counted down.
            if run.swapped:
                of_pair.tie[work.granularity][work.place] -= found[rows]
            else:
                of_pair.nie[work.granularity][work.place] += found[rows]


class _UnderWay:
    """What the device is at. One chunk is begun while the one before is computed, so that neither
    waits for the host nor takes memory for more than that."""

    def __init__(self, on_operations: Callable[[float], None]):
        self._on_operations = on_operations
        self._last: tuple[Array, float] | None = None

    def add(self, y: Array, operations: float) -> None:
        """A chunk was begun; waits for the one before, and tells that it is done."""
        y.copy_to_host_async()
        self.finish()
        self._last = y, operations

    def finish(self) -> None:
        """Waits for all that was begun."""
        if self._last is not None:
            y, operations = self._last
            jax.block_until_ready(y)
            self._on_operations(operations)
            self._last = None


def _needed(
    config: DecoderConfig,
    patched: Sequence[Patched],
    works: Sequence[Work],
    rows: Sequence[np.ndarray],
    count: int,
) -> Float[np.ndarray, "U"]:
    """Floating-point operations that the runs' own units need, by their place among all."""
    total = np.zeros(count)
    for run, work, own in zip(patched, works, rows, strict=False):
        total[own] += cost.needed_operations(config, work, run.term)
    return total


def pair_effects(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    result_shapes: Mapping[str, tuple[int, ...]],
    evaluate: Evaluate,
) -> PairEffects:
    """NIE and TIE of one pair, however they are found, in the runs that the metric's terms are read
    off.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        result_shapes: by name, of the arrays of effects.
        evaluate: finds the changes dY of a run.

    Raises:
        DataError: the pair does not fit the model or the question.
    """
    question_lib.check(decoder.config, pair, question, result_shapes)
    nie, tie = ({name: np.zeros(shape) for name, shape in result_shapes.items()} for _ in range(2))
    y_base = y_source = 0.0
    for term in cost.runs(decoder.config, pair, question):
        base, base_y = _captured(decoder, pair.prompt_ids, term, question)
        source, source_y = _captured(decoder, pair.counterfactual_ids, term, question)
        y_base += base_y
        y_source += source_y
        for name, place, changes in evaluate(base, source, term, False):
            nie[name][place] += changes
        # TIE = Y(x') - Y(x', Z<-Z(x)): the patch is made in the source run, and counted down.
        for name, place, changes in evaluate(source, base, term, True):
            tie[name][place] -= changes
    return PairEffects(y_base=y_base, y_source=y_source, nie=nie, tie=tie)


def _leave_out(pair: Pair, question: Question, effects: dict[str, np.ndarray]) -> None:
    """What is no unit has no effect, not one of 0."""
    if "token" in effects:
        aligned = question_lib.token_columns(pair, question)
        columns = np.arange(effects["token"].shape[-1])
        effects["token"][..., np.setdiff1d(columns, aligned)] = np.nan
    if "direction" in effects and question.directions is not None:
        effects["direction"][~question.directions.given] = np.nan


def _captured(
    decoder: Decoder, prompt: tuple[int, ...], term: Joined, question: Question
) -> tuple[Run, float]:
    """The plain run of a prompt with the responses, and what the metric reads of it."""
    tokens, last_prompt = prompt + term.response, len(prompt) - 1
    trace = capture.capture(decoder, tokens, term.branches_after(prompt))
    y = propagate.plain_value(decoder, trace, term.reading, last_prompt, question.metric)
    return Run(tokens, len(prompt), trace), float(y)
