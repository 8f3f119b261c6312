"""Checks that need several devices, and so a process of their own; see test_placement.py.

python -m tests.models.on_mesh one FOLDER
python -m tests.models.on_mesh many FOLDER PORT INDEX
"""

import collections
import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import jaxmed
import models
from jaxmed.data import pairs
from models import checkpoint

PAIR = pairs.Pair("one", (8, 9, 10, 11), (8, 12, 10, 11), (6,), (7,))
TOKENS = np.arange(10)
PROCESSES = 2


def mesh(sweep: int, model: int) -> jax.sharding.Mesh:
    return jax.make_mesh((sweep, model), ("sweep", "model"), axis_types=(AxisType.Auto,) * 2)


def one(folder: str) -> None:
    """Logits and effects of a model on four devices are those of it on one."""
    plain, _ = models.load(folder)
    sharded, _ = models.load(folder, mesh=mesh(2, 2))
    split = {str(array.sharding.spec) for array in jax.tree.leaves(sharded)}
    with jax.default_matmul_precision("highest"):
        logits = [decoder(TOKENS)[0] for decoder in (plain, sharded)]
        scans = [
            jaxmed.scan(decoder, [PAIR], "neuron", progress=False)["neuron"]
            for decoder in (plain, sharded)
        ]
    found = {"logits": _distance(*logits), "split": sorted(split)}
    alone, together = scans
    for name in ("nie", "tie", "te"):
        found[name] = _distance(getattr(alone, name), getattr(together, name))
    print(json.dumps(found))


def many(folder: str, port: str, index: str) -> None:
    """Each of several processes reads what its devices hold."""
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, int(index))
    read = collections.Counter()
    whole = checkpoint._Stored.read

    def counted(tensor, where):
        values = whole(tensor, where)
        read[tensor.name] += values.nbytes
        return values

    checkpoint._Stored.read = counted
    decoder, _ = models.load(folder, mesh=mesh(1, jax.device_count()))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda decoder: decoder(TOKENS)[0])(decoder)
    logits = multihost_utils.process_allgather(logits, tiled=True)
    print(json.dumps({"read": read, "logits": logits.tolist()}))


def _distance(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(a)))


if __name__ == "__main__":
    {"one": one, "many": many}[sys.argv[1]](*sys.argv[2:])
