"""The functions of models and metrics whose differences have a rule as a whole."""

from collections.abc import Callable, Mapping

import jax

from jaxmed.engine import difference
from jaxmed.engine.difference import NamedRule, Several
from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import inverse_rms_last_axis, softmax_last_axis, weighted_sum
from models.products import Products, multiplied

_RULES = {
    softmax_last_axis: difference.softmax,
    weighted_sum: Several(difference.weighted_sum, changing=3),
    inverse_rms_last_axis: difference.inverse_rms,
    jax.nn.silu: difference.silu,
    logsumexp_last_axis: difference.logsumexp,
}


def rules(products: Products) -> Mapping[Callable, NamedRule | Several]:
    """The rules, for a model that multiplies so by its weights."""

    def change_of_product(a, d, weight):
        """Linear in d, which may be cut into fewer parts than a."""
        return multiplied(a, weight, products.of_values), multiplied(d, weight, products)

    return {**_RULES, multiplied: change_of_product}
