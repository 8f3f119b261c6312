"""How fast the engine is: against the machine's own matrix products, and against other ways.

The engine scans every neuron of a model with random weights of a real shape, and between its runs
the machine multiplies matrices of the very shapes that the engine multiplies. The fraction of that
rate which the engine reaches is what is left for the reader of the figures to trust: it does not
depend on how busy or how fast the machine is.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool

from jaxmed.analysis import screening
from jaxmed.analysis.audit import Audit, missed
from jaxmed.behaviour import generation
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.pairs import Pair
from jaxmed.engine import cost, memory, plan, rates, scan
from jaxmed.question.effects import PairEffects
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from jaxmed.validation import kernels, presets, timing
from jaxmed.validation.kernels import Profile
from models import products
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold
from models.errors import InputError

BASELINES = ("hooks", "prefix")
GENERATION_BASELINES = ("transformers",)
# Types of a baseline's numbers: float32 with its products as they are or, on a GPU, in TF32 (11
# bits of each factor); and bfloat16 throughout.
BASELINE_TYPES = ("float32", "tf32", "bfloat16")
# Neurons whose effects are compared with those in float64.
ERROR_SAMPLE = 256
PROMPTS = 8  # that are answered together, where nothing else is asked
_BASELINE_ROUNDS = 3
_PRODUCT_SECONDS = 1.5  # for which products are timed before and after each run of the engine


@dataclasses.dataclass(frozen=True)
class BaselineSpeed:
    """How fast a baseline finds effects; medians over rounds in which the engine took its turn.

    Attributes:
        what: which it is, for people.
        neurons_per_second: neurons that it patches alone, a second.
        speedup: how many times more the engine does.
        error: norm of the errors of NIE, by the effects' norm, against the engine in float64.
    """

    what: str
    neurons_per_second: float
    speedup: float
    error: float


@dataclasses.dataclass(frozen=True)
class BaselineGeneration:
    """How fast a baseline generates; medians over rounds in which jaxmed took its turn.

    Attributes:
        what: which it is, for people.
        tokens_per_second: generated tokens of all rows, a second.
        speedup, held_speedup: how many times longer it takes than jaxmed, plain and with a hold.
    """

    what: str
    tokens_per_second: float
    speedup: float
    held_speedup: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured; times are medians over rounds.

    Attributes:
        preset, device, dtype: what ran on what; dtype is that of the weights.
        precision: of the engine's products.
        layers: blocks of the model.
        neurons: neurons that were scanned.
        batch: rows that go through a block together.
        error: norm of the errors of both estimands of `ERROR_SAMPLE` neurons, by the effects' norm,
            against the engine in float64; None where it was not asked for.
        compile_seconds: what the first run took longer than the others.
        seconds: of one estimand, NIE or TIE: half of what both take together, captures included.
        neurons_per_second: neurons / seconds.
        flops: floating-point operations that the algorithm needs for one estimand: in the blocks
            after each neuron, at the span's positions, and in the metric.
        product_flops: of these, the products with the blocks' weights.
        matmul_flops_per_second: the machine's rate for products of the engine's shapes, weighted
            by the engine's operations and measured between its runs.
        matmul_fraction: product_flops / seconds as a fraction of that rate; median over rounds.
        peak_memory_bytes: largest resident size of the process so far; on an accelerator, the most
            of its memory.
        speedup_hooks: how many times more neurons per second than transformers with hooks.
        speedup_prefix: than the prefix-cached loop, with torch as it is installed.
        baselines: of all that were timed, by name.
        screen_seconds: of both estimands of a pair in screened mode, scores and audit included.
        speedup_screen: how many times faster that is than both estimands in full.
        profile: where the time of one more run goes; None where it was not asked for.
    """

    preset: str
    device: str
    dtype: str
    precision: str
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
    error: float | None = None
    speedup_hooks: float | None = None
    speedup_prefix: float | None = None
    baselines: dict[str, BaselineSpeed] = dataclasses.field(default_factory=dict)
    screen_seconds: float | None = None
    speedup_screen: float | None = None
    profile: Profile | None = None


