"""Difference propagation through loops, branches and nested calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.jaxmed.engine.blocks import difference
from tests.jaxmed.engine.jaxprs import equations

X = np.array([0.7, -1.3, 2.1])
DIFFERENCES = np.array([[0.0, 0.0, 0.0], [0.5, -0.2, 0.1], [-3.0, 4.0, 1.0], [1e-9, 2e-9, -3e-9]])


@pytest.fixture(autouse=True)
def in_double():
    with jax.enable_x64(True):
        yield


def assert_exact(f, x, differences):
    """One by one, compiled and batched, against evaluation on both sides; d = 0 gives exactly 0."""

    def one(d):
        return difference(f)((x,), (d,))

    batched, compiled = jax.jit(jax.vmap(one)), jax.jit(one)
    values, changes = batched(differences)
    values, changes = jax.tree.leaves(values), jax.tree.leaves(changes)
    for row, d in enumerate(differences):
        before, after = jax.tree.leaves(f(x)), jax.tree.leaves(f(x + d))
        alone = jax.tree.leaves(compiled(d)[1])
        for at, (old, new) in enumerate(zip(before, after, strict=True)):
            np.testing.assert_allclose(values[at][row], old, rtol=1e-14)
            if jnp.issubdtype(old.dtype, jnp.inexact):
                want = new - old
                scale = 1 + np.max(np.abs(old)) + np.max(np.abs(new))
                np.testing.assert_allclose(changes[at][row], want, rtol=0, atol=1e-14 * scale)
                assert np.any(d) or not np.any(changes[at][row])
            else:
                # What is discrete carries its changed value.
                np.testing.assert_array_equal(changes[at][row], new)
            np.testing.assert_allclose(alone[at], changes[at][row], rtol=1e-13, atol=1e-300)


def test_a_scan_passes_changes_on_from_carry_to_carry():
    def f(x):
        def step(carry, at):
            first, second, third, count, still = carry
            carry = (first + at, second + first, third * second, count + (first > 1.0), still + 1)
            return carry, (third, count, still)

        return lax.scan(step, (x[0], 1.0, 0.5, 0, 2.0), jnp.sin(x))

    assert_exact(f, X, DIFFERENCES)


def test_a_reversed_scan_whose_constants_change():
    def f(x):
        return lax.scan(
            lambda c, at: (c * x[0] + at, jnp.cos(c)), 0.3, jnp.arange(5.0), reverse=True
        )

    assert_exact(f, X, DIFFERENCES)


def test_a_carry_that_does_not_change_is_not_propagated():
    weights = jnp.ones((4, 3, 3))

    def f(x, y):
        def step(carry, weight):
            moving, fixed = carry
            return (jnp.tanh(weight @ moving), jnp.tanh(weight @ fixed)), None

        return lax.scan(step, (x, y), weights)[0]

    def run(d):
        return difference(f)((jnp.ones(3), jnp.ones(3)), (d, None))

    loops = [e for e in equations(jax.make_jaxpr(run)(jnp.ones(3))) if e.primitive.name == "scan"]
    assert len(loops) == 1 and len(loops[0].outvars) == 3
    products = [e for e in equations(loops[0].params["jaxpr"]) if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert not np.any(run(jnp.ones(3))[1][1])


def test_values_in_a_scan_stay_unbatched():
    def f(x):
        return lax.scan(lambda c, w: (jnp.tanh(w @ c), None), x, jnp.ones((4, 3, 3)))[0]

    def batched(d):
        return jax.vmap(lambda d: difference(f)((jnp.ones(3),), (d,))[1])(d)

    jaxpr = jax.make_jaxpr(batched)(jnp.ones((11, 3)))
    products = [
        e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general"
    ]
    assert sorted(map(len, products)) == [1, 2]


def test_a_loop_whose_trip_count_does_not_change():
    def f(x):
        return lax.fori_loop(0, 6, lambda i, c: (c[0] * x + i, c[1] + 1), (x, 0))

    assert_exact(f, X, DIFFERENCES)


@pytest.mark.parametrize("power", [1.0, -1.0], ids=["changed_ends_first", "changed_ends_last"])
def test_a_loop_whose_trip_count_changes(power):
    """x doubles until it is large: a changed x needs fewer or more passes."""

    def f(x):
        def body(carry):
            total, count, steps = carry
            return total * 2 + jnp.sin(total), count + 1, steps.at[count].set(total)

        start = jnp.abs(x[0]) ** power
        return lax.while_loop(
            lambda c: (c[0] < 40.0) & (c[1] < 12), body, (start, 0, jnp.zeros(12))
        )

    counts = {int(f(X + d)[1]) for d in DIFFERENCES}
    assert len(counts) > 1
    assert_exact(f, X, DIFFERENCES)


def test_a_loop_that_only_one_side_enters():
    def f(x):
        return lax.while_loop(lambda c: c < 1.0, lambda c: c + 0.6, x[0])

    assert_exact(f, X, DIFFERENCES)
    assert_exact(f, X + 0.4, -DIFFERENCES)


def test_a_counter_stays_behind_when_only_the_bound_changes():
    def f(x):
        bound = jnp.floor(3 + x[0]).astype(int)
        return lax.while_loop(lambda c: c[0] < bound, lambda c: (c[0] + 1, c[1] * 1.5), (0, 1.0))

    assert_exact(f, X, DIFFERENCES)


def test_a_small_change_is_kept_through_a_loop_with_a_changed_predicate():
    """Both sides leave together: nothing is subtracted."""

    def f(x):
        return lax.while_loop(lambda c: c < 10.0, lambda c: 1.5 * c, x)

    _, change = jax.jit(difference(f))((0.7,), (1e-18,))
    np.testing.assert_allclose(change, 1e-18 * 1.5**7, rtol=1e-14)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_branch_that_does_not_change(index):
    def f(x):
        branches = [jnp.exp, lambda x: x * x, lambda x: jnp.ones_like(x)]
        return lax.switch(index, branches, x), lax.cond(index > 0, lambda x: x[0], jnp.sum, x)

    assert_exact(f, X, DIFFERENCES)


def test_a_branch_that_changes():
    def f(x):
        index = jnp.floor(x[0]).astype(int)
        branches = [jnp.exp, lambda x: x * x + 1, lambda x: jnp.ones_like(x)]
        return lax.switch(index, branches, x), lax.cond(x[1] > 0, lambda x: (x[0], 1), g, x)

    def g(x):
        return jnp.sum(x), 2

    assert_exact(f, X, DIFFERENCES)


def test_a_branch_with_a_changed_index_that_stays_the_same_is_not_subtracted():
    def f(x):
        return lax.cond(x > 0.5, lambda x: 3 * x, lambda x: x, x)

    _, change = jax.jit(difference(f))((0.7,), (1e-18,))
    np.testing.assert_allclose(change, 3e-18, rtol=1e-14)


def test_nested_calls():
    @jax.custom_vjp
    def with_vjp(x):
        return jnp.exp(x) * 2

    with_vjp.defvjp(lambda x: (with_vjp(x), x), lambda x, g: (g,))

    def f(x):
        inner = jax.checkpoint(lambda x: jax.jit(jnp.sin)(x) * with_vjp(x))
        return jax.nn.relu(inner(x)), lax.optimization_barrier((x, 2.0))[0] * lax.stop_gradient(x)

    assert_exact(f, X, DIFFERENCES)


def test_a_barrier_keeps_what_does_not_change_unchanged():
    def f(x, y):
        x, y = lax.optimization_barrier((x, y))
        return x + 1, jnp.exp(y)

    jaxpr = jax.make_jaxpr(lambda d: difference(f)((X, X), (d, None)))(X)
    assert sum(e.primitive.name == "exp" for e in equations(jaxpr)) == 1


def test_a_scan_in_a_loop_in_a_branch():
    def f(x):
        def body(carry):
            count, at = carry
            at = lax.scan(lambda c, w: (jnp.tanh(c + w), c), at, x)[0]
            return count + 1, at

        def loop(x):
            return lax.while_loop(lambda c: c[1] + c[0] < 3.2, body, (0, x[0]))[1]

        return lax.cond(x[1] < 0, loop, lambda x: x[2], x)

    assert_exact(f, X, DIFFERENCES)
