"""The plain definition of every effect: the whole model, run again for every edit.

With Y(x) the metric of a plain run, and Y(x, Z<-Z(x')) that of a run of x in which the unit Z has
the value that it has in the run of x',

    NIE = Y(x,  Z<-Z(x')) - Y(x)            a patch into the base run
    TIE = Y(x') - Y(x', Z<-Z(x))            a patch into the source run

A metric is a sum of signed terms, each with runs of its own. Nothing is cut, padded or kept here,
and no difference is taken but these. What the engine must find out as well is found out again, in
the plainest way: which positions correspond, which are edited, which units there are and where
their effects belong. So a fault of the engine's shows when the two are compared.

Shapes are named in `models.shapes`; B are the units of a batch.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError
from jaxmed.question.directions import Directions
from jaxmed.question.effects import PairEffects
from jaxmed.question.metrics import KnownLogits, Metric, Reading, Term
from jaxmed.question.positions import Align, Positions
from jaxmed.question.question import Question
from jaxmed.question.sites import SITES
from models.config import DecoderConfig
from models.decoder import Decoder, Trace
from models.edits import Edit
from models.shapes import AnyArray, Stacked
from models.sites import Site

_SITES = tuple(site for site in Site if site != Site.EMBEDDING)
_AT_ONCE = 64  # units whose runs are made as a batch


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A unit that is patched alone.

    Attributes:
        granularity: what it is counted under.
        place: index of its effect there.
        site, layer: where it is.
        number: which head or group of neurons of the layer, or which direction of the site; 0 for
            other sites.
        positions: the positions of the base run that are edited; TIE edits their partners.
    """

    granularity: str
    place: tuple[int, ...]
    site: Site
    layer: int
    number: int
    positions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A plain run of a prompt and a response.

    Attributes:
        tokens: of both.
        last_prompt: position of the prompt's last token, from which a metric counts.
        y: what the metric reads.
        trace: every site's value.
    """

    tokens: np.ndarray
    last_prompt: int
    y: float
    trace: Trace


def define_pair(
    decoder: Decoder, pair: Pair, question: Question, granularities: Iterable[str]
) -> PairEffects:
    """NIE and TIE of every unit of one pair, by their definition. Slow.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric, the positions, the size of groups, the directions.
        granularities: which to compute.

    Raises:
        DataError: the asked positions do not pair up.
    """
    granularities = list(granularities)
    y_base = y_source = 0.0
    # By granularity and place. What no unit has is not there.
    nie, tie = ({name: collections.defaultdict(float) for name in granularities} for _ in range(2))
    for term in question.metric.terms(pair):
        base = _plain_run(decoder, pair.prompt_ids, term, question.metric)
        source = _plain_run(decoder, pair.counterfactual_ids, term, question.metric)
        y_base += term.sign * base.y
        y_source += term.sign * source.y

        partners = _partners(pair, question.align, len(term.response))
        back = {there: here for here, there in partners.items()}
        units = [
            unit
            for name in granularities
            for unit in _units(decoder.config, pair, question, name, partners)
        ]
        for unit, change in _changes(decoder, question, term, base, source, partners, units):
            nie[unit.granularity][unit.place] += term.sign * change
        units = [
            dataclasses.replace(unit, positions=tuple(partners[at] for at in unit.positions))
            for unit in units
        ]
        for unit, change in _changes(decoder, question, term, source, base, back, units):
            tie[unit.granularity][unit.place] -= term.sign * change
    return PairEffects(
        y_base,
        y_source,
        {name: _array(name, effects, question.directions) for name, effects in nie.items()},
        {name: _array(name, effects, question.directions) for name, effects in tie.items()},
    )


def _array(name: str, effects: Mapping[tuple, float], given: Directions | None) -> np.ndarray:
    """A granularity's effects by their places; NaN where there is no unit."""
    shape = np.max(list(effects), axis=0) + 1
    if name == "direction" and given is not None:
        shape = given.given.shape
    array = np.full(shape, np.nan)
    for place, effect in effects.items():
        array[place] = effect
    return array


# --- Positions and units -----------------------------------------------------------------------


