"""Difference propagation through a block of every decoder family, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jaxmed.engine import blocks
from tests.jaxmed.engine.blocks import difference
from tests.jaxmed.engine.jaxprs import equations

BATCH, PREFIX = 11, 13


def block(family: str, dtype, prefix_length: int = PREFIX):
    """The family's block as a function of x, and an x."""
    weights = blocks.Weights(dtype)
    prefix = weights.prefix(prefix_length)
    x = weights("x", blocks.T, blocks.D)
    return lambda x: blocks.FAMILIES[family](weights, x, prefix), x


def batched(f, x, differences):
    """f(x), and its differences."""
    return jax.vmap(lambda d: difference(f)((x,), (d,)), out_axes=(None, 0))(differences)


def relative_error(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    "family, prefix_length", [*((f, PREFIX) for f in blocks.FAMILIES), ("llama", 0)]
)
def test_a_block_changes_as_evaluation_on_both_sides_says(family, prefix_length):
    sizes = np.float32([1.0, 30.0, 1e-7, 0.0])[:, None, None]
    generator = np.random.default_rng(1)
    differences = sizes * generator.normal(size=(4, blocks.T, blocks.D)).astype(np.float32)
    with jax.enable_x64(True):
        f, x = block(family, "float64", prefix_length)
        value, in_double = jax.jit(lambda d: batched(f, x, d))(differences.astype("float64"))
        f = jax.jit(f)
        direct = np.stack([f(x + step) - f(x) for step in differences])
        np.testing.assert_allclose(value, f(x), rtol=1e-13, atol=1e-13)
    in_double = np.asarray(in_double)
    for size in range(2):
        assert relative_error(in_double[size], direct[size]) <= 1e-13
    # Here direct evaluation knows no more than the rounding of the values leaves.
    assert np.linalg.norm(in_double[2] - direct[2]) <= 1e-14 * np.linalg.norm(value)
    assert not np.any(in_double[3])

    f, x = block(family, "float32", prefix_length)
    in_single = np.asarray(jax.jit(lambda d: batched(f, x, d)[1])(differences), np.float64)
    for size in range(3):
        assert relative_error(in_single[size], in_double[size]) <= 3e-6
    assert not np.any(in_single[3])


def output_shapes(jaxpr):
    """Of all matrix products, but for a norm's means, which may be products with one column."""
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return [e.outvars[0].aval.shape for e in products if e.invars[1].aval.shape[1:] != (1,)]


@pytest.mark.parametrize("family", blocks.FAMILIES)
def test_a_batch_of_differences_leaves_the_prefix_and_the_values_unbatched(family):
    f, x = block(family, "float32")
    jaxpr = jax.make_jaxpr(lambda d: batched(f, x, d))(jnp.ones((BATCH, blocks.T, blocks.D)))
    for equation in equations(jaxpr):
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        for shape in shapes:
            if BATCH in shape and (PREFIX in shape or PREFIX + blocks.T in shape):
                # Scores: of keys and values one axis is the head's size.
                assert blocks.HEAD_DIM not in shape, (equation.primitive.name, shape)
    products, plain = output_shapes(jaxpr), output_shapes(jax.make_jaxpr(f)(x))
    unbatched = [shape for shape in products if BATCH not in shape]
    assert sorted(unbatched) == sorted(plain)
    # Scores and sums of values have two changing operands, all others one.
    both = 2
    assert len(products) - len(unbatched) == len(plain) + both
