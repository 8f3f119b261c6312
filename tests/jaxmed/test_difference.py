"""Difference propagation against exact arithmetic: f(x + d) - f(x) in many digits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import lax

from jaxmed import metrics
from jaxmed.difference import difference
from models import layers

# x and d of many sizes: the difference of a value is as small as 1e-12 of it, or larger than it.
VALUES = np.array([-40.0, -3.0, 3.0, -0.7, -1e-3, 1e-3, 0.4, 2.0, 30.0])
STEPS = np.array([-50.0, -3 + 1e-5, -2.1, -1e-2, -1e-9, 0.0, 1e-12, 1e-5, 0.3, 7.0, 60.0])

ELEMENTARY = {
    "exp": (lax.exp, mpmath.exp, False),
    "log": (lax.log, mpmath.log, True),
    "logistic": (lax.logistic, lambda x: 1 / (1 + mpmath.exp(-x)), False),
    "tanh": (lax.tanh, mpmath.tanh, False),
    "rsqrt": (lax.rsqrt, lambda x: 1 / mpmath.sqrt(x), True),
    "sqrt": (lax.sqrt, mpmath.sqrt, True),
    "square": (lax.square, lambda x: x * x, False),
    "cube": (lambda x: lax.integer_pow(x, 3), lambda x: x**3, False),
    "inverse square": (lambda x: lax.integer_pow(x, -2), lambda x: x**-2, False),
    "silu": (jax.nn.silu, lambda x: x / (1 + mpmath.exp(-x)), False),
}


def exact(function, x, d):
    with mpmath.workdps(60):
        x, d = mpmath.mpf(float(x)), mpmath.mpf(float(d))
        return function(x + d) - function(x)


def condition(function, x, d):
    """How much a relative error of x or d, taken alone, is magnified in the result."""
    with mpmath.workdps(60):
        x, d = mpmath.mpf(float(x)), mpmath.mpf(float(d))
        result = function(x + d) - function(x)
        slope = functools.partial(mpmath.diff, function)
        by_x = abs(x * (slope(x + d) - slope(x)) / result)
        return 1 + by_x + abs(d * slope(x + d) / result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ELEMENTARY)
def test_an_elementary_difference_is_accurate_to_rounding(name, dtype):
    function, reference, positive = ELEMENTARY[name]
    with jax.enable_x64(True):
        x, d = (part.ravel().astype(dtype) for part in np.meshgrid(VALUES, STEPS))
        if positive:
            x, d = np.abs(x), d
            inside = x.astype(float) + d.astype(float) > 0
            x, d = x[inside], d[inside]
        found = jax.jit(difference(function))((x,), (d,))[1]
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        direct = np.asarray(function(x + d) - function(x), np.float64)
    limits = np.finfo(dtype)
    checked = 0
    for value, step, change, subtracted in zip(x, d, found, direct, strict=True):
        want = exact(reference, value, step)
        if step == 0:
            assert change == 0
        elif limits.tiny * 1e3 < abs(want) < limits.max:
            error = abs((mpmath.mpf(float(change)) - want) / want)
            assert error <= 10 * limits.eps * condition(reference, value, step), (value, step)
            # Where the condition is bad, as near a pole, no worse than direct evaluation.
            by_subtraction = abs((mpmath.mpf(float(subtracted)) - want) / want)
            assert error <= 10 * max(limits.eps, by_subtraction), (value, step)
            checked += 1
    assert checked > 30


NAMED = {
    "softmax": (layers.softmax_last_axis, lambda p, logs, total: p),
    "log_softmax": (metrics.log_softmax_last_axis, lambda p, logs, total: logs),
    "logsumexp": (metrics.logsumexp_last_axis, lambda p, logs, total: [total]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 30.0, 150.0])
@pytest.mark.parametrize("name", NAMED)
def test_softmax_differences_are_accurate_and_do_not_overflow(name, size, dtype):
    function, part = NAMED[name]
    generator = np.random.default_rng(0)
    x = (10 * generator.normal(size=(20, 6))).astype(dtype)
    d = (size * generator.normal(size=x.shape)).astype(dtype)
    with jax.enable_x64(True):
        found = np.asarray(difference(function)((x,), (d,))[1], np.float64).reshape(20, -1)

    def outputs(row):
        total = mpmath.log(sum(mpmath.exp(a) for a in row))
        logs = [a - total for a in row]
        return part([mpmath.exp(a) for a in logs], logs, total)

    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    for row, step, change in zip(x, d, found, strict=True):
        with mpmath.workdps(60):
            before = [mpmath.mpf(float(a)) for a in row]
            after = [a + mpmath.mpf(float(b)) for a, b in zip(before, step, strict=True)]
            old, new = outputs(before), outputs(after)
            want = np.array([float(n - o) for o, n in zip(old, new, strict=True)])
        # A difference of all logits by a constant changes nothing, so errors are relative to the
        # largest difference of the row; a probability is e^a, so |a| magnifies its error.
        magnified = 1 + max(float(abs(a)) for a in before + after)
        allowed = 10 * eps * magnified * np.abs(step).max()
        if name == "softmax":
            larger = np.array([float(max(pair)) for pair in zip(old, new, strict=True)])
            allowed = min(allowed, 10 * eps * magnified) * larger
        assert np.all(np.abs(want - change) <= allowed + tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_difference_of_a_norm_survives_that_its_largest_entry_is_removed(dtype):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 8)).astype(dtype)
    x[:, 3] = 10.0 ** generator.uniform(1, 3, 40)
    d = (0.1 * generator.normal(size=x.shape)).astype(dtype)
    d[:, 3] = generator.normal(size=40).astype(dtype) - x[:, 3]
    with jax.enable_x64(True):
        function = functools.partial(layers.inverse_rms_last_axis, eps=1e-5)
        found = np.asarray(difference(function)((x,), (d,))[1], np.float64)[:, 0]

    def exact_value(row):
        mean_square = sum(entry**2 for entry in row) / len(row) + mpmath.mpf(1e-5)
        return 1 / mpmath.sqrt(mean_square)

    for row, step, change in zip(x, d, found, strict=True):
        with mpmath.workdps(60):
            before = [mpmath.mpf(float(a)) for a in row]
            after = [a + mpmath.mpf(float(b)) for a, b in zip(before, step, strict=True)]
            want = float(exact_value(after) - exact_value(before))
        # x + d is known to the rounding of its operands, which are up to 1000 times the result.
        assert abs(change - want) <= 10 * np.finfo(dtype).eps * np.abs(row).max() * abs(want)


def test_what_does_not_change_costs_nothing():
    jaxpr = jax.make_jaxpr(lambda x, w: difference(jnp.dot)((x, w), (None, None)))(
        jnp.ones((2, 3)), jnp.ones((3, 4))
    )
    assert str(jaxpr).count("dot_general") == 1


def test_a_batch_of_differences_leaves_the_values_unbatched():
    def f(x):
        return jax.nn.silu(x @ jnp.ones((5, 7))) @ jnp.ones((7, 3))

    def batched(x, d):
        return jax.vmap(lambda change: difference(f)((x,), (change,))[1])(d)

    jaxpr = jax.make_jaxpr(batched)(jnp.ones((2, 5)), jnp.ones((11, 2, 5))).jaxpr
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert sorted(shapes, key=len) == [(2, 7), (2, 3), (11, 2, 7), (11, 2, 3)]


def test_products_of_two_changing_operands_are_exact():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        a, da = generator.normal(size=(2, 4, 5))
        b, db = generator.normal(size=(2, 5, 3))
        _, found = difference(jnp.dot)((a, b), (1e-9 * da, 1e-9 * db))
        want = 1e-9 * (da @ b + a @ db) + 1e-18 * da @ db
        np.testing.assert_allclose(found, want, rtol=1e-13, atol=1e-22)


@pytest.mark.parametrize("changing", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "f", [jnp.add, jnp.subtract, jnp.multiply, jnp.divide], ids=lambda f: f.__name__
)
def test_binary_operations_with_one_or_both_operands_changing(f, changing):
    with jax.enable_x64(True):
        a, b = np.array([3.0, -2.0, 0.5]), np.array([1.5, 4.0, -7.0])
        changes = [np.array([0.2, 1.0, -3.0]), np.array([0.7, -0.3, 2.0])]
        da, db = (d if moves else None for d, moves in zip(changes, changing, strict=True))
        value, change = difference(f)((a, b), (da, db))
        np.testing.assert_array_equal(value, f(a, b))
        moved = f(a + (0 if da is None else da), b + (0 if db is None else db))
        np.testing.assert_allclose(change, moved - value, rtol=1e-14)


def test_a_changed_predicate_selects_the_other_case():
    def f(x):
        return jnp.where(x > 1.0, 10 * x, -x)

    x, d = jnp.array([0.5, 0.5, 2.0]), jnp.array([1.0, 0.1, -1.5])
    np.testing.assert_allclose(difference(f)((x,), (d,))[1], f(x + d) - f(x), rtol=1e-6)


def test_part_of_an_argument_may_stay_unchanged():
    arguments = ({"w": jnp.array(3.0), "x": jnp.array(2.0)},)
    _, change = difference(lambda p: p["w"] * p["x"])(arguments, ({"w": None, "x": 0.5},))
    assert change == 1.5


def test_a_primitive_without_a_rule_is_named():
    with pytest.raises(NotImplementedError, match="'sin'"):
        difference(jnp.sin)((1.0,), (0.1,))
