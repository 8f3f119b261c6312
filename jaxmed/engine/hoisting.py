"""What does not depend on what a loop goes over, computed before the loop.

A compiler hoists some of it and leaves the rest inside: here it is outside by construction.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from jaxmed.engine.difference import evaluate


def hoisted(f: Callable[[PyTree], PyTree], argument: PyTree) -> Callable[[PyTree], PyTree]:
    """f, with what does not depend on its argument computed now.

    Args:
        f: a function of a tree of arrays. A loop or a conditional in it is one operation: where
            any of it depends on the argument, all of it waits. Numbers that are widened are so
            where they are used, and kept as they were.
        argument: arrays like those that will be given, or their shapes.

    Returns:
        A function that may be called, and batched, any number of times. It has no derivatives but
        those of its operations: what f says of its own (`jax.custom_vjp`) is left behind.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), argument)
    traced, given = jax.make_jaxpr(f, return_shape=True)(shapes)
    parameters = [_Later() for _ in traced.jaxpr.invars]
    steps: list[_Step] = []
    results = _divide(traced.jaxpr, traced.consts, parameters, steps)

    def remaining(y: PyTree) -> PyTree:
        values = dict(zip(parameters, jax.tree.leaves(y), strict=True))

        def read(atoms: Iterable) -> list:
            return [values[x] if isinstance(x, _Later) else _value(x) for x in atoms]

        for step in steps:
            found = evaluate(step.equation, read(step.inputs))
            values.update(zip(step.outputs, found, strict=True))
        return jax.tree.unflatten(jax.tree.structure(given), read(results))

    return remaining


@dataclasses.dataclass(frozen=True, eq=False)
class _Later:
    """Stands for a number that depends on the argument; no two are equal."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Widened:
    """A known number and the conversion that it comes from, which is made again where it is used:
    narrow weights stay narrow outside of the loop, and a compiler sees what they were."""

    value: Any
    equation: core.JaxprEqn
    narrow: Any


@dataclasses.dataclass(frozen=True)
class _Step:
    """An equation that waits for the argument: values, or what stands for them."""

    equation: core.JaxprEqn
    inputs: Sequence[Any]
    outputs: Sequence[_Later]


def _divide(jaxpr: core.Jaxpr, consts, inputs: Sequence, steps: list[_Step]) -> list:
    """Evaluates what is known, and appends the rest to the steps.

    Returns:
        The jaxpr's outputs: values, or what stands for them.
    """
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atoms) -> list:
        return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        operands = read(equation.invars)
        if not any(isinstance(x, _Later) for x in operands):
            found = evaluate(equation, list(map(_value, operands)))
            if _widens(equation):
                found = [_Widened(found[0], equation, _value(operands[0]))]
        elif inner := _called(equation):
            found = _divide(inner.jaxpr, inner.consts, operands, steps)
        else:
            found = [_Later() for _ in equation.outvars]
            steps.append(_Step(equation, [_widened_again(x, steps) for x in operands], found))
        known.update(zip(equation.outvars, found, strict=True))
    return read(jaxpr.outvars)


def _value(x):
    return x.value if isinstance(x, _Widened) else x


def _widens(equation: core.JaxprEqn) -> bool:
    """Whether an equation makes wider numbers of narrow ones, a number of each."""
    if equation.primitive.name != "convert_element_type":
        return False
    (narrow,), (wide,) = equation.invars, equation.outvars
    return _bytes(wide) > _bytes(narrow)


def _bytes(variable) -> int:
    return variable.aval.dtype.itemsize


def _widened_again(x, steps: list[_Step]):
    if not isinstance(x, _Widened):
        return x
    later = _Later()
    steps.append(_Step(x.equation, [x.narrow], [later]))
    return later


# Primitives that do no more than call a jaxpr, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def _called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr that an equation calls, if it does nothing else."""
    parameter = _CALLS.get(equation.primitive.name)
    return None if parameter is None else equation.params[parameter]
