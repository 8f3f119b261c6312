"""The functions of models and metrics whose differences have a rule as a whole."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmed.engine import difference
from jaxmed.engine.difference import NamedRule, Several, Value, exp_change
from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import (
    inverse_rms_last_axis,
    softmax_last_axis,
    sums_of,
    weighted_sum,
)
from models.products import Products, multiplied


@jax.jit
def with_change(
    value: Float[Array, "..."], change: Float[Array, "..."], where: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The value itself; its difference is that of `change` where `where` has changed to True, and
    what has been carried to the value elsewhere."""
    del change, where
    return value


def rules(products: Products) -> Mapping[Callable, NamedRule | Several]:
    """The rules, for a model that multiplies so by its weights."""

    def change_of_product(a, d, weight):
        """Linear in d, which may be cut into fewer parts than a."""
        return multiplied(a, weight, products.of_values), multiplied(d, weight, products)

    mean = _mean_by_product if products.platform == "cpu" else _mean
    inverse_rms = functools.partial(difference.inverse_rms, mean=mean)
    return {
        multiplied: change_of_product,
        with_change: Several(_given, changing=3),
        softmax_last_axis: difference.softmax,
        weighted_sum: Several(_weighted_sum, changing=3),
        inverse_rms_last_axis: inverse_rms,
        jax.nn.silu: difference.silu,
        logsumexp_last_axis: difference.logsumexp,
    }


def _given(value, change, where, carried, given, changed):
    """The rule of `with_change`."""
    del change, where
    return value, jnp.where(changed, given, carried)


def _mean(x: Value) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def _mean_by_product(x: Value) -> Array:
    """XLA's CPU backend forms the product with a vector ten times faster than the sum where an axis
    of the batch has length 1."""
    weights = jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)
    return jnp.dot(x, weights, precision=jax.lax.Precision.HIGHEST)


# Beyond which no exponential is let grow, of weights that are 1 at most before they change.
_SAFE_EXPONENT = 30


def _weighted_sum(
    earlier_scores: Array,
    scores: Array,
    values: Array,
    d_earlier: Array,
    d_scores: Array,
    d_values: Array,
    earlier_values: Array,
) -> tuple[Array, Array]:
    """The rule of attention's sum of weighted values, sum of p v, in few passes over the scores.

    With p = softmax(a) and any constant c, t = p expm1(d - c) and T = sum(t) give the change

        (sum of t (v + dv) - T sum of p v + sum of p dv) / (1 + T).

    c is the mean of d by p, so that T >= 0 (Jensen's inequality) and nothing cancels in 1 + T; it
    is raised where an exponential would overflow. What t lacks, by the rounding of c, it lacks in
    T as well.
    """
    before = earlier_scores.shape[-1]
    a = jnp.concatenate([earlier_scores, scores], axis=-1)
    largest = jnp.max(a, axis=-1, keepdims=True)
    log_p = a - largest
    log_p = log_p - jnp.log(jnp.sum(jnp.exp(log_p), axis=-1, keepdims=True))
    p = jnp.exp(log_p)
    parts = [
        (p[..., :before], log_p[..., :before], d_earlier),
        (p[..., before:], log_p[..., before:], d_scores),
    ]

    def over_keys(reduce, combine, f):
        return functools.reduce(combine, [reduce(f(*part), -1, keepdims=True) for part in parts])

    mean = over_keys(jnp.sum, jnp.add, lambda p, log_p, d: p * d)
    reduce_max = functools.partial(jnp.max, initial=-jnp.inf)
    highest = over_keys(reduce_max, jnp.maximum, lambda p, log_p, d: log_p + d)
    c = mean + jnp.maximum(highest - mean - _SAFE_EXPONENT, 0)

    def weight_change(p, log_p, d):
        d = d - c
        return exp_change(p, jnp.exp(log_p + d), d)

    earlier_t, t = (weight_change(*part) for part in parts)
    total = jnp.sum(earlier_t, -1, keepdims=True) + jnp.sum(t, -1, keepdims=True)

    p_now = p[..., before:]
    output = sums_of(p_now, values) + sums_of(p[..., :before], earlier_values)
    moved = sums_of(earlier_t, earlier_values) + sums_of(t, values)
    moved = moved + sums_of(t + p_now, d_values)
    total = jnp.moveaxis(total, 2, 0)
    return output, (moved - total * output) / (1 + total)
