"""How fast the engine is: against the machine's own matrix products, and against other ways.

The engine scans every neuron of a model with random weights of a real shape, and between its runs
the machine multiplies matrices of the very shapes that the engine multiplies. The fraction of that
rate which the engine reaches is what is left for the reader of the figures to trust: it does not
depend on how busy or how fast the machine is.
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.analysis import audit as audit_lib
from jaxmed.analysis import screening
from jaxmed.behaviour import generation
from jaxmed.behaviour.sampling import Sampling
from jaxmed.engine import cost, memory, plan, propagate, scan
from jaxmed.question import metrics, question
from jaxmed.validation import presets
from jaxmed.validation.presets import PRESETS
from models.config import DecoderConfig
from models.edits import Hold
from models.errors import InputError

BASELINES = ("hooks", "prefix")
GENERATION_BASELINES = ("transformers",)
# Neurons that the baselines are timed on, spread evenly over all that are scanned.
HOOKS_SAMPLE = 256
PREFIX_SAMPLE = 9216
_BASELINE_ROUNDS = 3
_PRODUCT_SECONDS = 1.5  # for which products are timed before and after each run of the engine


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured; times are medians over rounds.

    Attributes:
        preset, device, dtype: what ran on what; dtype is that of the operands of products.
        layers: blocks of the model.
        neurons: neurons that were scanned.
        batch: rows that go through a block together.
        compile_seconds: what the first run took longer than the others.
        seconds: of one estimand, NIE or TIE: half of what both take together, captures included.
        neurons_per_second: neurons / seconds.
        flops: floating-point operations that the algorithm needs for one estimand: in the blocks
            after each neuron, at the span's positions, and in the metric.
        product_flops: of these, the products with the blocks' weights.
        matmul_flops_per_second: the machine's rate for products of the engine's shapes, weighted
            by the engine's operations and measured between its runs.
        matmul_fraction: product_flops / seconds as a fraction of that rate; median over rounds.
        peak_memory_bytes: largest resident size of the process; on an accelerator, its memory.
        speedup_hooks: how many times more neurons per second than transformers with hooks.
        speedup_prefix: than the prefix-cached loop, with torch as it is installed.
        baselines: of all that were timed: `what`, `neurons_per_second` and `speedup`.
        screen_seconds: of both estimands of a pair in screened mode, scores and audit included.
        speedup_screen: how many times faster that is than both estimands in full.
    """

    preset: str
    device: str
    dtype: str
    layers: int
    neurons: int
    batch: int
    compile_seconds: float
    seconds: float
    neurons_per_second: float
    flops: float
    product_flops: float
    matmul_flops_per_second: float
    matmul_fraction: float
    peak_memory_bytes: int
    speedup_hooks: float | None = None
    speedup_prefix: float | None = None
    baselines: dict[str, dict] = dataclasses.field(default_factory=dict)
    screen_seconds: float | None = None
    speedup_screen: float | None = None


@dataclasses.dataclass(frozen=True)
class GenerationFigures:
    """How fast text is generated; rates are medians over rounds in which all took their turn.

    Attributes:
        preset, device, dtype: what ran on what; dtype is that of the weights.
        layers: blocks of the model.
        batch, prompt_tokens, new_tokens: prompts of a batch, tokens of each, and of each response.
        tokens_per_second: generated tokens of all rows, the prompts' run included.
        held_tokens_per_second: the same with a hold on every neuron of every layer.
        hold_cost: how much longer that takes, as a share; median over rounds.
        peak_memory_bytes: as in `Figures`, before the baselines.
        baselines: of all that were timed: `what`, `tokens_per_second`, `speedup` of plain
            generation, and `held_speedup`.
    """

    preset: str
    device: str
    dtype: str
    layers: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    held_tokens_per_second: float
    hold_cost: float
    peak_memory_bytes: int
    baselines: dict[str, dict] = dataclasses.field(default_factory=dict)


