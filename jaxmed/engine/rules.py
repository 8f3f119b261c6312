"""The functions of models and metrics whose differences have a rule as a whole."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmed.engine import difference
from jaxmed.engine.difference import NamedRule, Several
from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import inverse_rms_last_axis, softmax_last_axis, weighted_sum
from models.products import Products, multiplied


@jax.jit
def with_change(
    value: Float[Array, "..."], change: Float[Array, "..."], where: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The value itself; its difference is that of `change` where `where` has changed to True, and
    what has been carried to the value elsewhere."""
    del change, where
    return value


def _given(value, change, where, carried, given, changed):
    del change, where
    return value, jnp.where(changed, given, carried)


_RULES = {
    with_change: Several(_given, changing=3),
    softmax_last_axis: difference.softmax,
    weighted_sum: Several(difference.weighted_sum, changing=3),
    jax.nn.silu: difference.silu,
    logsumexp_last_axis: difference.logsumexp,
}


def rules(products: Products) -> Mapping[Callable, NamedRule | Several]:
    """The rules, for a model that multiplies so by its weights."""

    def change_of_product(a, d, weight):
        """Linear in d, which may be cut into fewer parts than a."""
        return multiplied(a, weight, products.of_values), multiplied(d, weight, products)

    mean = _mean_by_product if products.platform == "cpu" else _mean
    inverse_rms = functools.partial(difference.inverse_rms, mean=mean)
    return {**_RULES, multiplied: change_of_product, inverse_rms_last_axis: inverse_rms}


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def _mean_by_product(x: Array) -> Array:
    """XLA's CPU backend forms the product with a vector ten times faster than the sum where an axis
    of the batch has length 1."""
    weights = jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)
    return jnp.dot(x, weights, precision=jax.lax.Precision.HIGHEST)
