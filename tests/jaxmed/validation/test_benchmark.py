"""The benchmark's bookkeeping; how fast anything is, no test asserts."""

import dataclasses

import numpy as np
import pytest

from jaxmed.engine import propagate
from jaxmed.report import benchmark as benchmark_lib
from jaxmed.validation import benchmark, presets
from models.errors import InputError
from tests import tiny


@pytest.fixture
def small(monkeypatch):
    """A preset that takes no time."""
    config = tiny.config("llama", num_layers=2)
    monkeypatch.setitem(presets.PRESETS, "small", presets.Preset(config, 6, "float32"))
    monkeypatch.setattr(benchmark, "_PRODUCT_SECONDS", 0.01)
    return config


def test_figures_agree_with_each_other(small):
    told = []
    figures = benchmark.measure("small", rounds=2, screen=3, say=told.append)
    assert figures.neurons == 80
    assert figures.neurons_per_second == pytest.approx(80 / figures.seconds)
    assert figures.matmul_fraction > 0
    assert figures.peak_memory_bytes > 2**20
    assert figures.speedup_screen > 0
    assert (
        figures.speedup_hooks is None and figures.speedup_prefix is None and not figures.baselines
    )
    assert len([line for line in told if line.startswith("round")]) == 2 + 3
    assert any("80, each patched alone" in line for line in benchmark_lib.table(figures))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="the engine here in bfloat16 .*: no comparison"):
        benchmark.measure("llama-3.2-1b", against=("hooks",))
    with pytest.raises(InputError, match="leave out --neurons"):
        benchmark.measure("12x768", screen=10, neurons=100)


def test_operations_are_those_of_the_blocks_after_each_neuron(small):
    """By hand: only the neurons of the first layer have a block after theirs."""
    decoder = presets.random_decoder(small)
    chosen = benchmark.spread(small, 0)
    pair = presets.random_pair(small, 6)
    engine = benchmark._Engine(decoder, pair, chosen, "float32", 2**30)
    heads, kv = 4 * 8, 2 * 8
    block = 2 * (24 * heads + 2 * 24 * kv + heads * 24 + 3 * 24 * 40)
    assert engine.product_operations == 40 * block
    # Besides, scores and values against 5 positions before, and the two logits that are read.
    attention = 2 * 40 * 2 * heads * (5 + 2)
    assert engine.operations == 40 * block + attention + 2 * 80 * 24 * 2


def test_a_sample_is_spread_over_all_layers(small):
    assert benchmark.spread(small, 0).all()
    chosen = benchmark.spread(small, 16)
    np.testing.assert_array_equal(chosen.sum(axis=1), [8, 8])
    with pytest.raises(InputError, match="--neurons=81: the model has 80"):
        benchmark.spread(small, 81)


def test_every_preset_has_a_known_precision():
    for preset in presets.PRESETS.values():
        assert preset.matmul_precision in propagate.MATMUL_PRECISIONS
        assert dataclasses.replace(preset.config, num_layers=1, windows=(None,))
