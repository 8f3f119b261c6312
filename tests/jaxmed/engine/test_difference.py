"""Difference propagation as a whole: the named functions, precision, symbolic zeros, sharding.

Its other tests: `test_difference_accuracy` (elementwise rules in many digits),
`test_difference_rules` (every rule under vmap and jit), `test_difference_control` (loops and
branches), `test_difference_families` (decoder blocks).
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import lax
from mpmath import mpf

from jaxmed.engine import difference as difference_lib
from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import inverse_rms_last_axis, softmax_last_axis
from tests.jaxmed.engine.blocks import difference, layer_norm, log_softmax_last_axis
from tests.jaxmed.engine.jaxprs import equations

ROOT = pathlib.Path(__file__).parents[3]


def outputs_and_slopes(row):
    """Softmax, log-softmax and log-sum-exp in mpmath, and the derivatives of each output."""
    total = mpmath.log(sum(mpmath.exp(a) for a in row))
    logs = [a - total for a in row]
    p = [mpmath.exp(a) for a in logs]
    places = range(len(row))
    slopes = {
        "softmax": [[p[j] * ((j == k) - p[k]) for k in places] for j in places],
        "log_softmax": [[(j == k) - p[k] for k in places] for j in places],
        "logsumexp": [p],
    }
    return {"softmax": p, "log_softmax": logs, "logsumexp": [total]}, slopes


NAMED = {
    "softmax": softmax_last_axis,
    "log_softmax": log_softmax_last_axis,
    "logsumexp": logsumexp_last_axis,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 30.0, 150.0])
@pytest.mark.parametrize("name", NAMED)
def test_softmax_differences_are_accurate_to_rounding_and_do_not_overflow(name, size, dtype):
    """The contract of the elementwise rules, for every output: 10 epsilons times its condition."""
    generator = np.random.default_rng(0)
    x = (10 * generator.normal(size=(24, 6))).astype(dtype)
    d = (size * generator.normal(size=x.shape)).astype(dtype)
    # Also: one score changes alone; an unlikely one changes much, the others little.
    d[8:16, 1:] = 0
    x[16:, 0] -= 60
    d[16:, 0] = 2
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(difference(NAMED[name]))((x,), (d,))[1], np.float64)
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    for row, step, changes in zip(x, d, found.reshape(len(x), -1), strict=True):
        with mpmath.workdps(150):
            before = [mpf(float(a)) for a in row]
            step = [mpf(float(b)) for b in step]
            after = [a + b for a, b in zip(before, step, strict=True)]
            (old, slopes_before), (new, slopes_after) = map(outputs_and_slopes, (before, after))
            for j, change in enumerate(changes):
                want = new[name][j] - old[name][j]
                magnified = sum(
                    abs(a * (s1 - s0)) + abs(b * s1)
                    for a, b, s0, s1 in zip(
                        before, step, slopes_before[name][j], slopes_after[name][j], strict=True
                    )
                )
                allowed = 10 * eps * max(magnified, abs(want)) + tiny
                assert abs(change - want) <= allowed, (row, step, j)


@pytest.mark.parametrize("name", NAMED)
def test_a_masked_score_may_be_lifted_back_or_masked(name):
    masked = np.float32(np.finfo(np.float32).min / 4)
    x = np.array([[1.0, masked, 2.0], [1.0, 0.5, 2.0], [masked, masked, masked], [-1e38, 0, 1]])
    after = np.array([[1.0, 0.0, 2.0], [1.0, masked, 2.0], [masked, 0, masked], [4, 0, 1.0]])
    x, d = x.astype(np.float32), (after - x).astype(np.float32)
    function = NAMED[name]
    _, change = difference(function)((x,), (d,))
    want = np.asarray(function(x + d), np.float64) - np.asarray(function(x), np.float64)
    np.testing.assert_allclose(change, want, rtol=1e-6, atol=1e-7)


def test_a_score_that_is_minus_infinity_stays_so():
    x, d = jnp.array([[0.3, -jnp.inf, 1.0]]), jnp.array([[0.1, 0.0, -0.2]])
    _, change = difference(softmax_last_axis)((x,), (d,))
    np.testing.assert_allclose(change, softmax_last_axis(x + d) - softmax_last_axis(x), atol=1e-7)
    _, change = difference(logsumexp_last_axis)((x,), (d,))
    np.testing.assert_allclose(
        change, logsumexp_last_axis(x + d) - logsumexp_last_axis(x), rtol=1e-6
    )


def massive(dtype):
    """Rows with one entry far above the others, and differences that remove it or add it."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 8))
    after = generator.normal(size=x.shape)
    size = 10.0 ** generator.uniform(1, 3, 40)
    x[:20, 3], after[20:, 3] = size[:20], size[20:]
    return x.astype(dtype), (after - x).astype(dtype), size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_difference_of_a_norm_survives_that_its_largest_entry_is_removed_or_added(dtype):
    x, d, size = massive(dtype)
    with jax.enable_x64(True):
        function = functools.partial(inverse_rms_last_axis, eps=1e-5)
        found = np.asarray(difference(function)((x,), (d,))[1], np.float64)[:, 0]

    def exact_value(row):
        mean_square = sum(entry**2 for entry in row) / len(row) + mpf(1e-5)
        return 1 / mpmath.sqrt(mean_square)

    for row, step, largest, change in zip(x, d, size, found, strict=True):
        with mpmath.workdps(60):
            before = [mpf(float(a)) for a in row]
            after = [a + mpf(float(b)) for a, b in zip(before, step, strict=True)]
            want = float(exact_value(after) - exact_value(before))
        # x + d is known to the rounding of its operands, which are up to 1000 times the result.
        assert abs(change - want) <= 10 * np.finfo(dtype).eps * largest * abs(want)


