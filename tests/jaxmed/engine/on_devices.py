"""Checks that need several devices, and so a process of their own; see test_shard.py.

python -m tests.jaxmed.engine.on_devices FOLDER \\
    [CHECK, FAMILY, DTYPE, METRIC, [[SWEEP, MODEL], ...], [GRANULARITY, ...]] ...

The last line that it prints is what the checks found, as JSON, in their order.
"""

import contextlib
import json
import pathlib
import sys

import jax
import numpy as np

import models
from jaxmed.analysis import joint, screening
from jaxmed.behaviour import generation, likelihood
from jaxmed.behaviour.sampling import Sampling
from jaxmed.data.pairs import Pair
from jaxmed.engine import cost, runs, scan
from jaxmed.engine.cost import Devices
from jaxmed.intervention import values
from jaxmed.question import metrics
from jaxmed.question.positions import Positions
from jaxmed.question.question import Question
from jaxmed.validation import programs
from jaxmed.validation.compiled import Text
from models import placement
from models.edits import Hold
from models.sites import Site
from tests import tiny
from tests.jaxmed.scans import (
    GRANULARITIES,
    UNEQUAL,
    compiled_without_optimising,
    largest,
    pair,
    some_directions,
    worst,
)

SAME = Pair("same", UNEQUAL.prompt_ids, UNEQUAL.prompt_ids, (6,), (7,))
METRICS = {"logit": metrics.LogitDifference(), "response": metrics.ResponseLogprobDifference()}


def on(sweep: int, model: int) -> jax.sharding.Mesh:
    return placement.of(jax.devices()[: sweep * model], model)


class Model:
    """A tiny model as one device has it, and as meshes do."""

    def __init__(self, folder: pathlib.Path, family: str, dtype: str, vocabulary: int):
        self.folder = folder / f"{family}-{dtype}-{vocabulary}"
        if not self.folder.exists():
            tiny.save(self.folder, family, dtype=dtype, vocab_size=vocabulary)
        self.alone, _ = models.load(self.folder)

    def over(self, mesh: list[int]):
        decoder, _ = models.load(self.folder, mesh=on(*mesh))
        return decoder


def effects(folder, family, dtype, metric, meshes, names) -> dict:
    """Of some granularities: how far effects are from those of one device, of the largest; and the
    largest of identical prompts. Each device holds as many plain runs as one alone does."""
    model = Model(folder, family, dtype, 61)
    config = model.alone.config
    question = Question(
        METRICS[metric], Positions.PROMPT, directions=some_directions(config, folder)
    )
    found = {}

    def scanned(decoder):
        return scan.scan_pairs(
            decoder, [UNEQUAL, SAME], question, names, chosen=[{}, {}], memory=2**30
        )

    def plain_runs(decoder):
        with jax.default_matmul_precision("float32"):  # as in a scan, which has compiled it
            return jax.tree.leaves(runs.captured(decoder, [UNEQUAL, SAME], question).traces)

    reference, none = scanned(model.alone)
    held = [run.shape for run in plain_runs(model.alone)]
    assert largest(reference) > 1e-2 and largest(none) == 0
    for mesh in meshes:
        decoder = model.over(mesh)
        of_pair, same = scanned(decoder)
        everywhere = plain_runs(decoder)
        assert [run.shape for run in everywhere] == held
        assert all(run.sharding.is_fully_replicated for run in everywhere)
        y = abs(of_pair.y_source - reference.y_source) / abs(reference.y_source)
        found["x".join(map(str, mesh))] = [worst(of_pair, reference), largest(same), y]
    return found


