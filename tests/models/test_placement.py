"""Parameters go straight to their devices, and are the same there."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import models
from models import checkpoint, placement
from tests import tiny
from tests.launch.process import ROOT


def start(*arguments, devices):
    """A process of tests.models.on_mesh with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.models.on_mesh", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_several_devices(tmp_path):
    """Of one host: logits and single-neuron effects are those of one device."""
    tiny.save(tmp_path / "model", vocab_size=64)
    found = said(start("one", tmp_path / "model", devices=4))
    assert "P(None, None, 'model')" in found["split"]
    assert found["logits"] < 2e-6
    assert max(found["nie"], found["tie"], found["te"]) < 1e-5


@pytest.mark.parametrize("model", [3, 16])
def test_no_device_is_left_out_of_a_mesh(model):
    with pytest.raises(ValueError, match="8 devices"):
        placement.of(jax.devices()[:1] * 8, model)


def test_several_hosts(tmp_path):
    """Each reads its half of what is split, also of tensors that hold several parameters."""
    family = "gpt_neox"
    decoder = tiny.save(tmp_path / "model", family, vocab_size=64)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start("many", tmp_path / "model", port, i, devices=2) for i in range(2)]
    for found in map(said, processes):
        with jax.default_matmul_precision("highest"):
            np.testing.assert_allclose(found["logits"], decoder(np.arange(10))[0], atol=1e-5)
        whole = {
            name: tensor.nbytes
            for name, tensor in safetensors.numpy.load_file(
                tmp_path / "model" / checkpoint.SINGLE_FILE
            ).items()
        }
        share = {name: found["read"][name] / size for name, size in whole.items()}
        assert set(share.values()) == {0.5, 1.0}
        replicated = ("norm", "dense.bias", "4h_to_h.bias")
        for name, part in share.items():
            assert part == (1.0 if any(word in name for word in replicated) else 0.5), name


def test_what_the_axis_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 4), ("sweep", "model"), axis_types=(AxisType.Auto,) * 2)
    query = ("blocks", "attention", "query", "kernel")
    assert placement.sharding(query, (2, 6, 8), mesh).spec == P(None, None, "model")
    assert placement.sharding(query, (2, 8, 6), mesh).spec == P()
    assert placement.sharding(("final_norm", "weight"), (8,), mesh).spec == P()
    assert placement.sharding(("embedding",), (6, 8), mesh).spec == P(None, "model")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rules_name_parameters(family):
    """Every matrix of a block is split, and no rule is misspelt."""
    mesh = jax.sharding.AbstractMesh((1, 2), ("sweep", "model"), axis_types=(AxisType.Auto,) * 2)
    _, parameters = checkpoint._parameters(tiny.decoder(family, vocab_size=64))
    for path, parameter in parameters.items():
        whole = placement.sharding(path, parameter.shape, mesh).spec == P()
        assert whole == (
            path[-1] not in ("kernel", "embedding", "unembedding")
            and not any(".".join(path) == f"blocks.{module}.bias" for module in placement._OUTPUTS)
        )


@pytest.mark.parametrize(
    ("axes", "axis_type"),
    [(("model",), AxisType.Auto), (("sweep", "model"), AxisType.Explicit)],
)
def test_mesh_refused(axes, axis_type, tmp_path):
    tiny.save(tmp_path / "model")
    mesh = jax.make_mesh((1,) * len(axes), axes, axis_types=(axis_type,) * len(axes))
    with pytest.raises(ValueError, match="a mesh needs the axes 'sweep' and 'model', of AxisType"):
        models.load(tmp_path / "model", mesh=mesh)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_buffers_become_the_parameter(dtype):
    with jax.enable_x64(True):
        placing = placement.Placing((3, 5, 7), dtype, None)
        (piece,) = placing.pieces
        assert piece.where == (slice(0, 3), slice(0, 5), slice(0, 7))
        piece.buffer[...] = np.arange(105).reshape(3, 5, 7)
        array = placing.hand_over()
        assert array.unsafe_buffer_pointer() == piece.buffer.ctypes.data
        np.testing.assert_array_equal(array, np.arange(105).reshape(3, 5, 7))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (70_000,), (3, 40_000), (1000, 65), (40, 3, 5)])
def test_copy(shape, transposed):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        out = np.zeros(shape[::-1] if transposed else shape, dtype)
        view = out.T if transposed else out
        assert placement.copy(values, view)
        np.testing.assert_array_equal(view, values.astype(dtype))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_copy_says_what_is_not_finite(dtype, value):
    values = np.full((100, 700), np.finfo(np.float16).max, dtype)
    assert placement.copy(values, np.empty_like(values))
    assert placement.all_finite(values)
    values[-1, -1] = value
    assert not placement.copy(values, np.empty_like(values))
    assert not placement.all_finite(values)
    assert not placement.copy(np.full((2, 3), 1e30, np.float64), np.empty((2, 3), np.float16))


PEAK = r"""
import pathlib, re, sys
import jax, jax.numpy as jnp, transformers
from models import checkpoint
checkpoint._PROGRESS_FROM_BYTES = 10**12
transformers.AutoConfig.for_model("llama")
jnp.zeros(1).block_until_ready()
status = pathlib.Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 2**10
bare = peak()
decoder, _ = checkpoint.load(sys.argv[1], cache_dir=sys.argv[2])
print((peak() - bare) / sum(array.nbytes for array in jax.tree.leaves(decoder)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 0.5 GB: the pieces that are read at a time must be small beside it."""
    folder = tmp_path_factory.mktemp("large")
    wide = {"hidden_size": 640, "intermediate_size": 2560, "vocab_size": 150_000}
    config = tiny.config(dtype="bfloat16", **wide)
    abstract = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
    graph, parameters = checkpoint._parameters(abstract)
    ones = {path: p.replace(jnp.ones(p.shape, p.dtype)) for path, p in parameters.items()}
    made = nnx.merge(graph, nnx.from_flat_state(ones))
    checkpoint.save(made, folder / "model")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("cached", [False, True])
def test_memory(large, cached):
    """No more than a tenth beyond the weights, the file's pages counted in."""
    model, cache_dir = large / "model", large / "cache"
    if cached:
        checkpoint.Source.examine(model).write_cache(cache_dir)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, model, cache_dir],
        check=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 0.9 < float(ran.stdout) < 1.1
