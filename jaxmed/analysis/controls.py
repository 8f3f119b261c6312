"""Controls: what a localisation is held against.

`activation_difference` ranks units without asking what they cause. `rotated_strengths` asks what an
edit of the same size does in a random direction: an effect that is no larger says nothing about the
unit.

Shapes: L layers, U units of a layer (of layers there is no such axis), D draws.
"""

import functools

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from jaxmed.analysis import ranking
from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, scan
from jaxmed.question import positions, sites
from jaxmed.question.question import Question, shapes
from models.decoder import Decoder
from models.sites import Site

# An effect below this share of the total effect is no discovery, however sure.
MINIMUM_SHARE = 0.01
DRAWS = 19  # an effect above all of them is above the 95% quantile of its control


def activation_difference(
    decoder: Decoder, pair: Pair, question: Question, granularity: str
) -> Float[np.ndarray, "L *U"]:
    """How much each unit differs between base and source run: a correlation, not an effect.

    |a' - a|, summed over the edited positions of every response's run; the Euclidean norm where a
    unit has several numbers.

    Args:
        decoder: the model.
        pair: the pair.
        question: the edited positions and the alignment; its group size must be 1.
        granularity: layer, module, head or neuron.
    """
    of_responses = []
    for response in {term.response for term in question.metric.terms(pair)}:
        edited = positions.edited(pair, question.positions, question.align, len(response))
        with jax.default_matmul_precision("float32"):
            base, source = (
                capture.capture(decoder, prompt + response)
                for prompt in (pair.prompt_ids, pair.counterfactual_ids)
            )
        size = len(base.positions)
        changes = {
            site: capture.edited_difference(base, source, site, edited, 0, size)
            for site in sites.SITES[granularity]
        }
        of_responses.append(
            np.concatenate(
                [_sizes(np.asarray(change), site) for site, change in changes.items()], axis=1
            )
        )
    return functools.reduce(np.add, of_responses).reshape(
        shapes(decoder.config, pair, question, [granularity])[granularity]
    )


def _sizes(change: Float[np.ndarray, "L T ..."], site: Site) -> Float[np.ndarray, "L U"]:
    """Size of each unit's change, summed over positions."""
    if site != Site.NEURON:
        change = np.linalg.norm(change, axis=-1)
    return np.abs(change).sum(axis=1).reshape(len(change), -1)


def rotated_strengths(
    decoder: Decoder,
    pairs: list[Pair],
    question: Question,
    granularity: str,
    chosen: Bool[np.ndarray, "L *U"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    memory: int | None = None,
) -> Float[np.ndarray, "D L *U"]:
    """The strength of each unit's matched random control.

    What the unit's edit adds to the residual stream is turned by a random rotation, the same at all
    positions and for all pairs: as large, at the same place, and as alike from position to position
    and from pair to pair, but in a random direction.

    Args:
        decoder: the model.
        pairs: the pairs whose mean is taken.
        question: the metric and the positions.
        granularity: of the units.
        chosen: the units that a control is wanted of; the others' are NaN.
        draws: rotations.
        seed: of the rotations.
        memory: bytes for the runs and the differences; most of what is free by default.

    Returns:
        max(|mean NIE|, |mean TIE|) of each draw, in the metric's unit.
    """
    found = np.full((draws, *chosen.shape), np.nan)
    if not chosen.any():
        return found
    width = decoder.config.hidden_size
    rotations = stats.special_ortho_group.rvs(width, size=draws, random_state=seed)
    for strengths, rotation in zip(found, rotations.reshape(draws, width, width), strict=True):
        turned = scan.scan_pairs(
            *(decoder, pairs, question, [granularity]),
            chosen=[{granularity: chosen}] * len(pairs),
            rotation=jax.numpy.asarray(rotation, decoder.compute_dtype),
            memory=memory,
        )
        strengths[:] = ranking.strength(
            nie=np.stack([of.nie[granularity] for of in turned]),
            tie=np.stack([of.tie[granularity] for of in turned]),
        )
    return found


def discoveries(
    decoder: Decoder,
    pairs: list[Pair],
    question: Question,
    granularity: str,
    strength: Float[np.ndarray, "L *U"],
    total_effect: float,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    memory: int | None = None,
) -> Bool[np.ndarray, "L *U"]:
    """Units whose effect is above a minimum and above that of their matched random control.

    "The mean effect is not 0" is true of nearly every unit of a real network, and finds nothing.
    The chance of 1 / (draws + 1) is that of each unit above the minimum: of many that are no better
    than random, so many are found. All units have the same rotations, so their finds go together.

    Args:
        decoder, pairs, question, granularity: what was asked.
        strength: the larger of |mean NIE| and |mean TIE| over the pairs.
        total_effect: what `MINIMUM_SHARE` is a share of, in the metric's unit.
        draws: random controls of each unit; the effect must be above all of them.
        seed: of the controls.
        memory: bytes for the runs and the differences; most of what is free by default.
    """
    candidates = above_minimum(strength, total_effect)
    controls = rotated_strengths(
        decoder,
        pairs,
        question,
        granularity,
        candidates,
        draws=draws,
        seed=seed,
        memory=memory,
    )
    return candidates & (strength > np.where(candidates, controls.max(axis=0), np.inf))


def above_minimum(
    strength: Float[np.ndarray, "L *U"], total_effect: float
) -> Bool[np.ndarray, "L *U"]:
    """Units whose effect is large enough to be a discovery, whatever their control says."""
    return np.nan_to_num(strength) > MINIMUM_SHARE * abs(total_effect)
