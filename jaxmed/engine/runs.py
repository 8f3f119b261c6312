"""The engine's steps for several runs at once: each has a leading axis of runs, R.

The runs of a batch have spans and prefixes of one padded length, and the same units are patched in
all of them, in the same order. So stages, weights and the bounds of loops are those of one run, and
every product with a weight is one product for the differences of all runs.

Runs are captured together too, C of them, all padded to one length: equal tokens have equal bits
wherever they stand, because all rows of a product are summed alike.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture as capture_lib
from jaxmed.engine import cost, propagate, shard
from jaxmed.engine.capture import Frame
from jaxmed.engine.cost import Devices
from jaxmed.question.joined import Joined, Readings
from jaxmed.question.metrics import Metric
from jaxmed.question.question import Question
from models.decoder import Decoder, Trace
from models.shapes import AnyArray
from models.sites import Site

Tree = TypeVar("Tree")

# A run's tokens, and their branches where there are several.
_Tokens = tuple[tuple[int, ...], tuple[int, ...] | None]


@dataclasses.dataclass(frozen=True)
class Captured:
    """The plain runs of a block of pairs.

    Attributes:
        pairs: those of the block.
        traces: of the runs, [C, ...].
        places: of every run, by its tokens and their branches.
        y: what is read off them, on the device; with the index of the pair, and whether it is of
            its source run, of each number.
    """

    pairs: Sequence[Pair]
    traces: Trace
    places: Mapping[_Tokens, int]
    y: Sequence[tuple[Float[Array, "R"], Sequence[tuple[int, bool]]]]

    def place(self, pair: int, is_source: bool, term: Joined) -> int:
        """Where the run of one of a pair's prompts with its responses is."""
        return self.places[_tokens(_prompt(self.pairs[pair], is_source), term)]

    def last_prompt(self, pair: int, is_source: bool) -> int:
        """Position of the last token of one of a pair's prompts."""
        return len(_prompt(self.pairs[pair], is_source)) - 1

    def values(self) -> list[tuple[float, float]]:
        """Y of both runs of each pair, once they are computed."""
        sums = np.zeros((len(self.pairs), 2))
        for values, of in self.y:
            for value, (pair, is_source) in zip(np.asarray(values), of, strict=False):
                sums[pair, int(is_source)] += value
        return [(base, source) for base, source in sums.tolist()]


def captured(decoder: Decoder, pairs: Sequence[Pair], question: Question) -> Captured:
    """Runs both prompts of every pair with all responses; equal tokens are run once."""
    asked = [
        (index, is_source, term, _prompt(pair, is_source))
        for index, pair in enumerate(pairs)
        for term in cost.runs(decoder.config, pair, question)
        for is_source in (False, True)
    ]
    places: dict[_Tokens, int] = {}
    for _, _, term, prompt in asked:
        places.setdefault(_tokens(prompt, term), len(places))
    length = capture_lib.run_length(max(len(run) for run, _ in places))
    # As many for every block of so many pairs, so that one compilation serves all.
    kept, devices = capture_lib.bucket(len(asked)), Devices.of(decoder.mesh)
    count = devices.filled(kept)
    tokens, branches = np.zeros((2, count, length), np.int32)
    valid = np.zeros((count, length), bool)
    for (run, of_run), place in places.items():
        tokens[place, : len(run)], valid[place, : len(run)] = run, True
        branches[place, : len(run)] = of_run or 0
    branched = any(of_run for _, of_run in places)
    own = count // devices.number
    at_once = min(own, cost.captured_at_once(length, jax.default_backend()))
    traces = capture(decoder, tokens, valid, branches if branched else None, at_once)
    traces = shard.first_everywhere(decoder, traces, kept)
    by_reading: dict[tuple, list] = {}
    for each in asked:
        by_reading.setdefault(each[2].alike(), []).append(each)
    y = []
    for alike in by_reading.values():
        filled = alike + [alike[-1]] * (capture_lib.bucket(len(alike)) - len(alike))
        found = plain_values(
            decoder,
            traces,
            np.array([places[_tokens(prompt, term)] for _, _, term, prompt in filled]),
            stacked([term.reading for _, _, term, _ in filled]),
            np.array([len(prompt) - 1 for *_, prompt in filled]),
            question.metric,
        )
        y.append((found, [(pair, is_source) for pair, is_source, *_ in alike]))
    return Captured(pairs, traces, places, y)