def test_a_layer_norm_survives_that_its_largest_entry_is_removed_or_added():
    """The ordinary rules do for it, with the norm of the centred x."""
    x, d, size = massive("float32")
    weight, bias = np.float32(1.3), np.float32(-0.2)
    found = difference(lambda x: layer_norm(x, weight, bias))((x,), (d,))[1]
    with jax.enable_x64(True):
        x, d = x.astype("float64"), d.astype("float64")
        want = layer_norm(x + d, weight, bias) - layer_norm(x, weight, bias)
        error = np.max(np.abs(found - want), axis=1)
        assert np.all(error <= 10 * np.finfo("float32").eps * size * np.max(np.abs(want), axis=1))


# --- What is computed --------------------------------------------------------------------------


def products(f, *arguments):
    """The matrix products of f: their operands' and outputs' shapes and types."""
    return [
        [(v.aval.shape, v.aval.dtype) for v in (*e.invars, *e.outvars)]
        for e in equations(jax.make_jaxpr(f)(*arguments))
        if e.primitive.name == "dot_general"
    ]


def test_what_does_not_change_costs_nothing():
    def unchanged(x, w):
        return difference(jnp.dot)((x, w), (None, None))

    assert len(products(unchanged, jnp.ones((2, 3)), jnp.ones((3, 4)))) == 1


def test_a_batch_of_differences_leaves_the_values_unbatched():
    def f(x):
        return jax.nn.silu(x @ jnp.ones((5, 7))) @ jnp.ones((7, 3))

    def batched(x, d):
        return jax.vmap(lambda change: difference(f)((x,), (change,))[1])(d)

    found = products(batched, jnp.ones((2, 5)), jnp.ones((11, 2, 5)))
    shapes = [output[0] for *_, output in found]
    assert sorted(shapes, key=len) == [(2, 7), (2, 3), (11, 2, 7), (11, 2, 3)]


@pytest.mark.parametrize(
    "f, exponentials",
    [(jax.nn.silu, 1), (jnp.tanh, 1), (jnp.exp, 1), (softmax_last_axis, 1), (lax.logistic, 1)],
    ids=["silu", "tanh", "exp", "softmax", "logistic"],
)
def test_a_batch_of_differences_costs_one_exponential(f, exponentials):
    def batched(x, d):
        return jax.vmap(lambda change: difference(f)((x,), (change,))[1])(d)

    compiled = jax.jit(batched).lower(jnp.ones(5), jnp.ones((11, 5))).compile()
    text = compiled.as_text()
    found = [line for line in text.splitlines() if " exponential(" in line and "f32[11," in line]
    assert len(found) == exponentials
    assert "exponential-minus-one" not in text


def test_products_of_two_changing_operands_are_exact():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        a, da = generator.normal(size=(2, 4, 5))
        b, db = generator.normal(size=(2, 5, 3))
        _, found = difference(jnp.dot)((a, b), (1e-9 * da, 1e-9 * db))
        want = 1e-9 * (da @ b + a @ db) + 1e-18 * da @ db
        np.testing.assert_allclose(found, want, rtol=1e-13, atol=1e-22)


