"""What must be computed for a pair: units, positions, spans.

Everything here is known before a model is run.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture
from jaxmed.question import positions as positions_lib
from jaxmed.question import question as question_lib
from jaxmed.question.directions import Directions
from jaxmed.question.joined import Joined
from jaxmed.question.positions import Edited, Positions
from jaxmed.question.question import Question
from jaxmed.question.sites import SITES
from models.config import DecoderConfig
from models.shapes import AnyArray
from models.sites import Site

# The position of a unit that is edited at every edited position, and of one that is at none.
ALL_POSITIONS = -1
NO_POSITION = -2

# Lengths that spans are padded to, in each octave, and the multiply-adds of a run's list from which
# on so many are worth what compiling for each of them takes.
_LENGTHS = {1: 0, 2: 2e10, 8: 1e12}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Units:
    """Units of one site, flattened; each is patched alone.

    Attributes:
        layers: the layer of each, in increasing order, [U].
        units: index of the head, of the neuron group or of the direction, [U]; 0 for other sites.
        positions: index in the span of the one position that is edited, [U]; -1 for all of them.
            Of several runs at once, [R, U]; -2 in a run that has no such unit.
    """

    layers: AnyArray
    units: AnyArray
    positions: AnyArray

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
        padded = [_padded(getattr(self, name), extra, value) for name, value in fill.items()]
        for start in range(0, len(self), size):
            yield Units(
                *(
                    f[..., start : start + size].reshape(*f.shape[:-1], batches, rows)
                    for f in padded
                )
            )


def _padded(values: np.ndarray, extra: int, value: int) -> np.ndarray:
    """So many more of a value, along the last axis."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, extra)], constant_values=value)


@dataclasses.dataclass(frozen=True)
class Work:
    """Units of one site that share a span: what one loop over batches computes.

    Attributes:
        granularity: what the units are counted under.
        site: the site.
        units: the units; their positions are relative to the span's start.
        edited: the edited positions.
        start, size: the span's first position, and its padded length.
        end: the position after the last that is read.
        needed: of each unit, the positions from its first edited one to the last that is read, [U].
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
    end: int
    needed: np.ndarray
    place: tuple[AnyArray, ...]
    vectors: np.ndarray | None = None

    def only(self, chosen: np.ndarray) -> "Work":
        """The units that a mask of the granularity's effects chooses."""
        return self._subset(chosen[self.place])

    def of(self, first: int, stop: int) -> "Work":
        """The units of some layers, from the first to the one before `stop`."""
        layers = np.asarray(self.units.layers)
        return self._subset((first <= layers) & (layers < stop))

    def _subset(self, here: np.ndarray) -> "Work":
        """Those that a mask of the units chooses."""
        return dataclasses.replace(
            self,
            units=self.units.subset(here),
            needed=self.needed[here],
            place=tuple(index[here] for index in self.place),
        )


def plan(
    config: DecoderConfig,
    pair: Pair,
    term: Joined,
    question: Question,
    granularities: Iterable[str],
    swapped: bool,
    chosen: Mapping[str, np.ndarray] | None = None,
) -> list[Work]:
    """What is to be computed for one run of a metric and one estimand.

    Units whose every edited position comes after the last one that is read are left out: their
    effect is exactly 0. With `swapped` the patches are made in the source run. Of a granularity
    that `chosen` names, only the units of its mask are planned.
    """
    prompt_length = len(pair.counterfactual_ids if swapped else pair.prompt_ids)
    first_read, last_read = (
        prompt_length - 1 + int(extreme(term.reading.offsets)) for extreme in (np.min, np.max)
    )
    work, chosen = [], chosen or {}
    for granularity in granularities:
        which = Positions.PROMPT if granularity == "token" else question.positions
        edited = positions_lib.edited(pair, which, question.align, len(term.response))
        columns = len(pair.prompt_ids) - 1 - edited.base
        edited = edited.swapped() if swapped else edited
        read = edited.base <= last_read
        edited, columns = Edited(edited.base[read], edited.source[read]), columns[read]
        if not len(edited.base):
            continue
        if granularity == "token":
            work += _token_work(config, edited, columns, (first_read, last_read))
            continue
        shape = question_lib.shapes(config, pair, question, [granularity])[granularity]
        count = int(np.sum(chosen.get(granularity, np.ones(shape))))
        first = min(int(edited.base[0]), first_read)
        end = last_read + 1
        start, size = _span(first, last_read, _lengths(config, count, end - first))
        if granularity == "direction":
            work += _direction_work(question.directions, edited, (start, size, end), end - first)
            continue
        for index, site in enumerate(SITES[granularity]):
            units = Units.grid(config.num_layers, question_lib.unit_count(config, question, site))
            place = {"module": (units.layers, np.full(len(units), index)), "layer": (units.layers,)}
            place = place.get(granularity, (units.layers, units.units))
            needed = np.full(len(units), end - first)
            work.append(Work(granularity, site, units, edited, start, size, end, needed, place))
    work = [w.only(chosen[w.granularity]) if w.granularity in chosen else w for w in work]
    return [w for w in work if len(w.units)]


