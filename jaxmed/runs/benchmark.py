"""How fast the engine is on this machine, against its matrix products and against other ways; how
exact; or what a compiler for TPUs expects of it."""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable

import models
from jaxmed.data import pairs
from jaxmed.engine import rates
from jaxmed.question.sites import GRANULARITIES
from jaxmed.report import benchmark as tables
from jaxmed.runs import settings as settings_lib
from jaxmed.runs import sweep
from jaxmed.runs.settings import setting
from jaxmed.validation import benchmark, chips, numerical_error, presets, truth
from models import checkpoint, organisms
from models.config import DTYPES
from models.errors import InputError
from models.products import PRECISIONS


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
        help=f"How differences are multiplied by weights: any of {', '.join(PRECISIONS)}, measured "
        "one after another, or auto, the faster of float32 and split3 on this machine; with "
        "--compile_for, all.",
        default=(rates.AUTO,),
        choices=(rates.AUTO, *PRECISIONS),
        commas=True,
    )
    errors: bool = setting(
        help="Also the error of the effects against float64, which takes 8 bytes a weight.",
        default=False,
    )
    against: tuple[str, ...] = setting(
        help="Any of hooks (transformers with forward hooks, 64 rows a batch) and prefix (a torch "
        "loop that caches the prefix and starts at the patched layer, in float32 and in bfloat16), "
        "or transformers with --generate, in float32; all on a CPU, once beside the first "
        "precision. They need torch (the parity extra).",
        default=(),
        commas=True,
    )
    json: str | None = setting(
        help="File for the figures, as JSON: of speed, a list with an object for each precision.",
        default=None,
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
    generate: bool = setting(
        help="Instead of effects: tokens a second of greedy generation, plain and with a hold on "
        "every neuron; with --against=transformers also those of its generate.",
        default=False,
    )
    organism: str = setting(
        help="--accuracy: folder of the trained model; trained if it is not there.",
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
        "as v5e:2x2,v6e:2x4, and tells the cycles that the compiler expects, and the memory. It "
        "takes no TPU, but the tpu extra.",
        default=(),
        commas=True,
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
        help="Rows of a batch; 0 for as many as the engine takes on such a chip.",
        default=0,
        least=0,
        needs="compile_for",
    )


_PROMPT = 64  # tokens of a prompt, where no preset says how many
# Settings that say nothing to a mode.
_IDLE = {
    "accuracy": (
        *("generate", "compile_for", "dtype", "matmul_precision", "errors", "preset", "screen"),
        *("layers", "neurons", "rounds", "memory_gb"),
    ),
    "generate": (
        *("compile_for", "dtype", "matmul_precision", "errors", "screen", "neurons", "organism"),
    ),
    "compile_for": ("against", "dtype", "errors", "screen", "neurons", "rounds", "organism"),
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
    elif settings.generate:
        measured, lines = _generation(settings)
    elif settings.compile_for:
        measured, lines = _compilation(settings)
    else:
        measured, lines = _speed(settings)
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
    if settings.model and settings_lib.given(settings, "preset"):
        raise InputError("--preset says nothing to --model, whose config.json gives the shape")
    if settings.json and not os.access(pathlib.Path(settings.json).absolute().parent, os.W_OK):
        raise InputError(f"--json={settings.json}: its folder cannot be written")
    if settings.against and importlib.util.find_spec("torch") is None:
        raise InputError("--against needs torch: pip install torch==2.13.0, or make parity")


def _accuracy(settings: BenchmarkSettings) -> tuple[list[dict], list[str]]:
    organism = organisms.build(settings.organism)
    decoder, tokenizer = models.load(organism.folder)
    pair = pairs.read(str(truth.pairs_file(organism, "unlock")), tokenizer)[0]
    runs = "hooks" in settings.against
    random_decoder, random_pair = numerical_error.random_model()
    rows = numerical_error.measure("random", random_decoder, random_pair, runs=runs)
    rows += numerical_error.measure("trained", decoder, pair, runs=runs)
    return [dataclasses.asdict(row) for row in rows], tables.numerical_error_table(rows)


def _generation(settings: BenchmarkSettings) -> tuple[dict, list[str]]:
    figures = benchmark.measure_generation(
        settings.preset,
        say=sweep.say,
        against=settings.against,
        layers=settings.layers,
        rounds=settings.rounds,
        memory_gb=settings.memory_gb,
    )
    return dataclasses.asdict(figures), tables.generation_table(figures)


def _speed(settings: BenchmarkSettings) -> tuple[list[dict], list[str]]:
    found, lines = [], []
    for number, precision in enumerate(settings.matmul_precision):
        figures = benchmark.measure(
            settings.preset,
            say=sweep.say,
            dtype=settings.dtype,
            precision=precision,
            errors=settings.errors,
            against=() if number else settings.against,
            layers=settings.layers,
            neurons=settings.neurons,
            rounds=settings.rounds,
            screen=settings.screen,
            memory_gb=settings.memory_gb,
        )
        found.append(dataclasses.asdict(figures))
        lines += tables.table(figures)
    return found, lines


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
        precisions = PRECISIONS
    figures = []
    for topology in settings.compile_for:
        compiler = chips.Compiler(chips.chip(topology), say=sweep.say)
        for precision in precisions:
            figures.append(chips.measure(asked, compiler, precision))
    return [dataclasses.asdict(each) for each in figures], tables.compiled_table(figures)