def test_part_of_an_argument_may_stay_unchanged():
    arguments = ({"w": jnp.array(3.0), "x": jnp.array(2.0)},)
    _, change = difference(lambda p: p["w"] * p["x"])(arguments, ({"w": None, "x": 0.5},))
    assert change == 1.5


def test_a_difference_takes_its_values_shape_and_type():
    _, change = difference(lambda x: x.reshape(3, 1) * 2)((jnp.ones(3),), (1,))
    np.testing.assert_array_equal(change, 2 * jnp.ones((3, 1)))
    assert change.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_difference_has_the_values_type(dtype):
    def f(x):
        return jax.nn.gelu(jax.nn.silu(x) @ jnp.ones((4, 4), dtype)) + jnp.tanh(x)

    x = jnp.ones((2, 4), dtype)
    value, change = difference(f)((x,), (x,))
    assert value.dtype == change.dtype == dtype


# --- Primitives without a rule -----------------------------------------------------------------


def test_a_primitive_without_a_rule_is_named_with_the_way_out():
    with pytest.raises(NotImplementedError, match="'erf_inv'.*fallback=True"):
        difference(lax.erf_inv)((0.1,), (0.1,))


def test_a_primitive_without_a_rule_may_be_evaluated_on_both_sides():
    def f(x):
        values, indices = lax.top_k(jnp.exp(x), 2)
        return lax.scan(lambda c, v: (lax.erf_inv(c * v / 10), indices), 1.0, values)

    x, d = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.5, 1.1, -0.4])
    with pytest.raises(NotImplementedError, match="'top_k'"):
        difference(f)((x,), (d,))
    _, (change, indices) = jax.jit(difference(f, fallback=True))((x,), (d,))
    np.testing.assert_allclose(change, f(x + d)[0] - f(x)[0], rtol=1e-5)
    np.testing.assert_array_equal(indices, f(x + d)[1])


# --- Rules of functions as wholes --------------------------------------------------------------


def test_a_function_of_the_same_name_is_another_function():
    def another(x):
        return 2 * x

    another.__name__ = softmax_last_axis.__name__
    x, d = np.ones((2, 3), np.float32), np.full((2, 3), 1e-3, np.float32)
    other = jax.jit(another)
    _, change = difference(other)((x,), (d,))
    np.testing.assert_array_equal(change, 2 * d)


def test_two_functions_of_one_name_are_refused():
    def silu(x):
        return x

    with pytest.raises(ValueError, match="two functions named 'silu'"):
        difference_lib.difference(
            jnp.exp, rules={jax.nn.silu: difference_lib.silu, jax.jit(silu): difference_lib.silu}
        )


def test_a_rule_applies_to_its_function_alone():
    def rule(a, d):
        return a, 7 * d

    @jax.jit
    def doubled(x):
        return 2 * x

    x, d = np.ones(3, np.float32), np.ones(3, np.float32)
    f = difference_lib.difference(lambda x: doubled(x) + x, rules={doubled: rule})
    np.testing.assert_array_equal(f((x,), (d,)), np.stack([2 * x, 8 * d]))
    plain = difference_lib.difference(lambda x: doubled(x) + x)
    np.testing.assert_array_equal(plain((x,), (d,)), np.stack([3 * x, 3 * d]))


# --- Many devices ------------------------------------------------------------------------------

SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tests.jaxmed.engine import blocks
from tests.jaxmed.engine.blocks import difference

weights = blocks.Weights("float32")
x, prefix = weights("x", blocks.T, blocks.D), weights.prefix(3)
d = np.random.default_rng(0).normal(size=(8, blocks.T, blocks.D)).astype("float32")

def f(x):
    return blocks.gemma2(weights, x, prefix)

run = jax.jit(jax.vmap(lambda d: difference(f)((x,), (d,))[1]))
alone = run(d)
mesh = jax.make_mesh((4,), ("sweep",), axis_types=(AxisType.Auto,))
placed = NamedSharding(mesh, PartitionSpec("sweep"))
shared = run(jax.device_put(d, placed))
assert len(shared.addressable_shards) == 4, shared.sharding
assert shared.addressable_shards[0].data.shape[0] == 2, shared.sharding
np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-6 * np.abs(alone).max())
compiled = run.lower(jax.device_put(d, placed)).compile().as_text()
for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
    assert collective not in compiled, collective
print("equal")
"""


def test_a_batch_sharded_over_a_mesh_gives_the_same_without_communication():
    found = subprocess.run(
        [sys.executable, "-c", SHARDED],
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout == "equal\n", found.stderr
