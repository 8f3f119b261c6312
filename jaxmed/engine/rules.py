"""The functions of models and metrics whose differences have a rule as a whole."""

import jax

from jaxmed.engine import difference
from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import inverse_rms_last_axis, softmax_last_axis

RULES = {
    softmax_last_axis: difference.softmax,
    inverse_rms_last_axis: difference.inverse_rms,
    jax.nn.silu: difference.silu,
    logsumexp_last_axis: difference.logsumexp,
}
