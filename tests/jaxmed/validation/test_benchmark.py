"""The benchmark's bookkeeping, by a clock that does not run by itself; how fast anything is, no
test asserts."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from jaxmed.behaviour import generation
from jaxmed.engine import scan
from jaxmed.question.effects import PairEffects
from jaxmed.report import benchmark as report
from jaxmed.validation import benchmark, presets
from models import products
from models.errors import InputError
from tests import tiny

NEURONS = 80  # two layers of 40
WHOLE_SCANS = (10.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0)  # seconds of both estimands, in this order
SCREENED_SCANS = (9.0, 0.25, 0.5, 2.0)
PRODUCTS = (0.02, 0.01, 0.02, 0.04, 0.01)  # seconds of a block's products, by measurement


class Clock:
    """Tells the time that what is timed has said it took."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(benchmark, "_clock", made)
    return made


@pytest.fixture
def small(monkeypatch):
    """A preset that takes no time."""
    config = tiny.config("llama", num_layers=2)
    monkeypatch.setitem(presets.PRESETS, "small", presets.Preset(config, 6))
    return config


@pytest.fixture
def timed(small, clock, monkeypatch):
    """Scans and products that take as long as is written above, whatever they do."""
    seconds = {"whole": iter(WHOLE_SCANS), "screened": iter(SCREENED_SCANS)}
    measurements = iter(PRODUCTS)
    scan_pair = scan.scan_pair

    def scan_and_wait(*args, chosen, **kwargs):
        clock.now += next(seconds["whole" if chosen["neuron"].all() else "screened"])
        return scan_pair(*args, chosen=chosen, **kwargs)

    rate = benchmark._Products.rate

    def rate_and_wait(self):
        each = next(measurements)

        def multiply_all():
            clock.now += each

        monkeypatch.setattr(self, "multiply_all", multiply_all)
        return rate(self)

    monkeypatch.setattr(benchmark, "_PRODUCT_SECONDS", 0.04)
    monkeypatch.setattr(scan, "scan_pair", scan_and_wait)
    monkeypatch.setattr(benchmark._Products, "rate", rate_and_wait)
    # All are computed but a few, so that a whole scan can be told from a screened one.
    monkeypatch.setattr(benchmark.screening, "AUDIT", 20)


def test_figures_are_medians_of_what_was_timed(timed, small):
    told = []
    figures = benchmark.measure("small", rounds=3, screen=3, say=told.append)
    assert (figures.layers, figures.neurons) == (2, NEURONS)
    # The first scan compiles; then 3, 2 and 4 s by both estimands.
    assert figures.seconds == 1.5
    assert figures.compile_seconds == 10 - 3
    assert figures.neurons_per_second == NEURONS / 1.5
    # By hand: only the neurons of the first layer have a block after theirs.
    block = 2 * (24 * 32 + 2 * 24 * 16 + 32 * 24 + 3 * 24 * 40)
    assert figures.product_flops == 40 * block
    assert figures.flops > figures.product_flops
    # A round's rate is the mean of those measured before and after it; the first warms up.
    rates = [figures.batch * block / seconds for seconds in PRODUCTS[1:]]
    around = [(before + after) / 2 for before, after in itertools.pairwise(rates)]
    assert figures.matmul_flops_per_second == pytest.approx(np.median(around))
    fractions = 40 * block / np.divide([3, 2, 4], 2) / around
    assert figures.matmul_fraction == pytest.approx(np.median(fractions))
    # In full 5, 6 and 7 s; screened, after a run that compiles, 0.25, 0.5 and 2 s.
    assert figures.screen_seconds == 0.5
    assert figures.speedup_screen == 12
    assert figures.peak_memory_bytes > 2**20
    assert figures.speedup_hooks is None and figures.speedup_prefix is None
    assert not figures.baselines
    assert len([line for line in told if line.startswith("round")]) == 3 + 3
    shown = dict(line.split("  ", 1) for line in report.table(figures))
    assert "80, each patched alone" in shown["neurons"]
    assert "1.5 s (median)" in shown["one estimand of a pair"]
    assert "0.5 s: x 12.0" in shown["screened, both estimands"]