def _partners(pair: Pair, align: Align, response_length: int) -> dict[int, int]:
    """For every position of the base run that has one, the position of the source run that
    corresponds to it; those of a response follow its prompt in either run."""
    base, source = len(pair.prompt_ids), len(pair.counterfactual_ids)
    here, there = range(base), range(source)
    common = min(base, source)
    if align == Align.END:
        here, there = here[base - common :], there[source - common :]
    elif align == Align.START:
        here, there = here[:common], there[:common]
    elif pair.prompt_span is None or pair.counterfactual_span is None:
        raise DataError(f"{pair.where}: pair '{pair.id}' gives no spans that correspond")
    else:
        here, there = (
            here[slice(*pair.prompt_span)],
            there[slice(*pair.counterfactual_span)],
        )
    partners = dict(zip(here, there, strict=True))
    return partners | {base + step: source + step for step in range(response_length)}


def _edited(pair: Pair, asked: Positions, partners: Mapping[int, int]) -> tuple[int, ...]:
    """The positions of the base run that are edited."""
    base, source = pair.prompt_ids, pair.counterfactual_ids
    prompt = tuple(at for at in partners if at < len(base))
    if asked == Positions.RESPONSE:
        return tuple(at for at in partners if at >= len(base))
    if asked == Positions.PROMPT:
        return prompt
    if partners.get(len(base) - 1) != len(source) - 1:
        raise DataError(f"{pair.where}: pair '{pair.id}': the prompts' ends do not correspond")
    if asked == Positions.LAST:
        return prompt[-1:]
    differing = [at for at in prompt if base[at] != source[partners[at]]]
    return tuple(at for at in prompt if differing and at >= differing[0])


def _units(
    config: DecoderConfig,
    pair: Pair,
    question: Question,
    granularity: str,
    partners: Mapping[int, int],
) -> Iterator[_Unit]:
    """All units of a granularity."""
    if granularity == "token":
        yield from _positions(config, pair, partners)
        return
    edited = _edited(pair, question.positions, partners)
    if granularity == "direction":
        yield from _directions(question.directions, edited)
        return
    groups = range(0, config.intermediate_size, question.group_size)
    numbers = {"head": config.num_heads, "neuron": len(groups)}.get(granularity, 1)
    for layer in range(config.num_layers):
        for index, site in enumerate(SITES[granularity]):
            for number in range(numbers):
                place = {"layer": (layer,), "module": (layer, index)}
                place = place.get(granularity, (layer, number))
                yield _Unit(granularity, place, site, layer, number, edited)


def _directions(directions: Directions | None, edited: tuple[int, ...]) -> Iterator[_Unit]:
    """Each given direction of each site."""
    if directions is None:
        raise ValueError("the direction granularity needs directions")
    for index, (site, given) in enumerate(zip(directions.sites, directions.of_site, strict=True)):
        for which, (layer, number) in enumerate(zip(given.layers, given.numbers, strict=True)):
            place = int(layer), index, int(number)
            yield _Unit("direction", place, site, int(layer), which, edited)


def _positions(config: DecoderConfig, pair: Pair, partners: Mapping[int, int]) -> Iterator[_Unit]:
    """Each prompt position that has a partner, alone; counted backwards from the prompt's end."""
    for layer in range(config.num_layers):
        for index, site in enumerate(SITES["token"]):
            for at in partners:
                if at < len(pair.prompt_ids):
                    place = layer, index, len(pair.prompt_ids) - 1 - at
                    yield _Unit("token", place, site, layer, 0, (at,))


# --- Runs --------------------------------------------------------------------------------------


def _plain_run(decoder: Decoder, prompt: tuple[int, ...], term: Term, metric: Metric) -> _Run:
    tokens, last_prompt = np.array(prompt + term.response), len(prompt) - 1
    logits, trace = _run(decoder, tokens)
    y = metric.value(KnownLogits(logits[last_prompt + term.reading.offsets]), term.reading)
    return _Run(tokens, last_prompt, float(y), trace)


_run = jax.jit(lambda decoder, tokens: decoder(tokens))


def _changes(
    decoder: Decoder,
    question: Question,
    term: Term,
    run: _Run,
    lender: _Run,
    partners: Mapping[int, int],
    units: list[_Unit],
) -> Iterator[tuple[_Unit, float]]:
    """Y(edited) - Y(plain) of each unit.

    Args:
        decoder, question, term: what is asked.
        run: the run that is patched.
        lender: the run whose values are put in.
        partners: positions of the latter by those of the former.
        units: the units; their positions are of the former.
    """
    rows = np.zeros(len(run.tokens), int)
    rows[list(partners)] = list(partners.values())
    lent = {site: np.asarray(getattr(lender.trace, site))[:, rows] for site in _SITES}
    patches = [unit for unit in units if unit.granularity != "direction"]
    for some in _batches(patches):
        batch = _Batch.of(some, len(run.tokens))
        found = _patched(
            decoder,
            run.tokens,
            term.reading,
            run.last_prompt,
            lent,
            batch,
            question.group_size,
            metric=question.metric,
        )
        yield from zip(some, np.asarray(found).tolist(), strict=False)
    if question.directions is None:
        return
    of_sites = zip(question.directions.sites, question.directions.of_site, strict=True)
    for site, directions in of_sites:
        given = [unit for unit in units if unit.granularity == "direction" and unit.site == site]
        change = lent[site] - np.asarray(getattr(run.trace, site))
        for some in _batches(given):
            batch = _Batch.of(some, len(run.tokens))
            found = _steered(
                decoder,
                run.tokens,
                term.reading,
                run.last_prompt,
                change,
                batch,
                directions.vectors,
                site=site,
                metric=question.metric,
            )
            yield from zip(some, np.asarray(found).tolist(), strict=False)


