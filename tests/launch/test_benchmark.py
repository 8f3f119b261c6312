"""The benchmark as a program."""

import pytest

from tests.launch import process


def test_an_unknown_baseline_is_refused_by_name():
    done = process.run("benchmark", "--against=hooks,pyvene")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("--against=pyvene: not one of hooks, prefix")


@pytest.fixture(scope="module")
def run_along():
    """As `process.run`, but without a process of its own."""
    with process.serving("benchmark") as run:
        yield run


def test_more_neurons_than_there_are_is_refused_before_any_work(run_along):
    done = run_along("--layers=1", "--neurons=4000")
    assert done.returncode == 1
    assert "--neurons=4000: the model has 3072" in done.stderr


def test_flags_that_would_say_nothing_are_refused(run_along):
    done = run_along("--accuracy", "--rounds=2")
    assert done.returncode == 1
    assert "--rounds says nothing to --accuracy" in done.stderr
    done = run_along("--json=/nowhere/figures.json")
    assert done.returncode == 1
    assert "--json=/nowhere/figures.json: its folder cannot be written" in done.stderr