def others(folder, family, dtype, metric, meshes, names) -> dict:
    """Gradients, joint sets, likelihoods, values: how far they are from those of one device, of the
    largest; and how many generated tokens are others."""
    model = Model(folder, family, dtype, 61)
    config, question = model.alone.config, Question(METRICS[metric])
    sets = np.random.default_rng(0).random((5, config.num_layers, config.intermediate_size)) < 0.1
    prompts = [pair(n, n, seed=n).prompt_ids for n in (4, 9, 5, 7, 6)]
    shape = (len(prompts), config.num_layers, config.hidden_size)
    own = np.random.default_rng(0).normal(size=shape).astype(dtype)
    holds = [Hold.affine(Site.MLP, np.ones((1, 1), dtype), own)]

    def computed(decoder):
        of_sets = joint.joint_pair(decoder, UNEQUAL, question, sets, memory=2**30)
        slopes = screening.scores_of_pairs(decoder, [UNEQUAL, SAME], question, steps=2)
        shared = {"holds": holds, "memory": 2**30}
        sequences = [(prompt, prompt[:3]) for prompt in prompts]
        divergences = likelihood.kl(decoder, sequences, holds, memory=2**30)
        means = values.group_means(
            decoder, prompts, {"all": np.ones(5, bool)}, [Site.NEURON], memory=2**30
        )
        generated = generation.generate(
            decoder, prompts, stop=[3], sampling=Sampling(max_tokens=9), batch_size=2, **shared
        )
        return (
            {
                "joint": np.stack([of_sets.nie["joint"], of_sets.tie["joint"]]),
                "gradients": np.array(slopes[0]),
                "likelihoods": likelihood.logprobs(decoder, sequences, **shared).means,
                "divergences": divergences.means,
                "values": means["all"][Site.NEURON][1],
            },
            [one.tokens for one in generated],
        )

    numbers, tokens = computed(model.alone)
    found = {}
    for mesh in meshes:
        here, generated = computed(model.over(mesh))
        apart = {
            name: float(np.abs(here[name] - of).max() / np.abs(of).max())
            for name, of in numbers.items()
        }
        apart["tokens"] = sum(one != of for one, of in zip(generated, tokens, strict=True))
        found["x".join(map(str, mesh))] = apart
    return found


def collectives(folder, family, dtype, metric, meshes, names) -> dict:
    """What the compiled programs of a scan, and with all granularities of all else too, exchange
    between devices: by program, kind and shape of each collective."""
    config = tiny.config(family, dtype=dtype)
    question = Question(METRICS[metric], directions=programs.directions(config))
    found = {}
    for mesh in meshes:
        decoder = programs.shapes_of(config, on(*mesh))
        devices = Devices.of(decoder.mesh)
        record = programs.Recorder()

        def batching(work, term, runs, devices=devices):
            return cost.Batching(min(runs, 2), 2, devices.number)

        of_all = record, decoder, UNEQUAL, question
        programs.of_scan(*of_all, names, batching=batching)
        if set(names) >= set(GRANULARITIES):
            programs.of_gradients(*of_all)
            programs.of_joint_sets(*of_all)
            rows = devices.number
            programs.of_answers(record, decoder, UNEQUAL, lambda length, room, rows=rows: rows)
        told = {}
        for program in record.programs:
            text = Text(_compiled(program, decoder.mesh))
            told[f"{program.name} {program.what}"] = [
                [operation.collective, list(array.shape)]
                for operation in text.collectives
                for array in operation.arrays
            ]
        found["x".join(map(str, mesh))] = told
    return found


def _compiled(program, mesh) -> str:
    given = [
        jax.ShapeDtypeStruct(
            argument.shape, argument.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        )
        for argument, spec in zip(program.arguments, program.places, strict=True)
    ]
    return (
        jax.jit(lambda *arrays: program.function(*arrays)).lower(*given).compile().as_text() or ""
    )


# What is compared may be compiled without optimising, in half the time.
CHECKS = {"effects": effects, "others": others, "collectives": collectives}

if __name__ == "__main__":
    told = []
    for given in sys.argv[2:]:
        name, family, dtype, *rest = json.loads(given)
        as_fast = (
            contextlib.nullcontext() if name == "collectives" else compiled_without_optimising()
        )
        with jax.enable_x64(dtype == "float64"), as_fast:
            told.append(CHECKS[name](pathlib.Path(sys.argv[1]), family, dtype, *rest))
    print(json.dumps(told))