@dataclasses.dataclass(frozen=True)
class GenerationFigures:
    """How fast text is generated; rates are medians over rounds in which all took their turn.

    Attributes:
        preset, device, dtype: what ran on what; dtype is that of the weights.
        precision: of jaxmed's products.
        layers: blocks of the model.
        batch, prompt_tokens, new_tokens: prompts of a batch, tokens of each, and of each response.
        tokens_per_second: generated tokens of all rows, the prompts' run included.
        held_tokens_per_second: the same with a hold on every neuron of every layer.
        hold_cost: how much longer that takes, as a share; median over rounds.
        peak_memory_bytes: as in `Figures`, before the baselines.
        baselines: of all that were timed, by name.
        profile: where the time of one more run without a hold goes; None where it was not asked
            for.
    """

    preset: str
    device: str
    dtype: str
    precision: str
    layers: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    held_tokens_per_second: float
    hold_cost: float
    peak_memory_bytes: int
    baselines: dict[str, BaselineGeneration] = dataclasses.field(default_factory=dict)
    profile: Profile | None = None


def measure_generation(
    preset: str,
    *,
    say: Callable[[str], None],
    dtype: str = "",
    precision: str = rates.AUTO,
    against: tuple[str, ...] = (),
    against_types: tuple[str, ...] = BASELINE_TYPES[:1],
    layers: int = 0,
    rounds: int = 5,
    batch: int = PROMPTS,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    memory_gb: float | None = None,
    profile: pathlib.Path | None = None,
) -> GenerationFigures:
    """Times greedy generation, plain and with a hold, and the baselines' (no holds), in turn.

    Args:
        preset, dtype, against_types, layers, memory_gb, profile, say: as in `measure`.
        precision: one of `products.EXACT`, for values are multiplied in no others; or `rates.AUTO`.
        against: any of `GENERATION_BASELINES`; as in `measure`.
        rounds: runs of each after the first, which compiles.
        batch, prompt_tokens, new_tokens: prompts, and the lengths of all prompts and responses.

    Raises:
        InputError: what is asked cannot be compared.
    """
    if precision not in (rates.AUTO, *products.EXACT):
        raise InputError(
            f"matmul_precision={precision}: generation multiplies values, as exactly as in "
            f"float32: take {' or '.join(products.EXACT)}"
        )
    device = _torch_device(against_types) if against else ""
    config = presets.shape(preset, layers=layers, dtype=dtype)
    decoder = presets.decoder_at(config, precision, say, rows=batch)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt_tokens))
    damped = np.linspace(0.5, 1, config.intermediate_size, dtype=np.float32)
    hold = Hold.affine("neuron", damped[None], np.zeros((1, 1), np.float32))
    memory_left = memory.free(memory_gb)

    def ours(*holds: Hold) -> None:
        generation.generate(
            decoder,
            prompts.tolist(),
            stop=(),
            sampling=Sampling(new_tokens),
            holds=holds,
            batch_size=batch,
            memory=memory_left,
        )

    what = {"plain": "plain", "held": "with a hold on every neuron"}
    runs: dict[str, Callable[[], object]] = {"plain": ours, "held": lambda: ours(hold)}
    for run in runs.values():
        run()
    peak = timing.peak_memory()
    if against:
        from jaxmed.validation import baselines  # torch, which only a comparison needs

        for number_type in against_types:
            ways = {_named("transformers", number_type): False}
            if (device, number_type) == ("cpu", "float32"):
                ways["transformers_onednn"] = True
            for name, onednn in ways.items():
                model = baselines.torch_model(decoder, number_type, device, onednn)
                what[name] = f"{baselines.Generate.what}, {number_type}"
                what[name] += ", with oneDNN for MKL" if onednn else ""
                runs[name] = baselines.Generate(
                    model, prompts, new_tokens, tf32=number_type == "tf32"
                )
                runs[name]()
    seconds = timing.in_turn(runs, rounds, say)
    speeds = {name: batch * new_tokens / statistics.median(seconds[name]) for name in runs}

    def times_longer(name: str, than: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[than], strict=True))

    return GenerationFigures(
        preset=preset,
        device=timing.device(),
        dtype=config.dtype,
        precision=decoder.products.precision,
        layers=config.num_layers,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        tokens_per_second=speeds["plain"],
        held_tokens_per_second=speeds["held"],
        hold_cost=times_longer("held", "plain") - 1,
        peak_memory_bytes=peak,
        baselines={
            name: BaselineGeneration(
                what=what[name],
                tokens_per_second=speeds[name],
                speedup=times_longer(name, "plain"),
                held_speedup=times_longer(name, "held"),
            )
            for name in runs
            if name not in ("plain", "held")
        },
        profile=kernels.profiled("plain generation", ours, profile) if profile else None,
    )


