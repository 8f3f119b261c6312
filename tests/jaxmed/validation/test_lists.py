"""Short lists are timed one after another; how fast any is, no test asserts."""

import pytest

from jaxmed.engine import scan
from jaxmed.validation import lists, presets, timing
from tests import tiny

EACH = (
    5.0,
    3.0,
    1.0,
    2.0,
)  # seconds of the runs of a list: the first, and those whose median counts


def test_every_list_is_run_first_and_then_for_the_median(monkeypatch):
    config = tiny.config("llama", num_layers=2)
    monkeypatch.setitem(presets.PRESETS, "small", presets.Preset(config, 6))
    now, asked = [0.0], []

    def scan_and_wait(decoder, pair, question, granularities, *, memory):
        asked.append((*granularities, str(question.positions), decoder.products.precision))
        now[0] += EACH[(len(asked) - 1) % len(EACH)]

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    monkeypatch.setattr(scan, "scan_pair", scan_and_wait)
    told = []
    figures = lists.measure(
        "small", say=told.append, dtype="bfloat16", precision="split2", rounds=3, memory_gb=100
    )
    assert (figures.dtype, figures.precision, figures.layers) == ("bfloat16", "split2", 2)
    last = [(name, "last") for name in ("layer", "module", "head", "token")]
    prompt = [(name, "prompt") for name in ("layer", "module", "head")]
    assert [(each.granularity, each.positions) for each in figures.lists] == last + prompt
    assert asked == [(*each, "split2") for each in last + prompt for _ in EACH]
    assert {(each.first_seconds, each.seconds) for each in figures.lists} == {(5.0, 2.0)}
    assert len(told) == 1 + len(figures.lists)
    # By hand: of two layers, patched at the last position after 5 others, only the first has a
    # block after it; both are read at two tokens.
    heads, kv = 4 * 8, 2 * 8
    block = 2 * (24 * heads + 2 * 24 * kv + heads * 24 + 3 * 24 * 40)
    estimand = block + 2 * 2 * heads * (5 + 2) + 2 * 2 * 24 * 2
    assert figures.lists[0].operations == 2 * estimand
    assert figures.lists[0].operations_per_second == pytest.approx(estimand)
    assert not any(each.profile for each in figures.lists)
    # All six positions at once: keys and values are of all, and what is read is at the last.
    inputs = 2 * 6 * 2 * 24 * kv
    asked_for = 2 * (24 * heads + heads * 24 + 3 * 24 * 40) + 2 * 2 * heads * 2 * 6 + 2 * 2 * 24 * 2
    assert figures.lists[4].operations == 2 * (inputs + asked_for)