def test_baselines_are_timed_in_turn_with_the_engine(clock, small):
    """On at most so many neurons each, and not in their first run."""
    asked = []

    def baseline(name, seconds):
        taken = iter(seconds)

        def effects(layers, neurons):
            asked.append((name, len(layers), len(neurons)))
            clock.now += next(taken, 0.0)
            return np.full(len(layers), 1.25)

        return types.SimpleNamespace(effects=effects)

    class Engine(benchmark._Engine):
        chosen = np.ones((2, 40), bool)
        ours = iter([1.0, 2.0, 4.0])  # seconds of an estimand

        def __init__(self):
            pass

        def seconds(self):
            return next(self.ours)

        def exact(self, chosen):
            return PairEffects(0.0, 0.0, nie={"neuron": np.ones(chosen.shape)}, tie={})

    few = benchmark._Timed("by hooks", baseline("hooks", [99, 10, 20, 40]), sample=10)
    all_of_them = benchmark._Timed("by hand", baseline("prefix", [99, 4, 4, 4]), sample=1000)
    nothing = benchmark.Figures("small", "cpu", "float32", "split3", 2, 80, 1, *[0.0] * 7, 0)
    figures = benchmark._with_baselines(
        nothing, Engine(), {"hooks": few, "prefix": all_of_them}, say=lambda text: None
    )
    warming = [("hooks", 10, 10), ("prefix", 64, 64)]
    one_round = [("hooks", 10, 10), ("prefix", 80, 80)]
    rounds = [warming[0], one_round[0], warming[1], one_round[1], *one_round, *one_round]
    # And once more on those whose effects are known in float64: here on all.
    assert asked == rounds + [("hooks", 80, 80), ("prefix", 80, 80)]
    # 10 neurons in 10, 20 and 40 s against 80 in 1, 2 and 4.
    hooks, prefix = figures.baselines["hooks"], figures.baselines["prefix"]
    assert hooks == benchmark.BaselineSpeed("by hooks", 0.5, speedup=80.0, error=0.25)
    assert prefix == benchmark.BaselineSpeed("by hand", 20.0, speedup=2.0, error=0.25)
    assert (figures.speedup_hooks, figures.speedup_prefix) == (80.0, 2.0)
    assert any("20.0 a second: x 2.00, error 2.5e-01" in line for line in report.table(figures))


def test_generation_is_timed_plain_and_with_a_hold(clock, small, monkeypatch):
    seconds = {"plain": iter([50, 2, 4, 3]), "held": iter([50, 3, 5, 3])}

    def generate(decoder, prompts, *, holds, **_):
        assert len(prompts) == 4 and {len(prompt) for prompt in prompts} == {9}
        clock.now += next(seconds["held" if holds else "plain"])

    monkeypatch.setattr(generation, "generate", generate)
    figures = benchmark.measure_generation(
        "small", rounds=3, batch=4, prompt_tokens=9, new_tokens=6, say=lambda text: None
    )
    assert (figures.batch, figures.prompt_tokens, figures.new_tokens) == (4, 9, 6)
    assert figures.tokens_per_second == 4 * 6 / 3
    assert figures.held_tokens_per_second == 4 * 6 / 3
    # The median of 3 / 2, 5 / 4 and 3 / 3, and not the ratio of the medians.
    assert figures.hold_cost == 0.25
    shown = dict(line.split("  ", 1) for line in report.generation_table(figures))
    assert "8.0: +25.0% of the time" in shown["with a hold on every neuron"]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="generation here in bfloat16 .*: no comparison"):
        benchmark.measure_generation("llama-3.2-1b", say=print, against=("transformers",))
    with pytest.raises(InputError, match="leave out neurons"):
        benchmark.measure("12x768", say=print, screen=10, neurons=100)


def test_operations_are_those_of_the_blocks_after_each_neuron(small):
    """By hand: only the neurons of the first layer have a block after theirs."""
    engine = benchmark._Engine(
        decoder=presets.random_decoder(small),
        pair=presets.random_pair(small, 6),
        chosen=benchmark.spread(small, 0),
        memory=2**30,
    )
    heads, kv = 4 * 8, 2 * 8
    block = 2 * (24 * heads + 2 * 24 * kv + heads * 24 + 3 * 24 * 40)
    assert engine.product_operations == 40 * block
    # Besides, scores and values against 5 positions before, and the two logits that are read.
    attention = 2 * 40 * 2 * heads * (5 + 2)
    assert engine.operations == 40 * block + attention + 2 * 80 * 24 * 2


@pytest.mark.parametrize("precision", products.PRECISIONS)
def test_products_alone_are_those_of_the_engine(precision, small):
    small = dataclasses.replace(small, dtype="bfloat16")
    alone = benchmark._Products(presets.random_decoder(small).at_precision(precision), rows=4)
    heads, kv = 4 * 8, 2 * 8
    assert alone.operations == 4 * 2 * (2 * 24 * heads + 2 * 24 * kv + 3 * 24 * 40)
    alone.multiply_all()


def test_a_sample_is_spread_over_all_layers(small):
    assert benchmark.spread(small, 0).all()
    chosen = benchmark.spread(small, 16)
    np.testing.assert_array_equal(chosen.sum(axis=1), [8, 8])
    with pytest.raises(InputError, match="neurons=81: the model has 80"):
        benchmark.spread(small, 81)


def test_every_preset_can_be_cut_to_any_number_of_layers():
    for preset in presets.PRESETS.values():
        assert presets.with_layers(preset.config, 0) == preset.config
        cut = presets.with_layers(preset.config, 3)
        assert (cut.num_layers, cut.windows) == (3, (None, None, None))
        assert (
            dataclasses.replace(
                cut, num_layers=preset.config.num_layers, windows=preset.config.windows
            )
            == preset.config
        )
