"""The faster of two precisions that are as exact: measured once for a machine and a shape."""

import pytest

from jaxmed.engine import rates
from tests import tiny


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured, by precision; each as often as it was."""
    asked = []
    speeds = {"float32": 10.0, "split3": 30.0}

    def measure(config, dtype, how, rows):
        asked.append((how.precision, rows))
        return speeds[how.precision]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_measure", measure)
    monkeypatch.setattr(rates, "_SMALL", 0)
    return asked, speeds


@pytest.mark.parametrize("split, chosen", [(30.0, "split3"), (10.5, "float32"), (3.0, "float32")])
def test_the_faster_is_taken_where_it_is_worth_it(measured, split, chosen):
    asked, speeds = measured
    speeds["split3"] = split
    decoder = tiny.decoder("llama", dtype="bfloat16")
    assert rates.exact_precision(decoder) == chosen
    assert rates.exact_precision(decoder.at_precision("split2")) == chosen
    assert asked == [("float32", 512), ("split3", 512)]  # The second time it was noted.
    rates.exact_precision(decoder, rows=16)
    assert asked[2:] == [("float32", 16), ("split3", 16)]
    rates.exact_precision(tiny.decoder("llama", dtype="float32"))
    assert len(asked) == 6


def test_nothing_is_measured_for_a_small_model(measured, monkeypatch):
    asked, _ = measured
    monkeypatch.setattr(rates, "_SMALL", 10**6)
    assert rates.exact_precision(tiny.decoder("llama", dtype="bfloat16")) == "float32"
    assert asked == []


def test_a_folder_that_cannot_be_written_to_has_no_notes(measured, monkeypatch):
    asked, _ = measured
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    decoder = tiny.decoder("llama", dtype="bfloat16")
    assert {rates.exact_precision(decoder) for _ in range(2)} == {"split3"}
    assert len(asked) == 4


def test_a_rate_is_that_of_products(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(ticks))
    decoder = tiny.decoder("llama", dtype="bfloat16").at_precision("split2")
    # Two products of 512 rows that take a tick of 2 s each, between two looks at the clock.
    operations = 2 * 2 * 512 * 24 * 40
    assert rates.operations_per_second(decoder) == pytest.approx(operations / 4)
