"""`jaxmed.scan`: effects of pairs in memory, for one who works in Python.

It is a run like those of the programs, and so stands among them, but keeps what it finds.
"""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxmed.analysis.findings import Findings
from jaxmed.data.pairs import Pair
from jaxmed.engine import cost, memory
from jaxmed.engine import scan as engine
from jaxmed.engine.blocks import Block
from jaxmed.question import directions as given_directions
from jaxmed.question import effects as effect_arrays
from jaxmed.question import question as questions
from jaxmed.question.directions import Directions
from jaxmed.question.effects import Effects, PairEffects, Sizes, Status, Totals
from jaxmed.question.metrics import LogitDifference, Metric
from jaxmed.question.positions import Align, Positions
from jaxmed.question.question import Question
from jaxmed.question.sites import GRANULARITIES
from jaxmed.runs import sweep
from jaxmed.runs.settings import check_choice
from jaxmed.store import circumstances
from models import placement
from models.decoder import Decoder
from models.errors import InputError


def scan(
    decoder: Decoder,
    pairs: Sequence[Pair],
    granularity: str | Iterable[str] = "neuron",
    metric: Metric | None = None,
    *,
    positions: str = "last",
    align: str = "end",
    group_size: int = 1,
    directions: str | os.PathLike | Directions | None = None,
    chosen: Mapping[str, np.ndarray | Iterable] | None = None,
    memory_gb: float | None = None,
    progress: bool = True,
) -> Findings:
    """NIE and TIE of every unit of every pair, in memory.

    Args:
        decoder: the model; `decoder.at_precision("split3")` is one whose differences are multiplied
            in another precision.
        pairs: the pairs, with ids that differ.
        granularity: layer, module, head, token, neuron or direction, or several of them.
        metric: the metric; `LogitDifference()` by default.
        positions: which positions are edited: last, differing, prompt or response. The token
            granularity edits each aligned prompt position alone, whatever is asked here.
        align: how base and source prompt are laid against each other: end, start or span.
        group_size: adjacent neurons that are edited together.
        directions: npz file of those of the direction granularity; see `question.directions.read`.
        chosen: by granularity, the units that are computed; all of a granularity that it does not
            name. Either a mask of one pair's effects, bool [layer, ...], or a list of units as the
            coordinates of the effects name them: layer, (layer, "mlp"), (layer, head), (layer,
            "mlp", position), (layer, neuron) or (layer, "residual", number). The effects of the
            others are NaN, and `Status.LEFT_OUT`.
        memory_gb: memory that the process may take on its device, in GiB; most of it by default.
        progress: show a progress bar.

    Returns:
        The effects by granularity: `found["neuron"].nie` is [pair, layer, neuron].

    Raises:
        InputError: an argument is not as above, or a pair does not fit the model or the question;
            the message names its line.
    """
    granularities = _granularities(granularity)
    pairs = list(pairs)
    check_choice("positions", positions, Positions)
    check_choice("align", align, Align)
    if isinstance(metric, str):
        raise InputError(f"metric={metric!r}: give a metric, as jaxmed.LogitDifference() is one")
    if group_size < 1:
        raise InputError(f"group_size={group_size}: must be at least 1")
    if ("direction" in granularities) != (directions is not None):
        raise InputError("granularity='direction' and directions=FILE.npz go together")
    if not (directions is None or isinstance(directions, Directions)):
        directions = given_directions.read(os.fspath(directions), decoder.config)
    question = Question(
        metric=metric or LogitDifference(),
        positions=Positions(positions),
        align=Align(align),
        group_size=group_size,
        directions=directions,
    )
    for pair in pairs:
        questions.check(decoder.config, pair, question, granularities)
    ids = tuple(str(pair.id) for pair in pairs)
    if not ids or len(set(ids)) < len(ids):
        raise InputError("pairs: at least one is needed, and ids that differ from each other")
    sizes = questions.sizes(decoder.config, pairs, question, granularities)
    masks = _masks(chosen or {}, granularities, sizes, group_size)
    found = _scan_pairs(decoder, pairs, question, granularities, masks, memory_gb, progress)
    run = _description(decoder, pairs, question, granularities)
    totals = Totals(
        pair_ids=ids,
        bases=tuple(pair.base for pair in pairs),
        te=np.array([one.y_source - one.y_base for one in found], np.float32),
        y_base=np.array([one.y_base for one in found], np.float32),
        y_source=np.array([one.y_source for one in found], np.float32),
    )
    effects = {
        name: _effects(name, found, totals, question, sizes, masks.get(name), run)
        for name in granularities
    }
    return Findings(run, sizes, effects)


def _granularities(given: str | Iterable[str]) -> list[str]:
    """Those that are asked for, coarse to fine."""
    asked = [given] if isinstance(given, str) else list(given)
    for name in asked:
        if name not in GRANULARITIES:
            raise InputError(f"granularity '{name}' is not one of {', '.join(GRANULARITIES)}")
    if not asked:
        raise InputError(f"granularity names none of {', '.join(GRANULARITIES)}")
    return [name for name in GRANULARITIES if name in asked]