def _direction_work(
    directions: Directions | None, edited: Edited, span: tuple[int, int, int], needed: int
) -> Iterator[Work]:
    """The given directions, site by site."""
    if directions is None:
        raise ValueError("the direction granularity needs directions")
    for index, (site, of_site) in enumerate(zip(directions.sites, directions.of_site, strict=True)):
        count = len(of_site.layers)
        which = np.arange(count, dtype=np.int32)
        units = Units(of_site.layers, which, np.full(count, ALL_POSITIONS, np.int32))
        place = (of_site.layers, np.full(count, index), of_site.numbers)
        lengths = np.full(count, needed)
        yield Work("direction", site, units, edited, *span, lengths, place, of_site.vectors)


def _token_work(config, edited: Edited, columns: np.ndarray, read: tuple[int, int]) -> list[Work]:
    """Each position alone, in groups of positions whose spans have the same padded length."""
    firsts = np.minimum(edited.base, read[0])
    count = config.num_layers * len(SITES["token"])  # units of each position
    spans = [
        _span(first, read[1], _lengths(config, count, read[1] + 1 - first), smallest=16)
        for first in firsts.tolist()
    ]
    work = []
    for start, size in sorted(set(spans)):
        here = np.array([span == (start, size) for span in spans])
        group = Edited(edited.base[here], edited.source[here])
        units = Units.grid(config.num_layers, positions=group.base - start)
        place = np.tile(columns[here], config.num_layers)
        needed = np.tile(read[1] + 1 - firsts[here], config.num_layers)
        for index, site in enumerate(SITES["token"]):
            site_place = (units.layers, np.full(len(units), index), place)
            span = (start, size, read[1] + 1)
            work.append(Work("token", site, units, group, *span, needed, site_place))
    return work


def _lengths(config: DecoderConfig, units: int, positions: int) -> int:
    """How many lengths in each octave the spans of a list of units are padded to."""
    needed = units * positions * config.num_layers / 2 * sum(config.block_weights)
    return max(lengths for lengths, least in _LENGTHS.items() if needed >= least)


def _span(first: int, last: int, lengths: int, smallest: int = 1) -> tuple[int, int]:
    """Start and padded length of the span that holds all edited and read positions, with so many
    lengths in each octave: with eight 1, 2, ..., 16, 18, ..., 32, 36, ...; with two 1, 2, 3, 4, 6,
    8, 12, 16, ...; with one the powers of two."""
    length = max(smallest, last - first + 1)
    step = max(1, capture.bucket(length) // 2 // lengths)
    size = -(-length // step) * step
    return max(0, last + 1 - size), size


def reader(config: DecoderConfig, layer: AnyArray) -> np.ndarray:
    """The stage at which a layer's MLP reads the residual stream; past the last one for a layer
    that does not exist."""
    layer = np.asarray(layer)
    reads = 2 * layer + (0 if config.parallel else 1)
    return np.where(layer < config.num_layers, reads, 2 * config.num_layers + 1)


def stage(config: DecoderConfig, site: Site, layer: AnyArray) -> np.ndarray:
    """Where in the network a site's write joins the residual stream.

    Stage 2 l is the input of block l, stage 2 l + 1 lies between its attention and its MLP (there
    is none where the two are parallel), stage 2 L is the output of the last block.
    """
    layer = np.asarray(layer)
    if site == Site.EMBEDDING:
        return 2 * layer
    before_mlp = site in (Site.ATTENTION, Site.HEAD) and not config.parallel
    return 2 * layer + (1 if before_mlp else 2)
