"""Annotations are checked while tests run."""

import jax
import jax.numpy as jnp
import pytest

from models.layers import Cache, capped


def zeros(length):
    return jnp.zeros((2, length, 3, 4))


@pytest.mark.parametrize("values, positions", [(6, 5), (5, 4)])
def test_fields_whose_shapes_differ_are_refused(values, positions):
    with pytest.raises(TypeError, match="Cache.__init__"):
        Cache(zeros(5), zeros(values), jnp.arange(positions), jnp.ones(5, bool))


def test_arguments_of_another_type_are_refused():
    assert capped(jnp.ones(2), 3).shape == (2,)  # an int is a float
    with pytest.raises(TypeError, match="capped"):
        capped(jnp.arange(2), 3.0)


def test_pytrees_of_what_jax_maps_to_are_not():
    whole = Cache(zeros(5), zeros(5), jnp.arange(5), jnp.ones(5, bool))
    assert jax.tree.map(lambda leaf: leaf.ndim, whole) == Cache(4, 4, 1, 1)
