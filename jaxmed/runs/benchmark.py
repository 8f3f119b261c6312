"""How fast the engine is on this machine, against its matrix products and against other ways; how
exact; or what a compiler for TPUs expects of it."""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import models
from jaxmed.data import pairs
from jaxmed.engine import rates
from jaxmed.question.sites import GRANULARITIES
from jaxmed.report import benchmark as tables
from jaxmed.runs import loading, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.settings import setting
from jaxmed.validation import benchmark, chips, lists, numerical_error, presets, truth
from models import checkpoint, organisms, products
from models.config import DTYPES
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, of which model, against what."""

    preset: str = setting(
        help="Shape of the model; its weights are random.",
        default="12x768",
        choices=presets.PRESETS,
    )
    dtype: str = setting(
        help="Type of the weights; the preset's by default.", default="", choices=("", *DTYPES)
    )
    matmul_precision: tuple[str, ...] = setting(
        help="How differences are multiplied by weights: any of "
        f"{', '.join(products.PRECISIONS)}, measured one after another, or auto, the faster of "
        "float32 and split3 on this machine; with --compile_for, all; with --generate, how values "
        "are: float32, split3 or auto.",
        default=(rates.AUTO,),
        choices=(rates.AUTO, *products.PRECISIONS),
        commas=True,
    )
    errors: bool = setting(
        help="Also the error of the effects against float64, which takes 8 bytes a weight.",
        default=False,
    )
    against: tuple[str, ...] = setting(
        help="Any of hooks (transformers with forward hooks) and prefix (a torch loop that caches "
        "the prefix and starts at the patched layer), or transformers with --generate; on the "
        "device that JAX has, once beside the first precision. They need torch (the parity extra).",
        default=(),
        commas=True,
    )
    against_types: tuple[str, ...] = setting(
        help="Types in which --against runs: any of float32, tf32 (on a GPU alone) and bfloat16. "
        "In float32 on a CPU prefix and transformers run with oneDNN for MKL as well, and prefix "
        "by torch's autocast.",
        default=("float32",),
        choices=benchmark.BASELINE_TYPES,
        commas=True,
        needs="against",
    )
    json: str | None = setting(
        help="File for the figures, as JSON: a list with an object for each precision, or for each "
        "row of --accuracy.",
        default=None,
        path=True,
    )
    profile: str = setting(
        help="Folder: one more run is traced by JAX's profiler, a table says which kernels its "
        "time goes to, and how long the device is idle; the folder gets the trace (for xprof or "
        "TensorBoard) and kernels.csv, for each precision and list.",
        default="",
        path=True,
    )
    layers: int = setting(help="Blocks of the model; 0 for the preset's.", default=0, least=0)
    neurons: int = setting(
        help="Neurons to scan, spread evenly over all; 0 for all.", default=0, least=0
    )
    rounds: int = setting(help="Runs after the first; medians are told.", default=5, least=1)
    screen: int = setting(
        help="Also time the screened mode for this many strongest neurons; 0 not to.",
        default=0,
        least=0,
    )
    accuracy: bool = setting(
        help="Instead of speed: errors of single-neuron effects against float64, of a random and "
        "of a trained model; with --against=hooks also those of transformers, which subtracts two "
        "runs.",
        default=False,
    )
    lists: bool = setting(
        help="Instead of neurons: seconds that a pair's layers, modules and heads take at "
        "positions last and prompt, and its tokens.",
        default=False,
    )
    generate: bool = setting(
        help="Instead of effects: tokens a second of greedy generation, plain and with a hold on "
        "every neuron; with --against=transformers also those of its generate.",
        default=False,
    )
    organism: str = setting(
        help="--accuracy: folder of the trained model, trained if it is not there; empty for the "
        "random model alone.",
        default="out/organisms/late-mlp-0",
        path=True,
    )
    memory_gb: float | None = setting(
        help="Memory that the process may take on its device, in GiB; most of what is free by "
        "default.",
        default=None,
        least=1e-3,
    )
    compile_for: tuple[str, ...] = setting(
        help="Instead of speed: compiles all programs for one chip of each of these topologies, "
        "as v5e:2x2,v6e:2x4, and tells the cycles that the compiler expects, the memory, and what "
        "the chips of --mesh exchange. It takes no TPU, but the tpu extra.",
        default=(),
        commas=True,
    )
    mesh: str = setting(
        help="--compile_for: of how many chips it is one, as 8x1, laid out as launch.mediate has "
        "it.",
        default="1x1",
        needs="compile_for",
    )
    model: str | None = setting(
        help="Folder of a checkpoint whose config.json gives the shape, for --preset.",
        default=None,
        needs="compile_for",
        path=True,
    )
    only_neurons: bool = setting(
        help="Only the programs of a scan of neurons, which the last table is about.",
        default=False,
        needs="compile_for",
    )
    rows: int = setting(
        help="Rows of a batch: with --compile_for those of all chips of --mesh, 0 for as many as "
        f"a run takes there; with --generate the prompts, 0 for {benchmark.PROMPTS}.",
        default=0,
        least=0,
    )


_PROMPT = 64  # tokens of a prompt, where no preset says how many
# Settings that say nothing to a mode.
_IDLE = {
    "accuracy": (
        *("lists", "generate", "compile_for", "dtype", "matmul_precision", "errors", "preset"),
        *("screen", "layers", "neurons", "rounds", "memory_gb", "against_types", "profile"),
    ),
    "lists": (*("generate", "compile_for", "against", "errors", "screen", "neurons", "organism"),),
    "generate": ("compile_for", "errors", "screen", "neurons", "organism"),
    "compile_for": (
        *("against", "dtype", "errors", "screen", "neurons", "rounds", "organism", "profile"),
    ),
}


def run(settings: BenchmarkSettings, say: Callable[[str], None] = sweep.tell) -> None:
    """Measures, says a table, and writes the file.

    Args:
        settings: what is asked.
        say: told the lines of the table, and where the file is.

    Raises:
        InputError: what is asked cannot be measured or compared.
    """
    check(settings)
    if settings.accuracy:
        measured, lines = _accuracy(settings)
    elif settings.lists:
        measured, lines = _in_each_precision(settings, _lists)
    elif settings.generate:
        measured, lines = _in_each_precision(settings, _generation)
    elif settings.compile_for:
        measured, lines = _compilation(settings)
    else:
        measured, lines = _in_each_precision(settings, _speed)
    for line in lines:
        say(line)
    if settings.json:
        pathlib.Path(settings.json).write_text(json.dumps(measured, indent=2) + "\n")
        say(f"Written to {settings.json}")


def check(settings: BenchmarkSettings) -> None:
    """Raises `InputError` where settings contradict each other, or the file cannot be written."""
    settings_lib.check(settings)
    known = benchmark.GENERATION_BASELINES if settings.generate else benchmark.BASELINES
    if unknown := sorted(set(settings.against) - set(known)):
        raise InputError(f"--against={','.join(unknown)}: not one of {', '.join(known)}")
    for mode, others in _IDLE.items():
        idle = [name for name in others if settings_lib.given(settings, name)]
        if getattr(settings, mode) and idle:
            raise InputError(f"--{idle[0]} says nothing to --{mode}")
    if settings.rows and not (settings.generate or settings.compile_for):
        raise InputError("--rows needs --generate or --compile_for=K")
    if settings.generate:
        exact = (rates.AUTO, *products.EXACT)
        settings_lib.check_choice(
            "--generate: --matmul_precision", settings.matmul_precision, exact
        )
    if settings.model and settings_lib.given(settings, "preset"):
        raise InputError("--preset says nothing to --model, whose config.json gives the shape")
    if settings.json and not os.access(pathlib.Path(settings.json).absolute().parent, os.W_OK):
        raise InputError(f"--json={settings.json}: its folder cannot be written")
    if settings.profile:
        _check_folder(settings.profile)
    if settings.against and importlib.util.find_spec("torch") is None:
        raise InputError("--against needs torch: pip install torch==2.13.0, or make parity")


def _check_folder(profile: str) -> None:
    try:
        pathlib.Path(profile).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--profile={profile} is no folder to write to: {error}") from None


def _profile(settings: BenchmarkSettings, precision: str) -> pathlib.Path | None:
    """Where the profiles in one precision go."""
    return pathlib.Path(settings.profile) / precision if settings.profile else None


def _accuracy(settings: BenchmarkSettings) -> tuple[list[dict], list[str]]:
    runs = "hooks" in settings.against
    random_decoder, random_pair = numerical_error.random_model()
    rows = numerical_error.measure("random", random_decoder, random_pair, runs=runs)
    if settings.organism:
        organism = organisms.build(settings.organism)
        decoder, tokenizer = models.load(organism.folder)
        pair = pairs.read(str(truth.pairs_file(organism, "unlock")), tokenizer)[0]
        rows += numerical_error.measure("trained", decoder, pair, runs=runs)
    return [dataclasses.asdict(row) for row in rows], tables.numerical_error_table(rows)


# Measures with products in one precision, against these baselines: the figures, and their table.
_Measure = Callable[[BenchmarkSettings, str, tuple[str, ...]], tuple[Any, list[str]]]


def _in_each_precision(
    settings: BenchmarkSettings, measure: _Measure
) -> tuple[list[dict], list[str]]:
    """The baselines, whose products are their own, are measured beside the first alone."""
    found, lines = [], []
    for number, precision in enumerate(settings.matmul_precision):
        figures, table = measure(settings, precision, () if number else settings.against)
        found.append(dataclasses.asdict(figures))
        lines += table
    return found, lines


def _lists(settings: BenchmarkSettings, precision: str, against: tuple[str, ...]):
    del against  # none has lists
    figures = lists.measure(
        settings.preset,
        say=sweep.say,
        dtype=settings.dtype,
        precision=precision,
        layers=settings.layers,
        rounds=settings.rounds,
        memory_gb=settings.memory_gb,
        profile=_profile(settings, precision),
    )
    return figures, tables.lists_table(figures)


def _generation(settings: BenchmarkSettings, precision: str, against: tuple[str, ...]):
    figures = benchmark.measure_generation(
        settings.preset,
        say=sweep.say,
        dtype=settings.dtype,
        precision=precision,
        against=against,
        against_types=settings.against_types,
        layers=settings.layers,
        rounds=settings.rounds,
        batch=settings.rows or benchmark.PROMPTS,
        memory_gb=settings.memory_gb,
        profile=_profile(settings, precision),
    )
    return figures, tables.generation_table(figures)


def _speed(settings: BenchmarkSettings, precision: str, against: tuple[str, ...]):
    figures = benchmark.measure(
        settings.preset,
        say=sweep.say,
        dtype=settings.dtype,
        precision=precision,
        errors=settings.errors,
        against=against,
        against_types=settings.against_types,
        layers=settings.layers,
        neurons=settings.neurons,
        rounds=settings.rounds,
        screen=settings.screen,
        memory_gb=settings.memory_gb,
        profile=_profile(settings, precision),
    )
    return figures, tables.table(figures)


def _compilation(settings: BenchmarkSettings) -> tuple[list[dict], list[str]]:
    if settings.model:
        folder = checkpoint.resolve(settings.model)
        name, config = settings.model, checkpoint.read_config(folder)
        tokens = _PROMPT
    else:
        preset = presets.PRESETS[settings.preset]
        name, config, tokens = settings.preset, preset.config, preset.tokens
    asked = chips.Asked(
        model=name,
        config=presets.with_layers(config, settings.layers),
        tokens=tokens,
        granularities=() if settings.only_neurons else GRANULARITIES,
        rows=settings.rows,
        memory_gb=settings.memory_gb,
        whole=not settings.only_neurons,
    )
    precisions = settings.matmul_precision
    if rates.AUTO in precisions:
        precisions = products.PRECISIONS
    figures = []
    for topology in settings.compile_for:
        chip = chips.chip(topology, loading.mesh_sizes(settings.mesh))
        compiler = chips.Compiler(chip, say=sweep.say)
        for precision in precisions:
            figures.append(chips.measure(asked, compiler, precision))
    return [dataclasses.asdict(each) for each in figures], tables.compiled_table(figures)
