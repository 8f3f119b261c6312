"""The plain definition of every effect: the whole model, run again for every edit.

`define_pair` is the reference that the engine is tested against; `joint_pair` gives the effects of
sets of neurons, which no batch of single patches can give.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmed.data.pairs import Pair
from jaxmed.engine import plan
from jaxmed.engine.scan import Run, pair_effects
from jaxmed.question import question as question_lib
from jaxmed.question.effects import PairEffects
from jaxmed.question.metrics import KnownLogits, Term
from jaxmed.question.positions import Edited
from jaxmed.question.question import Question
from models.decoder import Decoder, Trace
from models.edits import Edit
from models.sites import Site

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
        for work in plan.plan(decoder.config, pair, term, question, granularities, swapped):
            before = {site: np.asarray(getattr(base.trace, site.value)) for site in _LAYER_SITES}
            values = {
                site: aligned(source.trace, site, work.edited, length) for site in _LAYER_SITES
            }
            changes = []
            for units in work.units.chunks(1, _DEFINED_AT_ONCE, decoder.config.num_layers):
                units = units.subset(0)
                positions = np.zeros((len(units), length), bool)
                positions[:, work.edited.base] = True
                alone = units.positions != plan.ALL_POSITIONS
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

    result_shapes = question_lib.shapes(decoder.config, pair, question, granularities)
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


def _run_value(decoder, tokens, edits, reading, last_prompt, metric) -> Float[Array, ""]:
    """Y of a run with explicit edits, from its logits."""
    logits, _ = decoder(tokens, edits=edits)
    return metric.value(KnownLogits(logits[last_prompt + reading.offsets]), reading)


def aligned(trace: Trace, site: Site, edited: Edited, length: int) -> np.ndarray:
    """The source run's values of a site, moved to the base run's positions, [L, T, ...]."""
    source_rows = np.zeros(length, np.int32)
    source_rows[edited.base] = edited.source
    return np.asarray(getattr(trace, site.value))[:, source_rows]


def _trace(decoder: Decoder, tokens: tuple[int, ...]) -> Trace:
    return _plain_run(decoder, np.array(tokens))


_plain_run = jax.jit(lambda decoder, tokens: decoder(tokens)[1])