def measure_generation(
    preset: str,
    *,
    against: tuple[str, ...] = (),
    layers: int = 0,
    rounds: int = 5,
    batch: int = 8,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    memory_gb: float | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> GenerationFigures:
    """Times greedy generation, plain and with a hold, and the baselines' (no holds), in turn.

    Args:
        preset, layers, memory_gb, say: as in `measure`.
        against: any of `GENERATION_BASELINES`; they need torch, and run in float32 on a CPU.
        rounds: runs of each after the first, which compiles.
        batch, prompt_tokens, new_tokens: prompts, and the lengths of all prompts and responses.

    Raises:
        InputError: what is asked cannot be compared.
    """
    config = PRESETS[preset].config
    if against and (jax.default_backend() != "cpu" or config.dtype != "float32"):
        raise InputError(
            f"--against: the baselines are timed in float32 on a CPU, generation here in "
            f"{config.dtype} on {jax.devices()[0].device_kind}: no comparison"
        )
    if layers:
        config = dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)
    say(f"{preset}: making {config.num_layers} layers of random weights")
    decoder = presets.random_decoder(config)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt_tokens))
    damped = np.linspace(0.5, 1, config.intermediate_size, dtype=np.float32)
    hold = Hold.affine("neuron", damped[None], np.zeros((1, 1), np.float32))
    memory_left = memory.free(memory_gb)

    def ours(*holds):
        generation.generate(
            *(decoder, prompts.tolist()),
            stop=(),
            sampling=Sampling(new_tokens),
            holds=holds,
            batch_size=batch,
            memory=memory_left,
        )

    what = {"plain": "plain", "held": "with a hold on every neuron"}
    runs = {"plain": ours, "held": lambda: ours(hold)}
    for run in runs.values():
        run()
    peak = _peak_memory()
    if against:
        from jaxmed.validation import baselines  # torch, which only a comparison needs

        for name, onednn in (("transformers", False), ("transformers_onednn", True)):
            what[name] = "transformers' generate" + (", with oneDNN for MKL" if onednn else "")
            runs[name] = baselines.Generate(
                baselines.torch_model(decoder, onednn), prompts, new_tokens
            )
            runs[name]()
    seconds = _in_turn(runs, rounds, say)
    rates = {name: batch * new_tokens / statistics.median(seconds[name]) for name in runs}

    def times_longer(name, than):
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[than], strict=True))

    return GenerationFigures(
        preset=preset,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        dtype=config.dtype,
        layers=config.num_layers,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        tokens_per_second=rates["plain"],
        held_tokens_per_second=rates["held"],
        hold_cost=times_longer("held", "plain") - 1,
        peak_memory_bytes=peak,
        baselines={
            name: {
                "what": what[name],
                "tokens_per_second": rates[name],
                "speedup": times_longer(name, "plain"),
                "held_speedup": times_longer(name, "held"),
            }
            for name in runs.keys() - {"plain", "held"}
        },
    )


def _in_turn(runs: dict[str, Callable], rounds: int, say) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    seconds = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        taken = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        say(f"round {number + 1} of {rounds}: {taken}")
    return seconds


def measure(
    preset: str,
    *,
    against: tuple[str, ...] = (),
    layers: int = 0,
    neurons: int = 0,
    rounds: int = 5,
    screen: int = 0,
    memory_gb: float | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Figures:
    """Runs the engine, the products and the baselines.

    Args:
        preset: one of `PRESETS`.
        against: any of `BASELINES`; they need torch, and run in float32 on a CPU.
        layers: blocks of the model; 0 for the preset's.
        neurons: how many neurons, spread evenly over all; 0 for all.
        rounds: runs of the engine after the first, which compiles.
        screen: how many of the strongest neurons the screened mode looks for; 0 not to time it.
        memory_gb: as in `effects.scan`.
        say: where progress is told.

    Raises:
        InputError: what is asked cannot be compared.
    """
    chosen_preset = PRESETS[preset]
    like = jax.default_backend() == "cpu" and chosen_preset.matmul_precision == "float32"
    if against and not like:
        raise InputError(
            "--against: the baselines are timed in float32 on a CPU, the engine here in "
            f"{chosen_preset.matmul_precision} on {jax.devices()[0].device_kind}: no comparison"
        )
    if screen and neurons:
        raise InputError("--screen looks at all neurons: leave out --neurons")
    config = chosen_preset.config
    if layers:
        config = dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)
    chosen = spread(config, neurons)
    say(f"{preset}: making {config.num_layers} layers of random weights")
    decoder = presets.random_decoder(config)
    pair = presets.random_pair(config, chosen_preset.tokens)
    engine = _Engine(decoder, pair, chosen, chosen_preset.matmul_precision, memory.free(memory_gb))
    products = _Products(config, engine.batch, chosen_preset.matmul_precision)
    say(f"first run of {int(chosen.sum()):,} neurons by both estimands, with compilation")
    first = engine.seconds()
    products.rate()
    seconds, rates, fractions = [], [], []
    before = products.rate()
    for number in range(rounds):
        seconds.append(engine.seconds())
        after = products.rate()
        rates.append((before + after) / 2)
        fractions.append(engine.product_operations / seconds[-1] / rates[-1])
        before = after
        say(
            f"round {number + 1} of {rounds}: {seconds[-1]:.2f} s an estimand, "
            f"{fractions[-1]:.3f} of {rates[-1] / 1e9:.0f} billion operations a second"
        )
    median = statistics.median(seconds)
    figures = Figures(
        preset=preset,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        dtype=chosen_preset.matmul_precision,
        layers=config.num_layers,
        neurons=int(chosen.sum()),
        batch=engine.batch,
        compile_seconds=2 * (first - median),
        seconds=median,
        neurons_per_second=int(chosen.sum()) / median,
        flops=engine.operations,
        product_flops=engine.product_operations,
        matmul_flops_per_second=statistics.median(rates),
        matmul_fraction=statistics.median(fractions),
        peak_memory_bytes=_peak_memory(),
    )
    if screen:
        figures = _with_screen(figures, decoder, pair, engine, screen, say)
    return _with_baselines(figures, decoder, pair, chosen, engine, against, say)


