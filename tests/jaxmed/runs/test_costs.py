"""What people are told of a scan's cost."""

import dataclasses

import pytest

from jaxmed.runs import costs, mediate
from jaxmed.runs.mediate import MediateSettings

OPERATIONS = {"layer": 1e9, "token": 8e11, "neuron": 1.99e11}
UNITS = {"layer": 30, "token": 4320, "neuron": 46080}
SETTINGS = MediateSettings("model", "pairs", "out")


def test_shares_name_the_dearest_first():
    assert costs.shares(OPERATIONS, UNITS) == (
        "Of these operations token 80.0% (4,320 units a pair), neuron 19.9% (46,080 units a pair), "
        "layer 0.1% (30 units a pair)."
    )
    assert costs.dearest(OPERATIONS) == "token"


def test_the_time_left_is_at_the_first_blocks_pace():
    """Ten times what is done; what takes less than a hundredth is not told."""
    others = {name: 10 * each for name, each in OPERATIONS.items()}
    assert costs.left(60.0, sum(OPERATIONS.values()), others) == (
        "The first blocks of pairs took 60 seconds, compilation included; at that pace the others "
        "take 10 minutes: token 8 minutes, neuron 119 seconds"
    )


def test_a_short_time_is_not_told():
    assert costs.left(0.1, sum(OPERATIONS.values()), OPERATIONS) == ""
    assert costs.left(60.0, 1e12, dict.fromkeys(OPERATIONS, 0.0)) == ""
    assert costs.left(60.0, 0.0, OPERATIONS) == ""


LAYERS_TO_NEURON = "--granularity=layer,module,head,neuron"


@pytest.mark.parametrize(
    ("changes", "dearest", "told"),
    [
        (
            {},
            "token",
            f"To leave token out, stop this, and give another --out and {LAYERS_TO_NEURON}",
        ),
        ({}, "neuron", "--granularity=layer,module,head,token; or compute only the strongest"),
        ({"screen": 5}, "neuron", ""),
        ({"joint_size": 5}, "neuron", ""),
        ({"granularity": ("token",)}, "token", ""),
        ({"directions": "a.npz"}, "direction", "head,token,neuron without --directions"),
    ],
)
def test_how_to_leave_the_dearest_out(changes, dearest, told):
    said = mediate._without(dataclasses.replace(SETTINGS, **changes), dearest)
    assert (told in said) if told else said == ""
