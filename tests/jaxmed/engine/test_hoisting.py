"""What does not depend on the argument is computed before it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmed.engine.hoisting import hoisted
from tests.jaxmed.engine import jaxprs

X = jnp.linspace(-1, 1, 12).reshape(3, 4)
Y = jnp.linspace(2, 3, 12).reshape(3, 4)


def functions():
    """Functions of Y that depend on X as well, by what stands in them."""
    inner = jax.jit(lambda x, y: (jnp.exp(x), jnp.sin(x) * y))

    @jax.custom_jvp
    def custom(x, y):
        return jnp.tanh(x) + y

    custom.defjvp(lambda values, tangents: (custom(*values), tangents[1]))

    def loop(y):
        return lax.scan(lambda total, x: (total * x, total), y[0], X)

    return {
        "plain": lambda y: jnp.exp(X) @ y.T,
        "several": lambda y: {"both": (X + y, X), "neither": jnp.exp(X)},
        "called": lambda y: inner(X, y),
        "custom": lambda y: custom(X, y),
        "loop": loop,
        "conditional": lambda y: lax.cond(y[0, 0] > 0, lambda: X @ y.T, lambda: y @ X.T),
    }


@pytest.mark.parametrize("name", functions())
def test_the_same_is_computed(name):
    f = functions()[name]
    batch = jnp.stack([Y, 2 * Y, Y - 1])
    remaining = hoisted(f, Y)
    jax.tree.map(np.testing.assert_array_equal, remaining(Y), f(Y))
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(remaining)(batch), jax.vmap(f)(batch))


@pytest.mark.parametrize("name", ["plain", "called", "custom"])
def test_what_is_known_is_not_computed_again(name):
    remaining = hoisted(functions()[name], Y)
    left = {e.primitive.name for e in jaxprs.equations(jax.make_jaxpr(remaining)(Y))}
    assert left and not left & {"exp", "sin", "tanh"}


def test_what_is_widened_is_widened_where_it_is_used():
    """A narrow weight stays narrow until then, also where a product of it is known."""
    weight = X.T.astype(jnp.bfloat16)
    known = jnp.ones((1, 4))

    def f(y):
        wide = weight.astype(jnp.float32)
        return y @ wide + known @ wide

    jaxpr = jax.make_jaxpr(hoisted(f, Y))(Y)
    assert [e.primitive.name for e in jaxprs.equations(jaxpr)].count("dot_general") == 1
    assert [v.dtype.name for v in jaxpr.consts if v.shape == (4, 3)] == ["bfloat16"]
    np.testing.assert_array_equal(hoisted(f, Y)(Y), f(Y))


def test_it_may_be_made_and_used_while_another_function_is_traced():
    def f(x, y):
        remaining = hoisted(lambda y: jnp.exp(x) * y, y)
        return lax.fori_loop(0, 3, lambda _, total: total + remaining(total), y)

    def plain(x, y):
        return lax.fori_loop(0, 3, lambda _, total: total + jnp.exp(x) * total, y)

    np.testing.assert_allclose(jax.jit(f)(X, Y), plain(X, Y), rtol=1e-6)