def spread(config: DecoderConfig, neurons: int) -> np.ndarray:
    """A mask [layer, neuron] of that many neurons, spread evenly over all; 0 for all."""
    count = config.num_layers * config.intermediate_size
    if neurons > count:
        raise InputError(f"--neurons={neurons}: the model has {count}")
    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count, neurons or count, endpoint=False).astype(int)] = True
    return chosen.reshape(config.num_layers, config.intermediate_size)


class _Engine:
    """The engine's scan of a pair.

    Attributes:
        batch: rows of a batch.
        operations: what one estimand needs.
        product_operations: of these, what products with the blocks' weights need.
    """

    def __init__(self, decoder, pair, chosen, matmul_precision, memory_left):
        self.question = question.Question(metrics.LogitDifference())
        self.scan = lambda chosen=chosen: scan.scan_pair(
            *(decoder, pair, self.question, ["neuron"]),
            chosen={"neuron": chosen},
            matmul_precision=matmul_precision,
            memory=memory_left,
        )
        config, (term,) = decoder.config, self.question.metric.terms(pair)
        (work,) = plan.plan(
            config, pair, term, self.question, ["neuron"], False, {"neuron": chosen}
        )
        dtype = decoder.embedding[...].dtype
        _, self.batch = cost.batching(config, dtype, work, term, memory_left, jax.default_backend())
        blocks_after = np.sum(config.num_layers - 1 - work.units.layers)
        self.operations = cost.operations(
            config, pair, self.question, ["neuron"], {"neuron": chosen}
        )
        self.operations /= 2
        self.product_operations = float(blocks_after) * cost.block_operations(config)

    def seconds(self) -> float:
        """Of one estimand: half of what both take."""
        start = time.perf_counter()
        self.scan()
        return (time.perf_counter() - start) / 2


class _Products:
    """The products of a block and nothing between them, in the engine's shapes and types."""

    def __init__(self, config: DecoderConfig, rows: int, matmul_precision: str):
        dtype = propagate.MATMUL_PRECISIONS[matmul_precision] or jnp.float32
        width, hidden = config.hidden_size, config.intermediate_size
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = ((width, heads), (width, kv), (width, kv), (heads, width))
        shapes += ((width, hidden), (width, hidden), (hidden, width))
        keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 3))
        self.weights = [jax.random.normal(next(keys), shape, dtype) for shape in shapes]
        sizes = sorted({width, heads, hidden})
        self.inputs = {n: jax.random.normal(next(keys), (rows, n), dtype) for n in sizes}
        self.operations = rows * cost.block_operations(config)
        # An accelerator is kept busy by what is under way; a CPU would run products side by side.
        self.under_way = 1 if jax.default_backend() == "cpu" else 16

    def rate(self) -> float:
        """Floating-point operations a second."""
        self._multiply_all()
        start, done = time.perf_counter(), 0
        while (gone := time.perf_counter() - start) < _PRODUCT_SECONDS:
            self._multiply_all()
            done += self.under_way
        return done * self.operations / gone

    def _multiply_all(self) -> None:
        """Each weight with the input of its size, as often as may be under way."""
        for weight in self.weights * self.under_way:
            found = _multiply(self.inputs[weight.shape[0]], weight)
            if self.under_way == 1:
                found.block_until_ready()
        found.block_until_ready()


