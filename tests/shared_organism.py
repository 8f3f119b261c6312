"""The one organism that tests train. It has every kind of planted unit, decoys among them.

It is trained once in a run of tests, whichever worker comes first; each file has a copy of its own.
"""

import dataclasses
import os
import pathlib
import shutil

import filelock
import numpy as np
import pytest
from flax import nnx

from models import checkpoint, organisms
from models.decoder import Decoder
from models.organisms import planted

RECIPE = dataclasses.replace(organisms.RECIPES["decoys"], steps=60)
# What its decoder was on the way: before and after training, and rotated, as it is written.
STAGES = START, TRAINED, WRITTEN = ("start", "trained", "written")


def organism(folder: pathlib.Path, tmp_path_factory) -> organisms.Organism:
    """A copy of the organism in a folder of this name, trained unless a worker did."""
    shutil.copytree(_shared(tmp_path_factory) / RECIPE.name, folder)
    return organisms.build(folder, recipe=RECIPE, progress=False)


def stages(tmp_path_factory) -> dict[str, Decoder]:
    """Its decoder in every stage."""
    shared = _shared(tmp_path_factory)
    return {name: _decoder(shared / f"{name}.npz") for name in STAGES}


def _shared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of which every worker has a folder
    shared = folder / "shared"
    with filelock.FileLock(folder / "shared.lock"):
        if not (shared / RECIPE.name).exists():
            shared.mkdir(exist_ok=True)
            _train(shared)
    return shared


def _train(shared: pathlib.Path) -> None:
    def keep(name, decoder):
        state = nnx.to_flat_state(nnx.state(decoder))
        np.savez(shared / f"{name}.npz", **{_name(path): leaf[...] for path, leaf in state})

    def keeping(name, function, decoder_of):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            keep(name, decoder_of(args, result))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, function, name, decoder_of in (
            (planted, "plant", START, lambda args, made: made[0]),
            (planted, "rotate", TRAINED, lambda args, made: args[0]),
            (checkpoint, "save", WRITTEN, lambda args, made: args[0]),
        ):
            patch.setattr(module, function, keeping(name, getattr(module, function), decoder_of))
        organisms.build(shared / RECIPE.name, recipe=RECIPE, progress=False)


def _decoder(file: pathlib.Path) -> Decoder:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(RECIPE.config, rngs=nnx.Rngs(0))))
    with np.load(file) as arrays:
        flat = [
            (path, leaf.replace(np.asarray(arrays[_name(path)])))
            for path, leaf in nnx.to_flat_state(state)
        ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
