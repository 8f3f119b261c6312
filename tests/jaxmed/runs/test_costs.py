"""What people are told of a scan's cost."""

import dataclasses

import pytest

from jaxmed.engine import rates
from jaxmed.runs import costs, mediate
from jaxmed.runs.compilation import Compilation
from jaxmed.runs.mediate import MediateSettings
from tests import tiny

OPERATIONS = {"layer": 1e9, "token": 8e11, "neuron": 1.99e11}
UNITS = {"layer": 30, "token": 4320, "neuron": 46080}
SETTINGS = MediateSettings("model", "pairs", "out")


def test_shares_name_the_dearest_first():
    assert costs.shares(OPERATIONS, UNITS) == (
        "Of these operations token 80.0% (4,320 units a pair), neuron 19.9% (46,080 units a pair), "
        "layer 0.1% (30 units a pair)."
    )
    assert costs.dearest(OPERATIONS) == "token"


def test_the_share_of_a_process_is_none_of_no_operations():
    assert costs.share({"layer": 1e9}, {"layer": 3e9, "neuron": 1e9}) == 0.25
    assert costs.share({}, {"neuron": 0.0}) == costs.share({"neuron": 0.0}, {"neuron": 0.0}) == 0.0


def test_the_time_left_is_at_the_first_blocks_pace():
    """Ten times what is done; what takes less than a hundredth is not told."""
    others = {name: 10 * each for name, each in OPERATIONS.items()}
    assert costs.left(60.0, sum(OPERATIONS.values()), others) == (
        "The first blocks of pairs took 60 seconds, compilation included; at that pace the others "
        "take 10 minutes: token 8 minutes, neuron 119 seconds"
    )


@pytest.fixture
def forecast(monkeypatch, tmp_path):
    """Forecasts of one question or another, on a machine whose products make 1e9 operations a
    second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "operations_per_second", lambda decoder: 1e9)
    decoder = tiny.decoder("llama")
    return lambda *asked: costs.Forecast(decoder, asked or ("last", "logit_diff", 1))


def test_a_first_scan_is_told_by_what_others_came_to(forecast):
    told = forecast().told({"neuron": 8e9, "layer": 1e9})
    assert "Going by the 1.0e+09 a second of this machine's matrix products in float32, " in told
    assert "about 20 seconds, and compilation beside: some seconds" in told


def test_the_next_scan_is_told_by_the_last_one(forecast):
    first = forecast()
    first.add("layer", 1e9, 15.0)
    first.add("layer", 1e9, 5.0)
    first.add("neuron", 1e9, 2.0)
    taken = first.keep(Compilation(programs=9, cached=1, seconds=12.0))
    assert taken == "It took 22 seconds, and 12 seconds of compilation"
    second = forecast()
    told = second.told({"layer": 1e9, "neuron": 3e9})
    assert "last such scan, this takes about 16 seconds, and less than the 12 seconds" in told
    second.add("layer", 1e9, 20.0)
    second.add("neuron", 1e9, 4.0)
    second.keep(Compilation(programs=0, cached=10, seconds=1.5))
    told = forecast().told({"layer": 1e9, "neuron": 3e9})
    assert "about 32 seconds, and 1.5 seconds for programs that come from the cache" in told
    # Another question is another scan.
    assert forecast("prompt", "logit_diff", 1).seconds({"neuron": 8e8}) == pytest.approx(1)


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


# What is told before a run.


@pytest.fixture
def plan():
    """Of a bfloat16 model whose weights take a quarter of an H100."""
    return costs.Plan(
        weights=20 * 10**9,
        dtype="bfloat16",
        precision="bfloat16",
        pairs=500,
        units={"layer": 32, "neuron": 458_752},
        blocks={"layer": 63, "neuron": 2000},
        operations={"layer": 1e12, "neuron": 2e18},
    )


def test_stored_bytes_are_those_of_effects_statuses_and_estimates(plan):
    assert plan.stored("neuron") == 500 * 458_752 * 9
    screened = dataclasses.replace(plan, screened=True)
    assert screened.stored("neuron") == 500 * 458_752 * 17
    assert screened.stored("layer") == plan.stored("layer") == 500 * 32 * 9


def test_a_measured_accelerator_is_told_with_what_was_measured(plan):
    about, time = costs._told_of("h100", plan)
    assert "weights take 25% of its memory" in about and "in bfloat16 takes 1 in bfloat16" in about
    # 2e18 / (0.49 * 989e12) s; the layers' 1e12 take no time.
    assert (
        "about 69 minutes: of a scan of neurons in bfloat16 49% of that rate was measured" in time
    )
    assert time.endswith("which nothing reaches, it is 34 minutes")


def test_an_accelerator_that_was_not_measured_is_told_by_its_datasheet_alone(plan):
    _, time = costs._told_of("v5p", plan)
    assert time.startswith("There no scan was measured in bfloat16; at the datasheet's rate")
    assert time.endswith("it is 73 minutes")


@pytest.mark.parametrize(
    ("precision", "dtype", "passes"),
    [
        ("split3", "bfloat16", 3),
        ("float32", "bfloat16", 3),
        ("split2", "bfloat16", 2),
        ("split3", "float32", 6),
        ("bfloat16", "float32", 1),
    ],
)
def test_products_take_as_many_passes_as_they_have_parts(precision, dtype, passes, plan):
    changed = dataclasses.replace(plan, precision=precision, dtype=dtype)
    about, _ = costs._told_of("h200", changed)
    assert f"takes {passes} in bfloat16" in about