def measure(
    preset: str,
    *,
    say: Callable[[str], None],
    dtype: str = "",
    precision: str = rates.AUTO,
    errors: bool = False,
    against: tuple[str, ...] = (),
    against_types: tuple[str, ...] = BASELINE_TYPES[:1],
    layers: int = 0,
    neurons: int = 0,
    rounds: int = 5,
    screen: int = 0,
    memory_gb: float | None = None,
    profile: pathlib.Path | None = None,
) -> Figures:
    """Runs the engine, the products and the baselines.

    Args:
        preset: one of `presets.PRESETS`.
        say: where progress is told.
        dtype: of the weights; "" for the preset's.
        precision: of the engine's products, one of `products.PRECISIONS`, or `rates.AUTO`.
        errors: compare effects with those in float64, which takes 8 bytes a weight.
        against: any of `BASELINES`; they need torch, and run on the device that JAX has.
        against_types: types of their numbers, any of `BASELINE_TYPES`.
        layers: blocks of the model; 0 for the preset's.
        neurons: how many neurons, spread evenly over all; 0 for all.
        rounds: runs of the engine after the first, which compiles.
        screen: how many of the strongest neurons the screened mode looks for; 0 not to time it.
        memory_gb: memory that the process may take on its device, in GiB; most of it by default.
        profile: folder for the trace of one more run, and the table of its kernels; None for none.

    Raises:
        InputError: what is asked cannot be compared.
    """
    device = _torch_device(against_types) if against else ""
    if screen and neurons:
        raise InputError(f"screen={screen} looks at all neurons: leave out neurons={neurons}")
    config = presets.shape(preset, layers=layers, dtype=dtype)
    chosen = spread(config, neurons)
    decoder = presets.decoder_at(config, precision, say)
    pair = presets.random_pair(config, presets.PRESETS[preset].tokens)
    engine = _Engine(
        decoder=decoder,
        pair=pair,
        chosen=chosen,
        memory=memory.free(memory_gb),
    )
    alone = _Products(decoder, engine.batch)
    say(f"first run of {int(chosen.sum()):,} neurons by both estimands, with compilation")
    first = engine.seconds()
    alone.rate()
    seconds, machine, fractions = [], [], []
    before = alone.rate()
    for number in range(rounds):
        seconds.append(engine.seconds())
        after = alone.rate()
        machine.append((before + after) / 2)
        fractions.append(engine.product_operations / seconds[-1] / machine[-1])
        before = after
        say(
            f"round {number + 1} of {rounds}: {seconds[-1]:.2f} s an estimand, "
            f"{fractions[-1]:.3f} of {machine[-1] / 1e9:.0f} billion operations a second"
        )
    median = statistics.median(seconds)
    figures = Figures(
        preset=preset,
        device=timing.device(),
        dtype=config.dtype,
        precision=decoder.products.precision,
        layers=config.num_layers,
        neurons=int(chosen.sum()),
        batch=engine.batch,
        compile_seconds=2 * (first - median),
        seconds=median,
        neurons_per_second=int(chosen.sum()) / median,
        flops=engine.operations,
        product_flops=engine.product_operations,
        matmul_flops_per_second=statistics.median(machine),
        matmul_fraction=statistics.median(fractions),
        peak_memory_bytes=timing.peak_memory(),
        profile=kernels.profiled("both estimands of a pair", engine.seconds, profile)
        if profile
        else None,
    )
    if errors or against:
        figures = dataclasses.replace(figures, error=_error(engine))
    if screen:
        figures = _with_screen(figures, engine, screen, say)
    if against:
        timed = _baselines(engine, against, device, against_types)
        figures = _with_baselines(figures, engine, timed, say)
    return figures


