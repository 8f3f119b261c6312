"""The plain definition of every effect: the whole model, run again for every edit.

`define_pair` is the reference that the engine is tested against; `joint_pair` gives the effects of
sets of neurons, which no batch of single patches can give.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmed import alignment, capture, planning
from jaxmed import memory as memory_lib
from jaxmed.alignment import Edited
from jaxmed.data import Pair
from jaxmed.effects import PairEffects, Run, pair_effects, read
from jaxmed.metrics import KnownLogits, Term
from jaxmed.planning import Question
from models.decoder import Decoder, Trace
from models.edits import Edit, Site

_LAYER_SITES = tuple(site for site in Site if site != Site.EMBEDDING)
_DEFINED_AT_ONCE = 64  # units that the plain definition runs as a batch


def define_pair(
    decoder: Decoder, pair: Pair, question: Question, granularities: Iterable[str]
) -> PairEffects:
    """NIE and TIE by their plain definition, the reference for `effects.scan_pair`.

    The whole model is run again for every unit, with an explicit edit: no padding, no cache, and
    no difference but the last, Y(edited) - Y(plain). Slow.
    """
    granularities = list(granularities)

    def evaluate(base: Run, source: Run, term: Term, swapped: bool):
        length = len(base.tokens)
        for work in planning.plan(decoder.config, pair, term, question, granularities, swapped):
            before = {site: np.asarray(getattr(base.trace, site.value)) for site in _LAYER_SITES}
            values = {
                site: _aligned(source.trace, site, work.edited, length) for site in _LAYER_SITES
            }
            changes = []
            for units in work.units.chunks(1, _DEFINED_AT_ONCE, decoder.config.num_layers):
                units = units.subset(0)
                positions = np.zeros((len(units), length), bool)
                positions[:, work.edited.base] = True
                alone = units.positions != planning.ALL_POSITIONS
                position = work.start + units.positions[alone, None]
                positions[alone] = np.arange(length) == position
                where = (units.layers, units.units, positions)
                reading = (term.reading, base.prompt_length - 1)
                tokens = np.array(base.tokens)
                if work.vectors is None:
                    site = _LAYER_SITES.index(work.site)
                    changes.append(
                        _defined_changes(
                            *(decoder, tokens, values, site, where, question.group_size),
                            *reading,
                            metric=question.metric,
                        )
                    )
                else:
                    change = values[work.site] - before[work.site]
                    changes.append(
                        _defined_direction_changes(
                            *(decoder, tokens, change, work.vectors, where, *reading),
                            metric=question.metric,
                            site=work.site,
                        )
                    )
            yield work.granularity, work.place, np.concatenate(changes)[: len(work.units)]

    result_shapes = planning.shapes(decoder.config, pair, question, granularities)
    return pair_effects(decoder, pair, question, result_shapes, _trace, evaluate)


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
        return _run_value(decoder, tokens, edits, reading, last_prompt, metric)

    plain = _run_value(decoder, tokens, [], reading, last_prompt, metric)
    return jax.vmap(edited_value)(units) - plain


@functools.partial(jax.jit, static_argnames=("metric", "site"))
def _defined_direction_changes(
    decoder, tokens, change, vectors, units, reading, last_prompt, metric, site
) -> Float[Array, "U"]:
    """Y(edited) - Y(plain) for directions of a site: steered by their share of the change."""

    def edited_value(unit):
        layer, number, positions = unit
        vector = vectors[number].reshape(change.shape[2:]).astype(change.dtype)
        axes = tuple(range(1, change.ndim - 1))
        along = jnp.sum(change[layer] * vector, axis=axes, keepdims=True)
        edit = Edit.steer(site, layer, positions, along * vector)
        return _run_value(decoder, tokens, [edit], reading, last_prompt, metric)

    plain = _run_value(decoder, tokens, [], reading, last_prompt, metric)
    return jax.vmap(edited_value)(units) - plain


def joint_pair(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    sets: Bool[Array, "N L I"],
    memory: int | None = None,
) -> PairEffects:
    """NIE and TIE of sets of neurons, each set patched as one intervention.

    The whole model is run for every set, with a list of edits: one for each layer.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric and the positions.
        sets: which neurons are in each set.
        memory: bytes for the runs that are made at once; `memory.free()` by default.

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
            at_once=planning.runs_at_once(decoder.config, term, len(tokens), memory),
        )
        yield "joint", ..., np.asarray(found)

    memory = memory_lib.free() if memory is None else memory
    joint_shape = {"joint": (len(sets),)}
    return pair_effects(decoder, pair, question, joint_shape, capture.capture, evaluate)


@functools.partial(jax.jit, static_argnames=("metric", "at_once"))
def _joint_changes(
    decoder, tokens, valid, values, positions, sets, reading, last_prompt, metric, at_once
) -> Float[Array, "N"]:
    """Y(edited) - Y(plain) for sets of neurons."""

    def run(members):
        edits = [
            Edit.patch(Site.NEURON, layer, positions, values[layer], members[layer])
            for layer in range(decoder.config.num_layers)
        ]
        # Only the rows that are read: logits of all positions of all sets would be large.
        residual = decoder(tokens, edits=edits, valid=valid)[1].residual[-1]
        return read(decoder, metric, residual, reading, last_prompt)

    return jax.lax.map(run, sets, batch_size=at_once) - run(jnp.zeros_like(sets[0]))


def _run_value(decoder, tokens, edits, reading, last_prompt, metric) -> Float[Array, ""]:
    """Y of a run with explicit edits, from its logits."""
    logits, _ = decoder(tokens, edits=edits)
    return metric.value(KnownLogits(logits[last_prompt + reading.offsets]), reading)


def _aligned(trace: Trace, site: Site, edited: Edited, length: int) -> np.ndarray:
    """The source run's values of a site, moved to the base run's positions, [L, T, ...]."""
    source_rows = np.zeros(length, np.int32)
    source_rows[edited.base] = edited.source
    return np.asarray(getattr(trace, site.value))[:, source_rows]


def _trace(decoder: Decoder, tokens: tuple[int, ...]) -> Trace:
    return _plain_run(decoder, np.array(tokens))


_plain_run = jax.jit(lambda decoder, tokens: decoder(tokens)[1])
