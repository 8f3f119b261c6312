"""Circuits: how much of what the neurons do the best of them do alone.

Shapes: L layers, I neurons of a layer, K sizes of circuits.
"""

import math

import numpy as np
from jaxtyping import Float

from jaxmed.analysis import joint
from jaxmed.data.pairs import Pair
from jaxmed.question.question import Question
from models.decoder import Decoder

# Less than this share of TE is too little for a share of it to be formed.
_LEAST_OF_ALL_NEURONS = 0.05

# Sizes of circuits, as fractions of all units, over which faithfulness is integrated (MIB, arXiv
# 2504.13151, section 3).
CIRCUIT_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(
    decoder: Decoder,
    pairs: list[Pair],
    question: Question,
    scores: dict[str, Float[np.ndarray, "L I"]],
    memory: int | None = None,
) -> dict[str, Float[np.ndarray, "2 K"]]:
    """How much of what the neurons do the best of them do alone, f(k) of MIB, by ranking.

    A circuit C is the k neurons of best score; all others are patched from the other run. With
    Y(C) the metric then, f = (Y(C) - Y(no neuron)) / (Y(all neurons) - Y(no neuron)): 1 where C
    does it all. In joint effects, as means over pairs: f = 1 - NIE(all but C) / NIE(all) in the
    base run, and likewise with TIE in the source run. MIB has the first, of whole graphs; here
    attention stays as it is, and redundant and saturated units need both.

    Args:
        decoder: the model.
        pairs: the pairs whose mean is taken.
        question: the metric and the positions; its group size must be 1.
        scores: of the neurons, by the ranking's name; NaN ranks last.
        memory: bytes for the runs that are made at once; most of what is free by default.

    Returns:
        By name: f in the base run and in the source run, for each of `CIRCUIT_SIZES`; the size is
        rounded up to a neuron. NaN where all neurons together carry next to nothing.
    """
    sets = []
    for ranking in scores.values():
        order = np.argsort(-np.nan_to_num(ranking, nan=-np.inf), axis=None, kind="stable")
        for fraction in CIRCUIT_SIZES:
            outside = np.ones(ranking.size, bool)
            outside[order[: math.ceil(fraction * ranking.size)]] = False
            sets.append(outside.reshape(ranking.shape))
    sets = np.stack([*sets, np.ones_like(sets[0])])
    found = np.stack(joint.joint_shares(decoder, pairs, question, sets, memory))
    whole = found[:, -1:]
    whole = np.where(np.abs(whole) >= _LEAST_OF_ALL_NEURONS, whole, np.nan)
    curves = 1 - found[:, :-1] / whole
    return dict(zip(scores, np.split(curves, len(scores), axis=1), strict=True))


def circuit_areas(curve: Float[np.ndarray, "... K"]) -> tuple[np.ndarray, np.ndarray]:
    """CPR and CMD of faithfulness curves over `CIRCUIT_SIZES` (MIB, arXiv 2504.13151).

    Returns:
        CPR: the area under the curve; higher is better. CMD: the area between the curve and 1;
        lower is better. By the trapezoidal rule, each [...].
    """
    return (
        np.trapezoid(curve, CIRCUIT_SIZES),
        np.trapezoid(np.abs(1 - curve), CIRCUIT_SIZES),
    )
