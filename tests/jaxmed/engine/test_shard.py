"""Rows over several devices: the same effects, and nothing exchanged but weights.

All in one process that has eight, whatever this one has: see `on_devices.py`.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.launch.process import ROOT

DEVICES = 8
# Of two and eight devices: weights on all of them, in two parts, and in four.
MESHES = [[2, 1], [8, 1], [4, 2], [2, 4]]


def found(folder, *asked):
    """What checks of `on_devices` find, in their order."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    process = subprocess.run(
        [sys.executable, "-m", "tests.jaxmed.engine.on_devices", folder, *map(json.dumps, asked)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def check_effects(of_meshes, meshes, tolerance):
    assert len(of_meshes) == len(meshes)
    for name, (apart, identical, y) in of_meshes.items():
        assert apart <= tolerance and y <= tolerance, name
        assert identical == 0, name


def check_others(of_meshes, meshes, tolerance):
    assert len(of_meshes) == len(meshes)
    for name, apart in of_meshes.items():
        assert apart.pop("tokens") == 0, name
        assert max(apart.values()) <= tolerance, (name, apart)


def check_collectives(of_meshes, gathering):
    """With weights on all devices there are none; where they are in parts, weights and token ids
    are gathered, and single numbers reduced."""
    for name, programs in of_meshes.items():
        kinds = {kind for exchanged in programs.values() for kind, _ in exchanged}
        assert kinds == (set() if name.endswith("x1") else {"all-gather", "all-reduce"}), name
        for program, exchanged in programs.items():
            assert all(not shape for kind, shape in exchanged if kind == "all-reduce"), program
        if kinds:
            found = {program.split()[0] for program, exchanged in programs.items() if exchanged}
            assert found >= gathering


OF_A_SCAN = {"capture", "plain_values", "enter", "carry", "read_changes"}
OF_ALL = {"unit_slopes", "fill", "advance", "response_logprobs", "response_divergences"}
ALL = ["layer", "module", "head", "token", "neuron", "direction"]


def test_several_devices(tmp_path):
    effects, collectives = found(
        tmp_path,
        ["effects", "gemma2", "float64", "logit", [[8, 1], [2, 4]], ["layer", "neuron"]],
        ["collectives", "gemma2", "float64", "logit", [[8, 1], [4, 2]], ["neuron"]],
    )
    check_effects(effects, [[8, 1], [2, 4]], 1e-12)
    check_collectives(collectives, OF_A_SCAN)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_several_devices_of_each_family(family, tmp_path):
    # How weights are divided is the same code for all: two meshes are enough for the others.
    meshes = MESHES if family == "llama" else [[8, 1], [2, 4]]
    double, single, others, collectives = found(
        tmp_path,
        ["effects", family, "float64", "logit", meshes, ALL],
        ["effects", family, "float32", "response", [[2, 4]], ["head", "neuron"]],
        ["others", family, "float64", "response", [[2, 4]], ALL],
        ["collectives", family, "bfloat16", "response", [[8, 1], [2, 4]], ALL],
    )
    check_effects(double, meshes, 1e-12)
    check_effects(single, [[2, 4]], 1e-5)
    check_others(others, [[2, 4]], 1e-12)
    check_collectives(collectives, OF_A_SCAN | OF_ALL)
