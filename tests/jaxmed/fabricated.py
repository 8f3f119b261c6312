"""Results of a run that never was, with a planted answer: for tests of what is made of results."""

import math

import numpy as np

from jaxmed.question import effects, sites
from jaxmed.store import results

LAYERS, HEADS, NEURONS, POSITIONS, PAIRS = 6, 4, 32, 9, 8
SIZES = effects.Sizes(LAYERS, HEADS, NEURONS, POSITIONS, ("residual", "head"), directions=15)
RUN = {
    "model": "org/<script>alert(1)</script>",
    "metric": "logit_diff",
    "metric_unit": "logits",
    "meaning": "the harmful answer’s logit minus the safe one’s",
    "positions": "prompt",
    "precision": "float32",
    "device": "cpu",
}
# As on a planted model: each of the gates (last layer) is enough, all detectors (layer 0) are
# needed.
DETECTORS = [[0, 5], [0, 11], [0, 30]]
GATES = [[5, 3], [5, 9], [5, 17], [5, 21]]
TRUTH = {
    "contrast": "H to B",
    "modules": [[0, "mlp"], [2, "attention"], [5, "mlp"]],
    "heads": [[2, 1]],
    "neurons": [*DETECTORS, *GATES],
}
JOINT = {
    "picked": [[5, 3], [1, 2]],
    "share_nie": [0.95, 0.96],
    "share_tie": [0.004, 0.31],
    "share": 0.9,
    "seconds": 1.0,
    "confirmed": {"share_nie": 0.94, "share_tie": 0.3, "pairs": 3},
}


def fabricate(folder, run=RUN, granularities=sites.GRANULARITIES, te=-6.0, pairs=PAIRS):
    """Results with a planted answer, small noise, and pairs of unequal lengths."""
    pair_ids = [f"pair {index} <script>" for index in range(pairs)]
    made = results.Results.create(folder, run, SIZES, pair_ids, granularities)
    generator = np.random.default_rng(0)
    for pair in range(pairs):
        size = te * generator.uniform(0.9, 1.1)
        made.write_totals(pair, y_base=3.0, y_source=3.0 + size)
        for granularity in made.granularities:
            nie, tie = 0.002 * size * generator.normal(size=(2, *SIZES.shape(granularity)))
            if granularity == "module":
                tie[0, 1] = nie[5, 1] = tie[5, 1] = nie[2, 0] = tie[2, 0] = 0.9 * size
            elif granularity == "head":
                nie[2, 1] = tie[2, 1] = 0.9 * size
            elif granularity == "neuron":
                for layer, neuron in DETECTORS:
                    tie[layer, neuron] = 1.04 * size
                for layer, neuron in GATES:
                    nie[layer, neuron] = 0.95 * size
            elif granularity == "direction":
                nie[3, 0, 12] = tie[3, 0, 12] = 0.5 * size
            elif granularity == "token":
                nie[:, 0, 0] = tie[:, 0, 0] = size
                nie[2, 1, 0] = tie[2, 1, 0] = 0.9 * size
                length = POSITIONS - pair % 4
                nie[..., length:] = tie[..., length:] = math.nan
            made.write(pair, granularity, nie, tie)
    return made
