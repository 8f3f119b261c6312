"""Blocks of pairs: what is computed together, and in batches of what sizes.

A block is a unit of work: some pairs at one granularity, and a range of layers. Its runs that patch
the same units go through the model together: a pair's layers, modules or heads alone are too few to
fill a device. A pair's long list is cut into parts of some layers, each of about a minute.
Everything here is known before a model is run.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jax.typing import DTypeLike

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost, plan
from jaxmed.engine.cost import ONE_DEVICE, Batching, Devices
from jaxmed.engine.plan import NO_POSITION, Units, Work
from jaxmed.question import question as question_lib
from jaxmed.question.joined import Joined
from jaxmed.question.question import Question
from models.config import DecoderConfig

# By granularity, which units to compute, as a mask of a pair's effects.
Chosen = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Block:
    """What is computed, and stored, at once.

    Attributes:
        granularity: of the effects.
        pairs: indices of the pairs.
        layers: the first whose units are computed, and the one after the last.
        batches: sizes, one for each of the block's `groups`.
    """

    granularity: str
    pairs: tuple[int, ...]
    layers: tuple[int, int]
    batches: tuple[Batching, ...]

    @classmethod
    def of(cls, recorded: Mapping) -> "Block":
        """That which `run.json` holds as `dataclasses.asdict` gives it."""
        return cls(
            granularity=recorded["granularity"],
            pairs=tuple(recorded["pairs"]),
            layers=tuple(recorded["layers"]),
            batches=tuple(Batching(*sizes) for sizes in recorded["batches"]),
        )

    @property
    def name(self) -> str:
        """No other block of its run is called so."""
        return f"{self.granularity}-{self.pairs[0]:05d}-{self.layers[0]:03d}"

    def halved(self) -> "Block | None":
        """The same with half as many units in a batch or, where there is one in each, half as many
        runs together; None where nothing is left to halve."""
        for name in ("rows", "runs"):
            if any(getattr(sizes, name) > 1 for sizes in self.batches):
                smaller = (
                    sizes._replace(**{name: max(1, getattr(sizes, name) // 2)})
                    for sizes in self.batches
                )
                return dataclasses.replace(self, batches=tuple(smaller))
        return None


@dataclasses.dataclass(frozen=True)
class Patched:
    """A run that is patched: of one pair, one run of the metric, and one estimand.

    Attributes:
        pair: index in the block.
        term: what is read.
        swapped: whether the source run is the one that is patched.
        works: what is computed of it; all have one span.
    """

    pair: int
    term: Joined
    swapped: bool
    works: tuple[Work, ...]

    @property
    def start(self) -> int:
        """The span's first position."""
        return self.works[0].start

    def alike(self) -> tuple:
        """What runs have in common that go through the model together."""
        size = self.works[0].size
        return size, tuple(work.site for work in self.works), *self.term.alike()


def groups(
    config: DecoderConfig,
    pairs: Sequence[Pair],
    question: Question,
    granularity: str,
    chosen: Sequence[Chosen],
    layers: tuple[int, int] | None = None,
) -> list[list[Patched]]:
    """The runs of a block that go through the model together.

    Args:
        config: the model.
        pairs: those of the block.
        question: the metric and the positions.
        granularity: of the units.
        chosen: of each pair.
        layers: as of `Block`; all of them by default.
    """
    runs = _patched(config, pairs, question, granularity, chosen)
    return _together(runs, layers or (0, config.num_layers))


def _patched(
    config: DecoderConfig,
    pairs: Sequence[Pair],
    question: Question,
    granularity: str,
    chosen: Sequence[Chosen],
) -> list[Patched]:
    """All runs of some pairs, with the units of all layers."""
    found = []
    for index, (pair, of_pair) in enumerate(zip(pairs, chosen, strict=True)):
        for term in cost.runs(config, pair, question):
            for swapped in (False, True):
                works = plan.plan(config, pair, term, question, [granularity], swapped, of_pair)
                for span in sorted({(work.start, work.size) for work in works}):
                    here = tuple(work for work in works if (work.start, work.size) == span)
                    found.append(Patched(index, term, swapped, here))
    return found


def _together(runs: Iterable[Patched], layers: tuple[int, int]) -> list[list[Patched]]:
    """Those that have units in a range of layers, with these units alone; alike ones together."""
    found: dict[tuple, list[Patched]] = {}
    for run in runs:
        if works := tuple(inside for work in run.works if len((inside := work.of(*layers)).units)):
            here = dataclasses.replace(run, works=works)
            found.setdefault(here.alike(), []).append(here)
    return list(found.values())