def spread(config: DecoderConfig, neurons: int) -> Bool[np.ndarray, "L I"]:
    """A mask of that many neurons, spread evenly over all; 0 for all.

    Raises:
        InputError: there are not so many.
    """
    count = config.num_layers * config.intermediate_size
    if neurons > count:
        raise InputError(f"neurons={neurons}: the model has {count}")
    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count, neurons or count, endpoint=False).astype(int)] = True
    return chosen.reshape(config.num_layers, config.intermediate_size)


def _error(engine: "_Engine") -> float:
    """Of both estimands of some of the neurons, against the engine in float64."""
    some = _some(engine.chosen, ERROR_SAMPLE)
    found, exact = engine.scan(some), engine.exact(some)
    pairs = [(found.nie, exact.nie), (found.tie, exact.tie)]
    got, want = (np.concatenate([side[at]["neuron"][some] for side in pairs]) for at in (0, 1))
    return _relative_error(got, want)


def _some(chosen: Bool[np.ndarray, "L I"], count: int) -> Bool[np.ndarray, "L I"]:
    """So many of the chosen neurons, evenly spread."""
    places = np.flatnonzero(chosen)
    picked = np.linspace(0, len(places), min(count, len(places)), endpoint=False).astype(int)
    some = np.zeros(chosen.size, bool)
    some[places[picked]] = True
    return some.reshape(chosen.shape)


def _relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the errors by the norm of what is exact."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class _Engine:
    """The engine's scan of a pair.

    Attributes:
        decoder, pair, question, chosen: what is scanned; chosen is a mask [layer, neuron].
        batch: rows of a batch.
        operations: what one estimand needs.
        product_operations: of these, what products with the blocks' weights need.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        pair: Pair,
        chosen: Bool[np.ndarray, "L I"],
        memory: int,
    ):
        self.decoder, self.pair, self.chosen = decoder, pair, chosen
        self.question = Question(LogitDifference())
        self._memory = memory
        config, (term,) = decoder.config, cost.runs(decoder.config, pair, self.question)
        (work,) = plan.plan(
            config, pair, term, self.question, ["neuron"], False, {"neuron": chosen}
        )
        sizes = cost.batching(
            config, decoder.dtype, work, term, memory, jax.default_backend(), runs=2
        )
        self.batch = sizes.runs * sizes.rows
        both = cost.operations(config, pair, self.question, ["neuron"], {"neuron": chosen})
        self.operations = both / 2
        blocks_after = np.sum(config.num_layers - 1 - work.units.layers)
        self.product_operations = float(blocks_after) * cost.block_operations(config)

    def scan(self, chosen: Bool[np.ndarray, "L I"]) -> PairEffects:
        """NIE and TIE of the chosen neurons."""
        return scan.scan_pair(
            self.decoder,
            self.pair,
            self.question,
            ["neuron"],
            chosen={"neuron": chosen},
            memory=self._memory,
        )

    def exact(self, chosen: Bool[np.ndarray, "L I"]) -> PairEffects:
        """NIE and TIE of the chosen neurons in float64."""
        with jax.enable_x64(True):
            decoder = presets.in_float64(self.decoder)
            return scan.scan_pair(
                decoder, self.pair, self.question, ["neuron"], chosen={"neuron": chosen}
            )

    def seconds(self) -> float:
        """Of one estimand: half of what both take."""
        return timing.seconds(lambda: self.scan(self.chosen)) / 2


class _Products:
    """The products of a block and nothing between them, in the engine's shapes and types."""

    def __init__(self, decoder: Decoder, rows: int):
        config, self._how = decoder.config, decoder.products
        width, hidden = config.hidden_size, config.intermediate_size
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = ((width, heads), (width, kv), (width, kv), (heads, width))
        shapes += ((width, hidden), (width, hidden), (hidden, width))
        keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 3))
        number = decoder.compute_dtype
        self.weights = [
            products.ready(
                products.stored(jax.random.normal(next(keys), shape, decoder.dtype)),
                self._how,
                number,
            )
            for shape in shapes
        ]
        sizes = sorted({width, heads, hidden})
        self.inputs = {n: jax.random.normal(next(keys), (rows, n), number) for n in sizes}
        self.operations = rows * cost.block_operations(config)
        # An accelerator is kept busy by what is under way; a CPU would run products side by side.
        self.under_way = 1 if jax.default_backend() == "cpu" else 16

    def rate(self) -> float:
        """Floating-point operations a second."""
        self.multiply_all()
        start, done = timing.clock(), 0
        while (gone := timing.clock() - start) < _PRODUCT_SECONDS:
            self.multiply_all()
            done += self.under_way
        return done * self.operations / gone

    def multiply_all(self) -> None:
        """Each weight with the input of its size, as often as may be under way."""
        under_way = []
        for weight in self.weights * self.under_way:
            x = self.inputs[weight.shape[-2]]
            under_way = [products.multiplied(x, weight, self._how)]
            if self.under_way == 1:
                jax.block_until_ready(under_way)
        jax.block_until_ready(under_way)


