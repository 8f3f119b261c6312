"""How fast the engine is on this machine, against its matrix products and against other ways.

python -m launch.benchmark --preset=12x768 --against=hooks,prefix --json=FILE
python -m launch.benchmark --generate --against=transformers
"""

import dataclasses
import importlib.util
import json
import os
import pathlib

from absl import flags

import models
from jaxmed.data import pairs
from jaxmed.report import benchmark as benchmark_lib
from jaxmed.validation import benchmark, numerical_error, presets, truth
from launch import program
from models import organisms
from models.errors import InputError

_PRESET = flags.DEFINE_enum(
    "preset", "12x768", list(presets.PRESETS), "Shape of the model; its weights are random."
)
_AGAINST = flags.DEFINE_list(
    "against",
    [],
    "Any of hooks (transformers with forward hooks, 64 rows a batch) and prefix (a torch loop that "
    "caches the prefix and starts at the patched layer), or transformers with --generate, in "
    "float32 on a CPU; they need torch (the parity extra).",
)
_JSON = flags.DEFINE_string("json", None, "File for the figures, as one JSON object.")
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Blocks of the model; 0 for the preset's.", lower_bound=0
)
_NEURONS = flags.DEFINE_integer(
    "neurons", 0, "Neurons to scan, spread evenly over all; 0 for all.", lower_bound=0
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Runs after the first; medians are told.", lower_bound=1
)
_SCREEN = flags.DEFINE_integer(
    "screen",
    0,
    "Also time the screened mode for this many strongest neurons; 0 not to.",
    lower_bound=0,
)
_ACCURACY = flags.DEFINE_bool(
    "accuracy",
    False,
    "Instead of speed: errors of single-neuron effects against float64, of a random and of a "
    "trained model; with --against=hooks also those of transformers, which subtracts two runs.",
)
_GENERATE = flags.DEFINE_bool(
    "generate",
    False,
    "Instead of effects: tokens a second of greedy generation, plain and with a hold on every "
    "neuron; with --against=transformers also those of its generate.",
)
_ORGANISM = flags.DEFINE_string(
    "organism",
    "out/organisms/late-mlp-0",
    "--accuracy: folder of the trained model; trained if it is not there.",
)
_MEMORY_GB = flags.DEFINE_float(
    "memory_gb",
    None,
    "Memory that the process may take on its device, in GiB; most of what is free by default.",
    lower_bound=1e-3,
)


def main() -> None:
    """Measures, prints a table, and writes the file."""
    baselines = benchmark.GENERATION_BASELINES if _GENERATE.value else benchmark.BASELINES
    if unknown := sorted(set(_AGAINST.value) - set(baselines)):
        raise InputError(f"--against={','.join(unknown)}: not one of {', '.join(baselines)}")
    of_speed = ("preset", "screen", "layers", "neurons", "rounds", "memory_gb")
    for mode, others in (
        ("accuracy", ("generate", *of_speed)),
        ("generate", ("screen", "neurons", "organism")),
    ):
        if flags.FLAGS[mode].value:
            if idle := [name for name in others if flags.FLAGS[name].present]:
                raise InputError(f"--{idle[0]} says nothing to --{mode}")
    if _JSON.value and not os.access(pathlib.Path(_JSON.value).absolute().parent, os.W_OK):
        raise InputError(f"--json={_JSON.value}: its folder cannot be written")
    if _AGAINST.value and importlib.util.find_spec("torch") is None:
        raise InputError("--against needs torch: pip install torch==2.13.0, or make parity")
    modes = {_accuracy: _ACCURACY.value, _generation: _GENERATE.value, _speed: True}
    measured, lines = next(mode for mode, asked in modes.items() if asked)()
    print("\n".join(lines))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(measured, indent=2) + "\n")
        print(f"Written to {_JSON.value}")


def _accuracy() -> tuple[list[dict], list[str]]:
    organism = organisms.build(_ORGANISM.value)
    decoder, tokenizer = models.load(organism.folder)
    pair = pairs.read(str(truth.pairs_file(organism, "unlock")), tokenizer)[0]
    runs = "hooks" in _AGAINST.value
    rows = numerical_error.measure("random", *numerical_error.random_model(), runs=runs)
    rows += numerical_error.measure("trained", decoder, pair, runs=runs)
    return [dataclasses.asdict(row) for row in rows], benchmark_lib.numerical_error_table(rows)


def _generation() -> tuple[dict, list[str]]:
    figures = benchmark.measure_generation(
        _PRESET.value,
        against=tuple(_AGAINST.value),
        layers=_LAYERS.value,
        rounds=_ROUNDS.value,
        memory_gb=_MEMORY_GB.value,
    )
    return dataclasses.asdict(figures), benchmark_lib.generation_table(figures)


def _speed() -> tuple[dict, list[str]]:
    figures = benchmark.measure(
        _PRESET.value,
        against=tuple(_AGAINST.value),
        layers=_LAYERS.value,
        neurons=_NEURONS.value,
        rounds=_ROUNDS.value,
        screen=_SCREEN.value,
        memory_gb=_MEMORY_GB.value,
    )
    return dataclasses.asdict(figures), benchmark_lib.table(figures)


if __name__ == "__main__":
    program.start(main)