def merged(works: Sequence[Work]) -> tuple[Units, list[np.ndarray]]:
    """One list of units that has those of every run, by layer and unit.

    Args:
        works: of each run; of one site.

    Returns:
        The units, with positions [R, U]; and where each run's own are in it.
    """
    wide = 1 + max(int(work.units.units.max()) for work in works)
    keys = [work.units.layers.astype(np.int64) * wide + work.units.units for work in works]
    if all(np.array_equal(of_run, keys[0]) for of_run in keys):
        shared, positions = works[0].units, np.stack([work.units.positions for work in works])
        same = np.arange(len(shared))
        return dataclasses.replace(shared, positions=positions), [same] * len(works)
    every = np.unique(np.concatenate(keys))
    at = [np.searchsorted(every, of_run) for of_run in keys]
    counts = np.max([np.bincount(places, minlength=len(every)) for places in at], axis=0)
    first = np.cumsum(counts) - counts
    # Units of a run that differ in their position alone follow each other.
    rows = [
        first[places] + np.arange(len(places)) - np.searchsorted(places, places) for places in at
    ]
    positions = np.full((len(works), counts.sum()), NO_POSITION, np.int32)
    for of_run, work, own in zip(positions, works, rows, strict=True):
        of_run[own] = work.units.positions
    layers, units = np.divmod(np.repeat(every, counts), wide)
    return Units(layers.astype(np.int32), units.astype(np.int32), positions), rows


def batches(
    config: DecoderConfig,
    dtype: DTypeLike,
    of_groups: Sequence[Sequence[Patched]],
    captured: int,
    memory: int,
    platform: str,
    devices: Devices = ONE_DEVICE,
) -> tuple[Batching, ...]:
    """The sizes of the batches of each group.

    Args:
        config, dtype, memory, platform, devices: as in `cost.batching`.
        of_groups: as `groups` gives them.
        captured: plain runs that are held.

    Raises:
        InputError: not even one unit fits.
    """
    return tuple(
        cost.batching(
            *(config, dtype, _largest(group), _longest(group), memory, platform),
            runs=len(group),
            captured=captured,
            devices=devices,
        )
        for group in of_groups
    )


def _largest(group: Sequence[Patched]) -> Work:
    """A piece of work that takes as much memory as any of the group's."""
    works = _works([group])
    longest = max(works, key=lambda work: len(work.units))
    return dataclasses.replace(longest, start=max(work.start for work in works))


def _longest(group: Sequence[Patched]) -> Joined:
    return max((run.term for run in group), key=lambda term: len(term.response))


def blocks(
    config: DecoderConfig,
    dtype: DTypeLike,
    pairs: Sequence[Pair],
    question: Question,
    granularities: Iterable[str],
    *,
    chosen: Sequence[Chosen],
    memory: int,
    platform: str,
    devices: Devices = ONE_DEVICE,
    layers_together: Mapping[str, int] | None = None,
    indices: Sequence[int] | None = None,
) -> list[Block]:
    """All blocks: of pairs of like length, and smaller ones for a granularity whose lists are long
    than for one whose lists are short.

    Args:
        config, dtype, memory, platform, devices: as in `cost.batching`.
        pairs: the pairs.
        question: the metric and the positions.
        granularities: of the effects.
        chosen: of each pair.
        layers_together: by granularity, how many layers a block has at most; all of one that is not
            named.
        indices: of the pairs that have blocks; by default all of them.

    Raises:
        InputError: not even one unit fits the memory.
    """
    granularities = list(granularities)
    terms = {
        index: cost.runs(config, pairs[index], question)
        for index in (range(len(pairs)) if indices is None else indices)
    }
    lengths = {index: _longest_run(pairs[index], of_pair) for index, of_pair in terms.items()}
    order = sorted(lengths, key=lambda index: lengths[index])
    runs = 2 * max(map(len, terms.values()))
    of_each = devices.memory(memory, platform)
    size = cost.pairs_of_a_block(config, dtype, max(lengths.values()), runs, of_each, platform)

    def of_pairs(granularity: str, indices: Sequence[int]) -> list[Patched]:
        some, masks = [pairs[index] for index in indices], [chosen[index] for index in indices]
        return _patched(config, some, question, granularity, masks)

    found = []
    for alike in _parts(order, size):
        for granularity in granularities:
            works = _works([of_pairs(granularity, alike)])
            fills = [cost.pairs_that_fill(len(w.units), w.size, platform, devices) for w in works]
            step = (layers_together or {}).get(granularity, config.num_layers)
            for part in _parts(alike, min([size, *fills])):
                patched, held = of_pairs(granularity, part), capture.bucket(runs * len(part))
                for start in range(0, config.num_layers, step):
                    layers = start, min(start + step, config.num_layers)
                    of_groups = _together(patched, layers)
                    sizes = batches(config, dtype, of_groups, held, memory, platform, devices)
                    found.append(Block(granularity, tuple(part), layers, sizes))
    return found