def _masks(
    chosen: Mapping[str, np.ndarray | Iterable],
    granularities: Sequence[str],
    sizes: Sizes,
    group_size: int,
) -> dict[str, np.ndarray]:
    """By granularity, which units are computed, bool [layer, ...]."""
    masks = {}
    for name, given in chosen.items():
        if name not in granularities:
            raise InputError(f"chosen['{name}']: the granularities are {', '.join(granularities)}")
        if isinstance(given, np.ndarray) and given.dtype == bool:
            if given.shape != sizes.shape(name):
                raise InputError(
                    f"chosen['{name}'] is a mask of shape {given.shape}, the effects of a pair "
                    f"have {sizes.shape(name)}"
                )
            masks[name] = given
            continue
        masks[name] = np.zeros(sizes.shape(name), bool)
        along = sizes.coordinates(name, group_size)
        for unit in given:
            masks[name][_place(name, unit, along, group_size)] = True
    return masks


def _place(
    granularity: str, unit, along: Mapping[str, np.ndarray], group_size: int
) -> tuple[int, ...]:
    """Where a unit of a list is in one pair's effects."""
    names = list(unit) if isinstance(unit, (tuple, list, np.ndarray)) else [unit]
    if granularity == "neuron" and len(names) == 2:
        names[1] -= names[1] % group_size
    if len(names) == len(along):
        indices = [
            np.flatnonzero(places == name)
            for name, places in zip(names, along.values(), strict=True)
        ]
        if all(len(index) == 1 for index in indices):
            return tuple(int(index[0]) for index in indices)
    raise InputError(
        f"chosen['{granularity}'] has {unit}, which is no ({', '.join(along)}) of the model and "
        "these pairs"
    )


def _scan_pairs(
    decoder: Decoder,
    pairs: Sequence[Pair],
    question: Question,
    granularities: Sequence[str],
    masks: Mapping[str, np.ndarray],
    memory_gb: float | None,
    progress: bool,
) -> list[PairEffects]:
    """The effects of each pair, with a bar of the operations that they take."""
    chosen = [_masks_of(decoder, pair, question, masks) for pair in pairs]
    scan = engine.Scan(decoder, pairs, question, chosen=chosen)
    blocks = scan.blocks(granularities, memory.free(memory_gb))
    costs = {
        block: sum(
            cost.operations(decoder.config, pairs[i], question, [block.granularity], chosen[i])
            for i in block.pairs
        )
        for block in blocks
    }
    found: list[list[PairEffects]] = [[] for _ in pairs]

    def commit(block: Block, effects: list[PairEffects]) -> None:
        for index, of_pair in zip(block.pairs, effects, strict=True):
            found[index].append(of_pair)

    sweep.run(
        blocks, scan.effects, commit, name="block", unit="block", costs=costs, progress=progress
    )
    return list(map(engine.joined, found))


def _masks_of(
    decoder: Decoder, pair: Pair, question: Question, masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The masks of one pair, which may have fewer positions than others."""
    shapes = questions.shapes(decoder.config, pair, question, masks)
    return {name: mask[..., : shapes[name][-1]] for name, mask in masks.items()}


def _effects(
    granularity: str,
    found: Sequence[PairEffects],
    totals: Totals,
    question: Question,
    sizes: Sizes,
    mask: np.ndarray | None,
    run: dict,
) -> Effects:
    """One granularity of all pairs."""
    shape = sizes.shape(granularity)
    sides, done = {"nie": [], "tie": []}, []
    for pair in found:
        own = pair.nie[granularity].shape
        wanted = np.full(own, Status.EXACT)
        if mask is not None:
            wanted[~mask[..., : own[-1]]] = Status.LEFT_OUT
        if question.directions and granularity == "direction":
            wanted[~question.directions.given] = Status.NOT_RUN
        beyond = [(0, full - size) for full, size in zip(shape, own, strict=True)]
        wanted = np.pad(wanted, beyond, constant_values=Status.NOT_RUN)
        nie, tie = (
            effect_arrays.fitted(side[granularity], shape).astype(np.float32)
            for side in (pair.nie, pair.tie)
        )
        sides["nie"].append(nie)
        sides["tie"].append(tie)
        done.append(effect_arrays.statuses(granularity, nie, tie, wanted))
    vouched = np.stack(done) == Status.EXACT
    units = sizes.coordinates(granularity, question.group_size)
    return Effects(
        granularity=granularity,
        nie=np.where(vouched, np.stack(sides["nie"]), np.float32("nan")),
        tie=np.where(vouched, np.stack(sides["tie"]), np.float32("nan")),
        done=np.stack(done),
        totals=totals,
        coordinates={"pair": np.array(totals.pair_ids, object)} | units,
        attributes=effect_arrays.attributes(run, granularity),
    )


def _description(
    decoder: Decoder,
    pairs: Sequence[Pair],
    question: Question,
    granularities: Sequence[str],
) -> dict:
    """What `run.json` is to say, if this is saved."""
    directions = question.directions
    return circumstances.circumstances() | {
        "model": f"a {decoder.config.family} decoder in memory",
        "granularity": list(granularities),
        "metric": question.metric.name,
        "metric_unit": question.metric.metric_unit,
        "meaning": question.metric.meaning,
        "positions": str(question.positions),
        "align": str(question.align),
        "group_size": question.group_size,
        "directions": "in memory" if directions else "",
        "directions_hash": directions and directions.hash,
        "matmul_precision": decoder.products.precision,
        "mesh": placement.named(decoder.mesh),
        # The name under which the results' arrays record it.
        "precision": decoder.products.precision,
        "pair_bases": [pair.base for pair in pairs],
    }
