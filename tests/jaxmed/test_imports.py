"""What is loaded by those who only read files, ask questions or test hypotheses."""

import subprocess
import sys

import pytest

# What each may load of these; one after the other in one process, the lightest first.
HEAVY = ("numpy", "pyarrow", "scipy", "jax", "flax", "zarr", "matplotlib", "transformers", "torch")
LOADED = {
    "jaxmed.question.sites": set(),
    "jaxmed.data.pairs": set(),
    "jaxmed.question.effects": {"numpy"},
    "jaxmed.question.positions": {"numpy"},
    "jaxmed.question.directions": {"numpy"},
    "jaxmed.data.prompts": {"numpy", "pyarrow"},
    "jaxmed.data.pairing": {"numpy", "pyarrow"},
    "jaxmed.analysis.statistics": {"numpy", "pyarrow", "scipy"},
    "jaxmed.analysis.estimands": {"numpy", "pyarrow", "scipy"},
}
PROGRAM = f"""
import importlib, sys
for name in {tuple(LOADED)}:
    importlib.import_module(name)
    print(name, *(heavy for heavy in {HEAVY} if heavy in sys.modules))
print("engine", *(name for name in sys.modules if name.startswith("jaxmed.engine")))
"""


@pytest.fixture(scope="module")
def loaded():
    """By module: what it and those before it have loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    return {name: set(found) for name, *found in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("name", LOADED)
def test_a_module_loads_no_more_than_it_needs(loaded, name):
    assert loaded[name] <= LOADED[name]


def test_no_file_is_read_and_no_hypothesis_tested_by_way_of_the_engine(loaded):
    assert loaded["engine"] == set()
