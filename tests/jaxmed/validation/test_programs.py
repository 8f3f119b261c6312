"""Programs found from shapes; that they compile for TPUs is in `test_chips.py`."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

import jaxmed.engine
from jaxmed.engine import cost, propagate, rules, runs, scan
from jaxmed.question.metrics import LogitDifference, ResponseLogprobDifference
from jaxmed.question.question import Question
from jaxmed.question.sites import GRANULARITIES
from jaxmed.validation import presets, programs
from models.products import Products
from tests import tiny


def compiled_by_the_engine() -> dict:
    """All functions of the engine that are compiled, by the module and the name that they have; but
    those that have a rule, which are parts of others."""
    modules = [
        importlib.import_module(f"jaxmed.engine.{module.name}")
        for module in pkgutil.iter_modules(jaxmed.engine.__path__)
    ]
    return {
        (module, name): value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type(propagate.carry)) and value.__module__ == module.__name__
        if value not in rules.rules(Products())
    }


def shapes(arrays) -> tuple:
    """Of all but single numbers, in any order."""
    return tuple(sorted(array.shape for array in arrays if getattr(array, "ndim", 0)))


@pytest.mark.parametrize(
    "metric",
    [LogitDifference(), pytest.param(ResponseLogprobDifference(), marks=pytest.mark.parity)],
)
def test_they_are_those_that_a_scan_compiles(metric, monkeypatch):
    """Of every function that the engine compiles, for the same shapes; in Gemma 2, which has a norm
    after each module."""
    config = tiny.config("gemma2")
    pair = presets.random_pair(config, 20)
    question = Question(metric, directions=programs.directions(config))
    record = programs.Recorder()
    programs.of_scan(
        record,
        programs.shapes_of(config),
        pair,
        question,
        GRANULARITIES,
        batching=lambda work, term, runs: cost.Batching(2, 2, 4),
    )
    called, of_the_engine = set(), compiled_by_the_engine()

    def watched(name, function):
        def call(*arguments, **named):
            if any(isinstance(each, jax.core.Tracer) for each in jax.tree.leaves(arguments)):
                # Part of a program that is compiled as a whole.
                return function(*arguments, **named)
            called.add((name, shapes(jax.tree.leaves((arguments, named)))))
            # Only shapes matter: nothing is compiled here.
            given = function.eval_shape(*arguments, **named)
            return jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), given)

        return call

    for (module, name), function in of_the_engine.items():
        monkeypatch.setattr(module, name, watched(name.lstrip("_"), function))
    monkeypatch.setattr(cost, "batching", lambda *_, **__: cost.Batching(2, 2, 4))
    scan.scan_pair(tiny.decoder("gemma2"), pair, question, GRANULARITIES)
    names = {name for name, _ in called}
    found = {(program.name, shapes(program.arguments)) for program in record.programs}
    assert {(name, of) for name, of in found if name in names} == called
    # The steps of one run are compiled inside those of several.
    assert names == {name for module, name in of_the_engine if module is runs} | {
        "direction_writes"
    }
