"""The benchmark's bookkeeping, by a clock that does not run by itself; how fast anything is, no
test asserts."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from jaxmed import validation
from jaxmed.behaviour import generation
from jaxmed.engine import scan
from jaxmed.question.effects import PairEffects
from jaxmed.report import benchmark as report
from jaxmed.validation import benchmark, presets, timing
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
    monkeypatch.setattr(timing, "clock", made)
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
        assert (decoder.dtype, decoder.products.precision) == ("bfloat16", "split3")
        assert len(prompts) == 4 and {len(prompt) for prompt in prompts} == {9}
        clock.now += next(seconds["held" if holds else "plain"])

    monkeypatch.setattr(generation, "generate", generate)
    figures = benchmark.measure_generation(
        "small",
        dtype="bfloat16",
        precision="split3",
        rounds=3,
        batch=4,
        prompt_tokens=9,
        new_tokens=6,
        say=lambda text: None,
    )
    assert (figures.dtype, figures.precision) == ("bfloat16", "split3")
    assert (figures.batch, figures.prompt_tokens, figures.new_tokens) == (4, 9, 6)
    assert figures.tokens_per_second == 4 * 6 / 3
    assert figures.held_tokens_per_second == 4 * 6 / 3
    # The median of 3 / 2, 5 / 4 and 3 / 3, and not the ratio of the medians.
    assert figures.hold_cost == 0.25
    shown = dict(line.split("  ", 1) for line in report.generation_table(figures))
    assert "8.0: +25.0% of the time" in shown["with a hold on every neuron"]


def test_what_cannot_be_compared_is_refused():
    on_a_cpu = {"say": print, "against_types": ("float32", "tf32")}
    with pytest.raises(InputError, match="against_types=tf32: a CPU has no such products"):
        benchmark.measure_generation("llama-3.2-1b", against=("transformers",), **on_a_cpu)
    with pytest.raises(InputError, match="against_types=tf32: a CPU has no such products"):
        benchmark.measure("12x768", against=("hooks",), **on_a_cpu)
    with pytest.raises(InputError, match="matmul_precision=split2: .* take float32 or split3"):
        benchmark.measure_generation("12x768", say=print, precision="split2")
    with pytest.raises(InputError, match="leave out neurons"):
        benchmark.measure("12x768", say=print, screen=10, neurons=100)


class FakeTorch:
    """Stands for `baselines`, which needs torch: keeps what was made of which model."""

    class Hooks:
        what = "hooks"

        def __init__(self, model, **reads):
            self.model, self.batch, self.tf32 = model, reads["batch"], reads["tf32"]

        def effects(self, layers, neurons):
            raise NotImplementedError

    class Prefix(Hooks):
        what = "loop"

    class RoundedPrefix(Prefix):
        pass

    class Generate(Hooks):
        what = "generate"

        def __init__(self, model, prompts, new_tokens, tf32):
            self.model, self.tf32 = model, tf32

        def __call__(self):
            made.append(("generate", *self.model[1:], self.tf32))

    def __init__(self, gpu):
        self._gpu = gpu

    def sees_gpu(self):
        return self._gpu

    @staticmethod
    def torch_model(decoder, number_type="float32", device="cpu", onednn=False):
        return decoder, number_type, device, onednn


made = []  # by fakes that were called


@pytest.fixture
def engine(small):
    return benchmark._Engine(
        decoder=presets.random_decoder(small),
        pair=presets.random_pair(small, 6),
        chosen=benchmark.spread(small, 0),
        memory=2**30,
    )


def ways(timed):
    """Of each baseline: its class, model without the decoder, rows, whether in TF32, sample."""
    return {
        name: (
            type(of.baseline).__name__,
            *of.baseline.model[1:],
            of.baseline.batch,
            of.baseline.tf32,
            of.sample,
        )
        for name, of in timed.items()
    }


def test_on_a_gpu_baselines_run_there_in_every_type(engine, monkeypatch):
    monkeypatch.setattr(validation, "baselines", FakeTorch(gpu=True), raising=False)
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: "gpu")
    device = benchmark._torch_device(benchmark.BASELINE_TYPES)
    timed = benchmark._baselines(engine, ("hooks", "prefix"), device, benchmark.BASELINE_TYPES)
    assert ways(timed) == {
        "hooks": ("Hooks", "float32", "cuda", False, 512, False, 1024),
        "prefix": ("Prefix", "float32", "cuda", False, 16384, False, 131072),
        "hooks_tf32": ("Hooks", "tf32", "cuda", False, 512, True, 1024),
        "prefix_tf32": ("Prefix", "tf32", "cuda", False, 16384, True, 131072),
        "hooks_bfloat16": ("Hooks", "bfloat16", "cuda", False, 512, False, 1024),
        "prefix_bfloat16": ("Prefix", "bfloat16", "cuda", False, 16384, False, 131072),
    }
    assert timed["prefix_tf32"].what == "loop, 16,384 rows a batch, tf32"
    monkeypatch.setattr(validation, "baselines", FakeTorch(gpu=False), raising=False)
    with pytest.raises(InputError, match="jaxmed runs on .* and torch sees no such GPU"):
        benchmark._torch_device(("float32",))


def test_on_a_cpu_the_loop_runs_with_onednn_and_by_autocast_as_well(engine, monkeypatch):
    monkeypatch.setattr(validation, "baselines", FakeTorch(gpu=True), raising=False)
    device = benchmark._torch_device(("float32", "bfloat16"))
    timed = benchmark._baselines(engine, ("prefix",), device, ("float32", "bfloat16"))
    assert ways(timed) == {
        "prefix": ("Prefix", "float32", "cpu", False, 512, False, 9216),
        "prefix_64_rows": ("Prefix", "float32", "cpu", False, 64, False, 9216),
        "prefix_2048_rows": ("Prefix", "float32", "cpu", False, 2048, False, 9216),
        "prefix_onednn": ("Prefix", "float32", "cpu", True, 512, False, 9216),
        "prefix_autocast": ("RoundedPrefix", "float32", "cpu", False, 512, False, 9216),
        "prefix_bfloat16": ("Prefix", "bfloat16", "cpu", False, 512, False, 9216),
        "prefix_64_rows_bfloat16": ("Prefix", "bfloat16", "cpu", False, 64, False, 9216),
        "prefix_2048_rows_bfloat16": ("Prefix", "bfloat16", "cpu", False, 2048, False, 9216),
    }


def test_generation_is_timed_against_transformers_where_jax_is(small, monkeypatch):
    monkeypatch.setattr(validation, "baselines", FakeTorch(gpu=True), raising=False)
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: None)
    asked = {"against": ("transformers",), "rounds": 1, "say": lambda text: None}
    made.clear()
    found = benchmark.measure_generation("small", **asked, against_types=("float32", "bfloat16"))
    assert list(found.baselines) == ["transformers", "transformers_onednn", "transformers_bfloat16"]
    assert found.baselines["transformers_onednn"].what == "generate, float32, with oneDNN for MKL"
    on_cpu = [("float32", "cpu", False), ("float32", "cpu", True), ("bfloat16", "cpu", False)]
    # Each once before what is timed, and then in turn.
    assert made == [("generate", *way, False) for way in on_cpu + on_cpu]
    monkeypatch.setattr(benchmark, "_torch_device", lambda types: "cuda")
    made.clear()
    found = benchmark.measure_generation("small", **asked, against_types=("tf32",))
    assert list(found.baselines) == ["transformers_tf32"]
    assert made == 2 * [("generate", "tf32", "cuda", False, True)]


def test_operations_are_those_of_the_blocks_after_each_neuron(engine):
    """By hand: only the neurons of the first layer have a block after theirs."""
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


def test_a_shape_is_the_presets_but_for_what_is_asked(small):
    assert presets.shape("small") == small
    cut = presets.shape("small", layers=1, dtype="bfloat16")
    assert (cut.num_layers, cut.windows, cut.dtype) == (1, (None,), "bfloat16")


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
