"""Scores against a planted truth, on fabricated results."""

import math

import numpy as np
import pytest

from jaxmed.analysis import ranking
from jaxmed.validation import scoring
from tests.jaxmed.fabricated import JOINT, RUN, TRUTH, fabricate


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    made = fabricate(tmp_path_factory.mktemp("planted"))
    made.record({"joint": JOINT, "truth": TRUTH})
    return made


def test_the_score_of_a_planted_model(planted):
    scores = scoring.score(planted)
    assert set(scores) == {"module", "head", "neuron"}
    for granularity in scores:
        assert scores[granularity]["max"] == {"auroc": 1, "precision_at_k": 1}
    # The gates are the 4 of 7 that NIE finds, the detectors the 3 that TIE finds; the others
    # are noise, so that they may enter the 7 best only by chance.
    assert 4 / 7 <= scores["neuron"]["nie"]["precision_at_k"] < 1
    assert 3 / 7 <= scores["neuron"]["tie"]["precision_at_k"] < 1
    assert scores["neuron"]["nie"]["auroc"] < 1


def test_the_score_where_nothing_is_planted(tmp_path):
    nothing = {"contrast": "H to B", "modules": [], "heads": [], "neurons": []}
    made = fabricate(tmp_path, {**RUN, "truth": nothing}, ["head"])
    assert math.isnan(scoring.score(made)["head"]["nie"]["auroc"])


@pytest.mark.parametrize(
    "planted_unit", [{"heads": [[2, 4]]}, {"neurons": [[6, 0]]}, {"modules": [[0, "mpl"]]}]
)
def test_a_truth_of_another_model_is_refused(tmp_path, planted_unit):
    granularities = ["module", "head", "neuron"]
    made = fabricate(tmp_path, {**RUN, "truth": planted_unit}, granularities)
    with pytest.raises(ValueError, match="the truth plants"):
        scoring.score(made)


def test_the_joint_set_ranks_first_and_then_the_larger_effect(planted):
    ranked = ranking.rankings(planted, "neuron")
    assert list(ranked) == ["nie", "tie", "max", "joint"]
    order = np.argsort(-ranked["joint"], axis=None)[:2]
    assert [[int(i) for i in np.unravel_index(o, (6, 32))] for o in order] == JOINT["picked"]
    assert list(ranking.rankings(planted, "head")) == ["nie", "tie", "max"]
