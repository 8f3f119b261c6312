"""Scores of a run against a planted truth: how well each ranking of units finds what is there."""

import numpy as np
from jaxtyping import Bool

from jaxmed.analysis import ranking
from jaxmed.question.sites import MODULE_SITES
from jaxmed.store.results import Results
from models.errors import InputError

# What a truth calls the units of each granularity.
TRUTH_KEYS = {"module": "modules", "head": "heads", "neuron": "neurons"}


def truth_mask(results: Results, granularity: str) -> Bool[np.ndarray, "L U"]:
    """Which units of a granularity are planted, of L layers and U units in each.

    Args:
        results: the run; its "truth" is {"contrast": text, "modules": [[layer, attention or mlp],
            ...], "heads": [[layer, head], ...], "neurons": [[layer, neuron], ...]}.
        granularity: module, head or neuron; of groups of neurons, those that hold a planted one.

    Raises:
        InputError: a planted unit does not exist in this run.
    """
    mask = np.zeros(results.sizes.shape(granularity), bool)
    for layer, unit in results.run["truth"].get(TRUTH_KEYS[granularity], []):
        if granularity == "module":
            index = MODULE_SITES.index(unit) if unit in MODULE_SITES else -1
        elif granularity == "neuron":
            index = unit // results.run.get("group_size", 1)
        else:
            index = unit
        if not (0 <= layer < mask.shape[0] and 0 <= index < mask.shape[1]):
            raise InputError(
                f"the truth plants {granularity} {unit} in layer {layer}, but the run in"
                f" {results.folder} has {mask.shape[1]} units in each of {mask.shape[0]} layers"
            )
        mask[layer, index] = True
    return mask


def score(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Scores the effects of a run on a model with a planted answer.

    Args:
        results: the run, with a truth as `truth_mask` has it.

    Returns:
        {granularity: {ranking: {"auroc": fraction, "precision_at_k": fraction}}} for those of
        module, head and neuron that were run, and for each of `ranking.rankings`. NaN where nothing
        is planted.

    Raises:
        InputError: a planted unit does not exist in this run.
    """
    found = {}
    for granularity in results.granularities:
        if granularity not in TRUTH_KEYS:
            continue
        mask = truth_mask(results, granularity)
        found[granularity] = {
            name: {
                "auroc": ranking.auroc(scores, mask),
                "precision_at_k": ranking.precision_at_k(scores, mask),
            }
            for name, scores in ranking.rankings(results, granularity).items()
        }
    return found