def _batches(units: list[_Unit]) -> Iterator[list[_Unit]]:
    for start in range(0, len(units), _AT_ONCE):
        yield units[start : start + _AT_ONCE]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
    """Units as arrays.

    Attributes:
        sites: which of `_SITES`.
        layers, numbers: as in `_Unit`.
        positions: which positions of the run are edited.
    """

    sites: Int[AnyArray, "*B"]
    layers: Int[AnyArray, "*B"]
    numbers: Int[AnyArray, "*B"]
    positions: Bool[AnyArray, "*B T"]

    @classmethod
    def of(cls, units: list[_Unit], length: int) -> "_Batch":
        """A full batch of units, the last of which is repeated."""
        units = units + units[-1:] * (_AT_ONCE - len(units))
        return cls(
            np.array([_SITES.index(unit.site) for unit in units]),
            np.array([unit.layer for unit in units]),
            np.array([unit.number for unit in units]),
            np.array([np.isin(np.arange(length), unit.positions) for unit in units]),
        )


@functools.partial(jax.jit, static_argnames=("metric",))
def _patched(
    decoder: Decoder,
    tokens: Int[AnyArray, "T"],
    reading: Reading,
    last_prompt: Int[AnyArray, ""] | int,
    lent: dict[Site, Stacked],
    batch: _Batch,
    group_size: Int[AnyArray, ""] | int,
    metric: Metric,
) -> Float[Array, "B"]:
    """Y(edited) - Y(plain) for units that have the lent values.

    Every run has an edit of every site, whose masks are empty but for the unit's own: one
    compilation serves all sites.
    """
    config = decoder.config

    def y(unit):
        members = {
            Site.HEAD: jnp.arange(config.num_heads) == unit.numbers,
            Site.NEURON: jnp.arange(config.intermediate_size) // group_size == unit.numbers,
        }
        edits = [
            Edit.patch(
                site,
                unit.layers,
                unit.positions & (number == unit.sites),
                lent[site][unit.layers],
                members.get(site),
            )
            for number, site in enumerate(_SITES)
        ]
        return _value(decoder, tokens, edits, reading, last_prompt, metric)

    return jax.vmap(y)(batch) - _value(decoder, tokens, [], reading, last_prompt, metric)


@functools.partial(jax.jit, static_argnames=("site", "metric"))
def _steered(
    decoder: Decoder,
    tokens: Int[AnyArray, "T"],
    reading: Reading,
    last_prompt: Int[AnyArray, ""] | int,
    change: Stacked,
    batch: _Batch,
    vectors: Float[AnyArray, "U size"],
    site: Site,
    metric: Metric,
) -> Float[Array, "B"]:
    """Y(edited) - Y(plain) for directions of a site, along which it takes the lent value."""

    def y(unit):
        vector = vectors[unit.numbers].reshape(change.shape[2:]).astype(change.dtype)
        axes = tuple(range(1, change.ndim - 1))
        along = jnp.sum(change[unit.layers] * vector, axis=axes, keepdims=True)
        edit = Edit.steer(site, unit.layers, unit.positions, along * vector)
        return _value(decoder, tokens, [edit], reading, last_prompt, metric)

    return jax.vmap(y)(batch) - _value(decoder, tokens, [], reading, last_prompt, metric)


def _value(
    decoder: Decoder,
    tokens: Int[AnyArray, "T"],
    edits: list[Edit],
    reading: Reading,
    last_prompt: Int[AnyArray, ""] | int,
    metric: Metric,
) -> Float[Array, ""]:
    """Y of a run with explicit edits, from its logits."""
    logits, _ = decoder(tokens, edits=edits)
    return metric.value(KnownLogits(logits[last_prompt + reading.offsets]), reading)