def stacked(trees: Sequence[Tree]) -> Tree:
    """Arrays of the same shapes along a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _prompt(pair: Pair, is_source: bool) -> tuple[int, ...]:
    return pair.counterfactual_ids if is_source else pair.prompt_ids


def _tokens(prompt: tuple[int, ...], term: Joined) -> _Tokens:
    return prompt + term.response, term.branches_after(prompt)


@functools.partial(jax.jit, static_argnames=("at_once",))
def capture(
    decoder: Decoder,
    tokens: Int[Array, "C N"],
    valid: Bool[Array, "C N"],
    branches: Int[Array, "C N"] | None,
    at_once: int,
) -> Trace:
    """Every site's value in plain runs, which are spread over the devices; on each `at_once` of
    them go through together."""

    def step(decoder, *given):
        def run(given):
            tokens, valid, branches = given
            return decoder(tokens, valid=valid, branches=branches)[1]

        return jax.lax.map(run, given, batch_size=at_once)

    over_runs = shard.rows(0)
    return shard.over(
        step, decoder, tokens, valid, branches, given=(over_runs,) * 3, gives=over_runs
    )


@functools.partial(jax.jit, static_argnames=("size", "prefix_size"))
def frames(
    decoder: Decoder,
    traces: Trace,
    runs: Int[Array, "R"],
    starts: Int[Array, "R"],
    size: int,
    prefix_size: int,
) -> Frame:
    """Captured runs, each cut at its span, as `capture.frame` does it."""
    return jax.vmap(
        lambda run, start: capture_lib.frame(decoder, _at(traces, run), start, size, prefix_size)
    )(runs, starts)


@functools.partial(jax.jit, static_argnames=("site",))
def changes(
    traces: Trace,
    base: Int[Array, "R"],
    source: Int[Array, "R"],
    site: Site,
    base_rows: Int[Array, "R S"],
    source_rows: Int[Array, "R S"],
    edited: Bool[Array, "R S"],
) -> Float[Array, "R L S ..."]:
    """Source values minus base values of a site, as `capture.site_difference` gives them."""

    def of_run(base, source, *rows):
        return capture_lib.site_difference(_at(traces, base), _at(traces, source), site, *rows)

    return jax.vmap(of_run)(base, source, base_rows, source_rows, edited)


@functools.partial(jax.jit, static_argnames=("site", "size"))
def writes(
    decoder: Decoder,
    traces: Trace,
    runs: Int[Array, "R"],
    starts: Int[Array, "R"],
    site: Site,
    size: int,
) -> Float[Array, "R L S d"]:
    """What modules write in captured runs, as `propagate.writes` gives it."""
    return jax.vmap(
        lambda run, start: propagate.writes(decoder, _at(traces, run), site, start, size)
    )(runs, starts)


@functools.partial(jax.jit, static_argnames=("site", "group_size"))
def enter(
    decoder: Decoder,
    changes: Float[Array, "R L S ..."],
    written: Float[Array, "R L S d"] | None,
    layers: Int[Array, "n B"],
    units: Int[Array, "n B"],
    positions: Int[Array, "R n B"],
    site: Site,
    group_size: int,
) -> Float[Array, "R n S B d"]:
    """D of the same units of every run, as `propagate.enter` gives it."""

    def of_run(change, written, positions):
        return propagate.enter(decoder, change, written, layers, units, positions, site, group_size)

    return jax.vmap(of_run)(changes, written, positions)


@functools.partial(jax.jit, static_argnames=("site",))
def enter_directions(
    decoder: Decoder,
    along: Float[Array, "R U S"],
    added: Float[Array, "U d"],
    written: Float[Array, "R L S d"] | None,
    layers: Int[Array, "n B"],
    which: Int[Array, "n B"],
    positions: Int[Array, "R n B"],
    site: Site,
) -> Float[Array, "R n S B d"]:
    """D of the same directions in every run, as `propagate.enter_directions` gives it."""

    def of_run(along, written, positions):
        return propagate.enter_directions(
            decoder, along, added, written, layers, which, positions, site
        )

    return jax.vmap(of_run)(along, written, positions)


@functools.partial(jax.jit, donate_argnames=("differences",))
def carry(
    decoder: Decoder,
    frames: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "R n S B d"],
    blocks: Int[ArrayLike, ""],
) -> Float[Array, "R n S B d"]:
    """The change of a block's output in every run, as `propagate.carry` gives it."""

    def of_run(frame, differences):
        return propagate.carry(decoder, frame, stages, differences, blocks)

    if len(differences) == 1:  # A long list's: an axis of one run costs copies of the batches.
        alone = of_run(jax.tree.map(lambda leaf: leaf[0], frames), differences.squeeze(0))
        return alone[None]
    return jax.vmap(of_run)(frames, differences)


@functools.partial(jax.jit, static_argnames=("metric", "whole_vocabulary"))
def read_changes(
    decoder: Decoder,
    frames: Frame,
    stages: Int[Array, "n B"],
    differences: Float[Array, "R n S B d"],
    readings: Readings,
    last_prompts: Int[Array, "R"],
    metric: Metric,
    whole_vocabulary: bool,
) -> Float[Array, "R n B"]:
    """dY in every run, as `propagate.read_changes` gives it; each has its own readings."""

    def of_run(frame, differences, reading, last_prompt):
        return propagate.read_changes(
            *(decoder, frame, stages, differences, reading, last_prompt),
            *(metric, whole_vocabulary),
        )

    return jax.vmap(of_run)(frames, differences, readings, last_prompts)


@functools.partial(jax.jit, static_argnames=("metric",))
def plain_values(
    decoder: Decoder,
    traces: Trace,
    runs: Int[Array, "R"],
    readings: Readings,
    last_prompts: Int[Array, "R"],
    metric: Metric,
) -> Float[Array, "R"]:
    """Y of captured runs, as `propagate.plain_value` gives it."""

    def of_run(run, reading, last_prompt):
        return propagate.plain_value(decoder, _at(traces, run), reading, last_prompt, metric)

    return jax.vmap(of_run)(runs, readings, last_prompts)


def _at(traces: Trace, run: Int[AnyArray, ""]) -> Trace:
    """One of the captured runs."""
    return jax.tree.map(lambda stacked: stacked[run], traces)