@jax.jit
def _multiply(left, right):
    return jnp.matmul(left, right, precision="float32", preferred_element_type=jnp.float32)


def _peak_memory() -> int:
    """Bytes: of the device where it counts them, of the process otherwise."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _with_screen(figures: Figures, decoder, pair, engine, top: int, say) -> Figures:
    """The screened mode's time, in rounds with the full scan."""

    def screened():
        start = time.perf_counter()
        nie, tie = screening.scores(decoder, pair, engine.question)
        strength = np.maximum(np.abs(nie), np.abs(tie))
        selection = screening.select(strength, top, screening.AUDIT, seed=0)
        found = engine.scan(selection.computed)
        exact = np.maximum(np.abs(found.nie["neuron"]), np.abs(found.tie["neuron"]))
        audit = audit_lib.missed(selection, exact, top)
        return time.perf_counter() - start, audit

    screened()  # compiles
    seconds, speedups = [], []
    for number in range(_BASELINE_ROUNDS):
        full = 2 * engine.seconds()
        taken, audit = screened()
        seconds.append(taken)
        speedups.append(full / taken)
        say(
            f"round {number + 1} of {_BASELINE_ROUNDS}: screened for the {top} strongest, "
            f"{taken:.2f} s; in full {full:.2f} s; at most {audit.bound} missed"
        )
    return dataclasses.replace(
        figures,
        screen_seconds=statistics.median(seconds),
        speedup_screen=statistics.median(speedups),
    )


def _with_baselines(figures: Figures, decoder, pair, chosen, engine, against, say) -> Figures:
    """The baselines' rates, and how many times faster the engine is in the same rounds."""
    if not against:
        return figures
    from jaxmed.validation import baselines  # torch, which only a comparison needs

    layers, neurons = np.nonzero(chosen)
    reads = (pair.prompt_ids, pair.counterfactual_ids, pair.harmful_ids[0], pair.safe_ids[0])
    as_installed = baselines.torch_model(decoder, onednn=False)
    timed = {}
    if "hooks" in against:
        what = "transformers with hooks, 64 rows a batch"
        timed["hooks"] = what, baselines.Hooks(as_installed, *reads), HOOKS_SAMPLE
    if "prefix" in against:
        what = "prefix-cached torch loop"
        onednn = baselines.torch_model(decoder, onednn=True)
        few = baselines.Prefix(as_installed, *reads, batch=64)
        many = baselines.Prefix(as_installed, *reads)
        fast = baselines.Prefix(onednn, *reads)
        timed["prefix"] = f"{what}, {many.batch} rows a batch", many, PREFIX_SAMPLE
        timed["prefix_64_rows"] = f"{what}, 64 rows a batch", few, PREFIX_SAMPLE
        timed["prefix_onednn"] = f"{what}, with oneDNN for MKL", fast, PREFIX_SAMPLE
    rates, speedups = ({name: [] for name in timed} for _ in range(2))
    for number in range(_BASELINE_ROUNDS):
        ours = len(layers) / engine.seconds()
        for name, (_, baseline, sample) in timed.items():
            picked = np.linspace(0, len(layers), min(sample, len(layers)), endpoint=False)
            picked = picked.astype(int)
            if not number:  # what is made once is not timed
                baseline.effects(layers[picked[:64]], neurons[picked[:64]])
            start = time.perf_counter()
            baseline.effects(layers[picked], neurons[picked])
            rates[name].append(len(picked) / (time.perf_counter() - start))
            speedups[name].append(ours / rates[name][-1])
            say(
                f"round {number + 1} of {_BASELINE_ROUNDS}: {name}, {len(picked)} neurons: "
                f"{rates[name][-1]:,.1f} a second (the engine: {ours:,.0f})"
            )
    found = {
        name: {
            "what": what,
            "neurons_per_second": statistics.median(rates[name]),
            "speedup": statistics.median(speedups[name]),
        }
        for name, (what, _, _) in timed.items()
    }
    speedup = {f"speedup_{name}": found[name]["speedup"] for name in against}
    return dataclasses.replace(figures, baselines=found, **speedup)