def _with_screen(
    figures: Figures, engine: _Engine, top: int, say: Callable[[str], None]
) -> Figures:
    """The screened mode's time, in rounds with the full scan."""

    def screened() -> Audit:
        nie, tie = screening.scores(engine.decoder, engine.pair, engine.question)
        strength = np.maximum(np.abs(nie), np.abs(tie))
        selection = screening.select(strength, top, screening.AUDIT, seed=0)
        found = engine.scan(selection.computed)
        exact = np.maximum(np.abs(found.nie["neuron"]), np.abs(found.tie["neuron"]))
        return missed(selection, exact, top)

    audit = screened()  # compiles; every round finds the same
    seconds, speedups = [], []
    for number in range(_BASELINE_ROUNDS):
        full = 2 * engine.seconds()
        seconds.append(timing.seconds(screened))
        speedups.append(full / seconds[-1])
        say(
            f"round {number + 1} of {_BASELINE_ROUNDS}: screened for the {top} strongest, "
            f"{seconds[-1]:.2f} s; in full {full:.2f} s; at most {audit.bound} missed"
        )
    return dataclasses.replace(
        figures,
        screen_seconds=statistics.median(seconds),
        speedup_screen=statistics.median(speedups),
    )


@runtime_checkable
class _FindsEffects(Protocol):
    """What a baseline does."""

    def effects(self, layers: np.ndarray, neurons: np.ndarray) -> np.ndarray:
        """NIE of the neurons with these layers and indices, [U]."""
        ...


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A baseline that is timed.

    Attributes:
        what: which it is, for people.
        baseline: finds the effects.
        sample: the most neurons that it is timed on.
    """

    what: str
    baseline: _FindsEffects
    sample: int


@dataclasses.dataclass(frozen=True)
class _Batches:
    """How the baselines run on a device.

    Attributes:
        hooks: rows of a batch of transformers with hooks.
        prefix: of the prefix-cached loop; the first is the number that its plain name stands for.
        hooks_sample, prefix_sample: neurons that they are timed on at most, spread evenly.
    """

    hooks: int
    prefix: tuple[int, ...]
    hooks_sample: int
    prefix_sample: int


# By torch's name of the device.
_BATCHES = {
    "cpu": _Batches(hooks=64, prefix=(512, 64, 2048), hooks_sample=256, prefix_sample=9216),
    "cuda": _Batches(hooks=512, prefix=(16384,), hooks_sample=1024, prefix_sample=131072),
}


def _torch_device(types: tuple[str, ...]) -> str:
    """Torch's name of the device that JAX has.

    Raises:
        InputError: torch does not see it, or it has not all of these types.
    """
    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    if backend == "cpu":
        if "tf32" in types:
            raise InputError("against_types=tf32: a CPU has no such products; leave it out")
        return "cpu"
    from jaxmed.validation import baselines  # torch, which only a comparison needs

    if backend == "gpu" and baselines.sees_gpu():
        return "cuda"
    raise InputError(
        f"against: jaxmed runs on {kind} here, and torch sees no such GPU: no comparison; on a GPU "
        "install a torch that is built for it, or set JAX_PLATFORMS=cpu to compare on the CPU"
    )


def _named(name: str, number_type: str) -> str:
    """What a baseline is called among the figures; by its name alone in float32."""
    return name if number_type == "float32" else f"{name}_{number_type}"


def _baselines(
    engine: _Engine, against: tuple[str, ...], device: str, types: tuple[str, ...]
) -> dict[str, _Timed]:
    """Those that are asked for, made of the engine's model and pair."""
    from jaxmed.validation import baselines  # torch, which only a comparison needs

    reads = {
        "base_ids": engine.pair.prompt_ids,
        "source_ids": engine.pair.counterfactual_ids,
        "harmful_token": engine.pair.harmful_ids[0],
        "safe_token": engine.pair.safe_ids[0],
    }
    batches, timed = _BATCHES[device], {}
    for number_type in types:
        model = baselines.torch_model(engine.decoder, number_type, device)
        ways = []
        if "hooks" in against:
            ways.append(("hooks", baselines.Hooks, model, batches.hooks, number_type))
        if "prefix" in against:
            first, *others = batches.prefix
            ways.append(("prefix", baselines.Prefix, model, first, number_type))
            for rows in others:
                ways.append((f"prefix_{rows}_rows", baselines.Prefix, model, rows, number_type))
            if (device, number_type) == ("cpu", "float32"):
                onednn = baselines.torch_model(engine.decoder, onednn=True)
                how = "float32, with oneDNN for MKL"
                ways.append(("prefix_onednn", baselines.Prefix, onednn, first, how))
                how = "bfloat16 (autocast)"
                ways.append(("prefix_autocast", baselines.RoundedPrefix, model, first, how))
        for name, kind, of, rows, how in ways:
            timed[_named(name, number_type)] = _Timed(
                what=f"{kind.what}, {rows:,} rows a batch, {how}",
                baseline=kind(of, **reads, batch=rows, tf32=number_type == "tf32"),
                sample=batches.hooks_sample if kind is baselines.Hooks else batches.prefix_sample,
            )
    return timed


