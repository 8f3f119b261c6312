"""How tokens are chosen, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.behaviour.sampling import Choice


def restricted(scores, top_k, top_p):
    """Which tokens may be drawn, in float64."""
    order = np.argsort(-scores, kind="stable")
    allowed = np.ones(len(scores), bool)
    if top_k:
        allowed &= scores >= scores[order[min(top_k, len(scores)) - 1]]
    chances = np.where(allowed, np.exp(scores - scores.max()), 0)
    chances /= chances.sum()
    before = np.cumsum(chances[order]) - chances[order]
    allowed[order] &= before < top_p
    return allowed


@pytest.mark.parametrize("top_k, top_p", [(0, 1), (5, 1), (1, 1), (99, 1), (0, 0.6), (0, 1e-6)])
@pytest.mark.parametrize("both", [(20, 0.8), (3, 0.99)])
def test_restrictions_are_the_definition(top_k, top_p, both):
    for k, p in ((top_k, top_p), both):
        for seed in range(5):
            scores = np.random.default_rng(seed).normal(0, 2, 61).astype(np.float32)
            choice = _choice(1.0, top_p=p, top_k=k)
            found = np.asarray(choice.restrict(scores))
            allowed = restricted(scores.astype(float), k, p)
            np.testing.assert_array_equal(np.isfinite(found), allowed)
            np.testing.assert_array_equal(found[allowed], scores[allowed])


def _choice(temperature, *, top_p=1.0, top_k=0, seeds=(0,)):
    return Choice(
        keys=jax.vmap(jax.random.key)(np.array(seeds, np.uint32)),
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(top_k),
    )


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 1.0], np.float32)
    draws = 20_000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 2)):
        choice = _choice(temperature, top_k=top_k, seeds=range(draws))
        found = np.bincount(choice(np.tile(scores, (draws, 1)), 0), minlength=5) / draws
        chances = np.exp(scores / temperature) * restricted(scores, top_k, 1)
        chances /= chances.sum()
        # Five standard errors.
        assert np.all(np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / draws))


def test_steps_draw_from_keys_of_their_own():
    scores = np.zeros((1, 61), np.float32)
    key = jax.random.key(7)
    choice = jax.jit(_choice(1.0, seeds=[7]).__call__)
    found = [int(choice(scores, step)[0]) for step in range(20)]
    want = [int(jax.random.categorical(jax.random.fold_in(key, s), scores[0])) for s in range(20)]
    assert found == want and len(set(found)) > 10