def layers_together(
    config: DecoderConfig,
    pairs: Sequence[Pair],
    question: Question,
    granularities: Iterable[str],
    platform: str,
    *,
    computed: Mapping[str, int],
) -> dict[str, int]:
    """By granularity, of how many layers a pair's effects are computed, and stored, at once: all,
    where that is about a minute's work, else a power of two. A part still fills the device.

    Args:
        config, platform: as in `cost.batching`.
        pairs, question, granularities: as of `blocks`.
        computed: by granularity, how many units of a pair are computed at most; all of one that is
            not named.
    """
    longest = max(pairs, key=lambda pair: max(len(pair.prompt_ids), len(pair.counterfactual_ids)))
    return {
        name: _layers_of_a_part(config, longest, question, name, platform, computed.get(name))
        for name in granularities
    }


def _layers_of_a_part(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularity: str,
    platform: str,
    most: int | None,
) -> int:
    """Layers that are computed at once of a pair's units, `most` at most of which are computed."""
    layers = config.num_layers
    works = [work for _, work in cost.works(config, pair, question, [granularity])]
    operations = cost.layer_operations(config, pair, question, granularity)
    _, *of_a_layer = question_lib.shapes(config, pair, question, [granularity])[granularity]
    units = math.prod(of_a_layer)
    share = 1.0 if most is None else min(1.0, most / (layers * units))

    def fills(together: int) -> bool:
        units = [max(1, int(share * len(work.units) * together / layers)) for work in works]
        return all(
            cost.pairs_that_fill(number, work.size, platform) == 1
            for number, work in zip(units, works, strict=True)
        )

    def is_small(together: int) -> bool:
        parts = [operations[start : start + together] for start in range(0, layers, together)]
        dearest = share * max(float(np.sum(part)) for part in parts)
        return (
            share * together * units <= cost.UNITS_OF_A_BLOCK
            and dearest <= cost.operations_of_a_block(platform)
        )

    if is_small(layers):
        return layers
    powers = [1 << exponent for exponent in range((layers - 1).bit_length())]
    filling = [together for together in powers if fills(together)]
    small = [together for together in filling if is_small(together)]
    return max(small) if small else min(filling, default=layers)


def operations_done(
    config: DecoderConfig,
    pairs: Sequence[Pair],
    question: Question,
    found: Iterable[Block],
    *,
    chosen: Sequence[Chosen],
) -> float:
    """Floating-point operations of the products that a scan makes; `cost.operations` has those that
    it needs. Also for the padding of spans, for rows that wait in their batch until their stage has
    come, and for those that no unit fills.

    Args:
        config, pairs, question, chosen: as of `blocks`.
        found: the blocks of these pairs.
    """
    total = 0.0
    for block in found:
        some, masks = zip(*((pairs[index], chosen[index]) for index in block.pairs), strict=True)
        of_groups = groups(config, some, question, block.granularity, masks, block.layers)
        for group, sizes in zip(of_groups, block.batches, strict=True):
            for runs in together(group, sizes):
                total += sum(
                    _done(config, runs, works, sizes)
                    for works in zip(*(run.works for run in runs), strict=True)
                )
    return total


def _done(
    config: DecoderConfig, runs: Sequence[Patched], works: Sequence[Work], sizes: Batching
) -> float:
    """Operations of the units of one site in runs that go through together."""
    (units, _), start = merged(works), max(run.start for run in runs)
    total = 0.0
    for part in units.chunks(sizes.batches, sizes.rows, config.num_layers):
        first = np.min(plan.stage(config, works[0].site, part.layers), axis=1)
        each = cost.unit_operations(config, first, start, works[0].size, runs[0].term, padded=True)
        total += sizes.runs * sizes.rows * float(np.sum(each))
    return total


def together(group: Sequence[Patched], sizes: Batching) -> Iterator[Sequence[Patched]]:
    """The runs of a group, as many at a time as go through the model together."""
    for start in range(0, len(group), sizes.runs):
        yield group[start : start + sizes.runs]


def _longest_run(pair: Pair, terms: Sequence[Joined]) -> int:
    """Tokens of the longest of a pair's runs, with its responses."""
    prompt = max(len(pair.prompt_ids), len(pair.counterfactual_ids))
    return prompt + max(len(term.response) for term in terms)


def _works(of_groups: Iterable[Iterable[Patched]]) -> list[Work]:
    return [work for group in of_groups for run in group for work in run.works]


def _parts(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
