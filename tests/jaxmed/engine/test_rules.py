"""The rule of attention's weighted sum, against what the rules of its parts give in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.engine import rules as rules_lib
from jaxmed.engine.difference import difference
from models.layers import softmax_last_axis, weighted_sum
from models.products import Products

HEADS, GROUP, QUERIES, EARLIER, NOW, SIZE = 2, 3, 4, 7, 4, 5
MASKED = np.finfo(np.float32).min / 4


def given(seed, sharpness, scale, earlier=EARLIER):
    """Scores, values and their changes; a causal mask, and an earlier key that none sees."""
    rng = np.random.default_rng(seed)
    heads = HEADS, GROUP, QUERIES
    scores = [sharpness * rng.normal(size=(*heads, n)) for n in (earlier, NOW)]
    values = [rng.normal(size=(n, HEADS, SIZE)) + 3 for n in (NOW, earlier)]
    changes = [scale * rng.normal(size=x.shape) for x in (*scores, values[0])]
    unseen = [np.arange(earlier) == 2, np.arange(NOW) > np.arange(QUERIES)[:, None]]
    for place, mask in enumerate(unseen):
        scores[place] = np.where(mask, MASKED, scores[place])
        changes[place] = np.where(mask, 0, changes[place])
    as_float32 = functools.partial(jax.tree.map, np.float32)
    return as_float32((*scores, *values)), as_float32((*changes, None))


def change(values, changes, dtype, whole=True):
    """By its own rule, or by those of the softmax and the products in it."""
    every = dict(rules_lib.rules(Products("float32", "cpu")))
    if not whole:
        every = {softmax_last_axis: every[softmax_last_axis]}
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    with jax.default_matmul_precision("float32"):
        return difference(weighted_sum, rules=every)(cast(values), cast(changes))


@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1, 30, 1000])
def test_the_change_is_known_to_rounding(scale, sharpness):
    """Small or large, with weights that are even or all but 1 and 0, and where exponentials would
    overflow. Errors are relative to what the change is made of: weights that move, and values."""
    for seed in range(5):
        values, changes = given(seed, sharpness, scale)
        with jax.enable_x64(True):
            output, exact = change(values, changes, jnp.float64, whole=False)
            again = change(values, changes, jnp.float64)[1]
        size = np.abs(exact).max()
        assert np.abs(again - exact).max() <= 1e-13 * size
        found_output, found = change(values, changes, jnp.float32)
        assert np.abs(found - exact).max() <= 2e-6 * size
        np.testing.assert_allclose(found_output, output, rtol=2e-5)


def test_a_weight_that_all_but_is_one_moves_by_what_the_others_gain():
    """Its own change would be lost in it."""
    scores, nothing = np.zeros((1, 1, 1, 3)), np.zeros((1, 1, 1, 0))
    scores[..., 0] = 40
    values, earlier = np.array([[[1.0]], [[2.0]], [[4.0]]]), np.zeros((0, 1, 1))
    changes = np.array([[[[1e-3, 2e-3, 3e-3]]]])
    given = (nothing, scores, values, earlier), (nothing, changes, np.zeros_like(values), None)
    found = change(*given, jnp.float32)[1]
    exact = np.exp(-40) * (np.expm1(1e-3) + 3 * np.expm1(2e-3))
    np.testing.assert_allclose(found.item(), exact, rtol=2e-4)


def test_no_change_is_none_at_all():
    values, changes = given(0, 1, 0)
    assert not np.any(change(values, changes, jnp.float32)[1])


def test_a_constant_that_all_scores_gain_changes_nothing_beyond_rounding():
    values, changes = given(0, 1, 0)
    moved = [np.full_like(x, 7) for x in values[:2]]
    found = change(values, (*moved, changes[2], None), jnp.float32)[1]
    assert np.abs(found).max() <= 1e-5


def test_without_earlier_keys():
    values, changes = given(1, 1, 0.1, earlier=0)
    with jax.enable_x64(True):
        exact = change(values, changes, jnp.float64, whole=False)[1]
        found = change(values, changes, jnp.float64)[1]
    assert np.abs(found - exact).max() <= 1e-13 * np.abs(exact).max()