def _with_baselines(
    figures: Figures, engine: _Engine, timed: dict[str, _Timed], say: Callable[[str], None]
) -> Figures:
    """The baselines' rates and errors, and how many times faster the engine is in the same
    rounds."""
    layers, neurons = np.nonzero(engine.chosen)
    some = _some(engine.chosen, ERROR_SAMPLE)
    exact = engine.exact(some).nie["neuron"][some]
    speeds, speedups = ({name: [] for name in timed} for _ in range(2))
    for number in range(_BASELINE_ROUNDS):
        ours = len(layers) / engine.seconds()
        for name, of in timed.items():
            picked = np.linspace(0, len(layers), min(of.sample, len(layers)), endpoint=False)
            picked = picked.astype(int)
            if not number:  # what is made once is not timed
                of.baseline.effects(layers[picked[:64]], neurons[picked[:64]])
            seconds = timing.seconds(
                functools.partial(of.baseline.effects, layers[picked], neurons[picked])
            )
            speeds[name].append(len(picked) / seconds)
            speedups[name].append(ours / speeds[name][-1])
            say(
                f"round {number + 1} of {_BASELINE_ROUNDS}: {name}, {len(picked)} neurons: "
                f"{speeds[name][-1]:,.1f} a second (the engine: {ours:,.0f})"
            )
    found = {
        name: BaselineSpeed(
            what=of.what,
            neurons_per_second=statistics.median(speeds[name]),
            speedup=statistics.median(speedups[name]),
            error=_relative_error(of.baseline.effects(*np.nonzero(some)), exact),
        )
        for name, of in timed.items()
    }
    return dataclasses.replace(
        figures,
        baselines=found,
        speedup_hooks=found["hooks"].speedup if "hooks" in found else None,
        speedup_prefix=found["prefix"].speedup if "prefix" in found else None,
    )
