"""How tokens are chosen, against the definition."""

import jax
import numpy as np
import pytest

from jaxmed.behaviour.sampling import Choice, Sampling


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


def by_sorting(scores, top_p):
    """Which of them transformers would draw from: sorted, and summed from the least likely one."""
    order = np.argsort(scores, kind="stable")
    chances = np.exp(scores.astype(float) - scores.max())
    below = np.cumsum(chances[order]) / chances.sum()
    allowed = np.zeros(len(scores), bool)
    allowed[order] = below > 1 - top_p
    allowed[order[-1]] = True
    return allowed


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 1.0, 30.0, 1e6, 1e30])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_without_sorting_keeps_what_sorting_keeps(temperature, top_p):
    """However flat or steep, and of equals those that come last."""
    rng = np.random.default_rng(3)
    restrict = jax.jit(lambda scores: _choice(1.0, top_p=top_p).restrict(scores))
    many, coarse = rng.normal(0, 3, 5000), rng.integers(-3, 3, 5000)
    for logits in (many, coarse, np.zeros(5000), -np.abs(many), many + 50):
        with np.errstate(over="ignore"):
            scores = ((logits - logits.max()) / temperature).astype(np.float32)
        found = np.isfinite(restrict(scores))
        want = by_sorting(scores, top_p)
        # Sums are rounded: where p is met to seven digits, a token more or less is kept.
        assert abs(int(found.sum()) - int(want.sum())) <= near(scores, top_p)
        kept = np.flatnonzero(found)
        order = np.argsort(scores, kind="stable")
        np.testing.assert_array_equal(kept, np.sort(order[len(order) - len(kept) :]))


def near(scores, top_p):
    """How many tokens lie where the sum is p, to rounding."""
    chances = np.exp(np.sort(scores.astype(float))[::-1])
    before = np.cumsum(chances) / chances.sum()
    return int(np.sum(np.abs(before - top_p) < 2e-6))


@pytest.mark.parametrize("temperature", [1e-38, 1e-10, 1e10, 1e37])
@pytest.mark.parametrize("restrictions", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_no_temperature_overflows(temperature, restrictions):
    """By the least, the likeliest is drawn, of numbers that overflow once they are divided."""
    logits = np.array([[80.0, -80.0, 3.0, 79.0, 0.0]], np.float32)
    draw = jax.jit(_choice(temperature, **restrictions).__call__)
    found = {int(draw(logits, np.uint32([7]), np.int32([step]))[0]) for step in range(60)}
    kept = {"top_p": 5, "top_k": 3}.get(next(iter(restrictions), ""), 5)
    assert found == {0} if temperature < 1 else len(found) == kept


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


def _choice(temperature, *, top_p=1.0, top_k=0):
    return Choice.of(Sampling(temperature=temperature, top_p=top_p, top_k=top_k))


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 1.0], np.float32)
    draws = 20_000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 2)):
        seeds, steps = np.arange(draws, dtype=np.uint32), np.zeros(draws, np.int32)
        choice = _choice(temperature, top_k=top_k)
        tokens = choice(np.tile(scores, (draws, 1)), seeds, steps)
        found = np.bincount(tokens, minlength=5) / draws
        chances = np.exp(scores / temperature) * restricted(scores, top_k, 1)
        chances /= chances.sum()
        # Five standard errors.
        assert np.all(np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / draws))


def test_steps_draw_from_keys_of_their_own():
    scores = np.zeros((1, 61), np.float32)
    key = jax.random.key(7)
    choice = jax.jit(_choice(1.0).__call__)
    steps = np.arange(20, dtype=np.int32)
    seeds = np.full(20, 7, np.uint32)
    found = choice(np.repeat(scores, 20, 0), seeds, steps).tolist()
    want = [int(jax.random.categorical(jax.random.fold_in(key, s), scores[0])) for s in range(20)]
    assert found == want and len(set(found)) > 10
