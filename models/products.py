"""Products with weights: how exactly they are made, and how weights lie in memory.

A weight of a bfloat16 checkpoint is exact in bfloat16, and the matrix units of accelerators (and of
CPUs with AMX or AVX512-BF16) multiply bfloat16 numbers and sum in float32. So a float32 operand is
cut into parts of 8 bits each, x = x1 + x2 + x3, and every part is multiplied as bfloat16: two parts
leave a relative error of 2^-17, three 2^-25, which is less than float32's own. A weight that
bfloat16 does not hold exactly is cut as well (Henry, Tang, Heinecke: Leveraging the bfloat16
artificial intelligence datatype for higher-precision computations, arXiv 1904.06376).

Values are always multiplied as exactly as float32 does it. Fewer parts are for differences, whose
rounding is relative to the difference and not to the value (`jaxmed.engine.difference`).

Weights stay as they are stored. XLA's CPU backend widens a whole stack of bfloat16 layers when one
of them is sliced in a loop, but no integers: a bfloat16 matrix is kept as its bits, in uint16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from models.errors import InputError

# How a difference is multiplied by weights: as numbers of its own type, which is float32 but in a
# float64 model; or in so many bfloat16 parts.
PARTS = {"float32": None, "split3": 3, "split2": 2, "bfloat16": 1}
PRECISIONS = tuple(PARTS)
# Those as exact as float32; values are multiplied in no others.
EXACT = ("float32", "split3")

# Into so many parts of 8 bits go the 8, 11 and 24 bits of a weight's types.
_EXACT_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}

# XLA's precision that takes as many passes through a TPU's matrix unit, for a weight that was
# widened from bfloat16. It does the cutting itself, in fewer cycles.
_PASSES = {None: lax.Precision.HIGHEST, 3: lax.Precision.HIGHEST, 2: lax.Precision.HIGH}


@dataclasses.dataclass(frozen=True)
class Products:
    """How products with weights are made.

    Attributes:
        precision: one of `PRECISIONS`.
        platform: JAX's name of the kind of device that they are made on.
    """

    precision: str = "float32"
    platform: str = dataclasses.field(default_factory=jax.default_backend)

    def __post_init__(self):
        if self.precision not in PARTS:
            raise InputError(f"precision {self.precision!r}: not one of {', '.join(PRECISIONS)}")

    @property
    def of_values(self) -> "Products":
        """How values are multiplied: as exactly as in float32."""
        return self if self.precision in EXACT else dataclasses.replace(self, precision="split3")

    @property
    def parts(self) -> int | None:
        """Into how many bfloat16 parts an operand is cut; None where it is not."""
        return PARTS[self.precision]


def stored(weight: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """A weight as it is kept: the bits of bfloat16, other types as they are."""
    return lax.bitcast_convert_type(weight, jnp.uint16) if weight.dtype == jnp.bfloat16 else weight


def numbers(weight: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The numbers of a weight, however it is kept."""
    return lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == jnp.uint16 else weight


def numbers_on_host(weight: Shaped[ArrayLike, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The numbers of a weight as a NumPy array; on a CPU it is no copy."""
    weight = np.asarray(weight)
    return weight.view(jnp.bfloat16) if weight.dtype == np.uint16 else weight


def ready(weight: Shaped[Array, "*shape"], products: Products, dtype) -> Float[Array, "..."]:
    """A weight as `multiplied` takes it; what is ready stays as it is.

    To be made of one layer's weight, outside the loop over what is multiplied by it.

    Args:
        weight: as `stored` keeps it.
        products: how it is multiplied.
        dtype: of the activations.

    Returns:
        The weight in the activations' type; for products in parts its own bfloat16 parts,
        [part, *shape]; for a TPU its numbers, which XLA widens or cuts.
    """
    if products.platform == "tpu":
        return numbers(weight)
    if products.parts is None:
        return numbers(weight).astype(dtype)
    if weight.dtype == jnp.bfloat16:  # What is kept has its bits instead: these are the parts.
        return weight
    exact = numbers(weight)
    if exact.dtype == jnp.bfloat16:
        return exact[None]
    return jnp.stack(_cut(exact.astype(dtype), _EXACT_PARTS[exact.dtype.name]))


@functools.partial(jax.jit, static_argnames="products")
def multiplied(
    x: Float[Array, "*rows in"], weight: Float[Array, "..."], products: Products
) -> Float[Array, "*rows out"]:
    """x @ weight. Named: difference propagation has a rule for it as a whole.

    Args:
        x: what is multiplied.
        weight: [in, out], as `ready` gives it.
        products: how. Cut into parts, it has a derivative by x alone, made in parts as well.
    """
    if products.parts is None or products.platform == "tpu":
        return _whole(x, weight, products)
    return _in_parts(products, x, weight)


def _whole(x, weight, products: Products):
    """One product, which XLA makes of parts where the platform has it so."""
    if products.parts == 1:
        return _product(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), x.dtype)
    return jnp.matmul(x, weight.astype(x.dtype), precision=_PASSES[products.parts])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(products: Products, x, weight):
    assert products.parts is not None
    parts = _cut(x, products.parts)
    if products.platform == "cpu":
        return _by_rows(parts, weight, x.dtype)
    places = _places(products.parts, len(weight))
    # One product along all parts is faster than several on a GPU.
    return _product(
        jnp.concatenate([parts[of_x] for of_x, _ in places], axis=-1),
        jnp.concatenate([weight[of_weight] for _, of_weight in places], axis=-2),
        x.dtype,
    )


def _by_rows(parts, weight, dtype):
    """One product for each part of the weight, whose rows are those of all parts of x that go with
    it: the weight is read once, which is most of the work where rows are few."""
    products = [
        _product(jnp.stack(parts[: len(parts) - of_weight]), weight[of_weight], dtype)
        for of_weight in range(min(len(weight), len(parts)))
    ]
    first, *rest = (
        products[of_weight][of_x] for of_x, of_weight in _places(len(parts), len(weight))
    )
    return sum(rest, first)


def _places(parts: int, weight_parts: int) -> list[tuple[int, int]]:
    """Which pairs of parts matter, x1 w1, x2 w1, x1 w2, ...; the smallest first, so that they are
    not lost in what has been summed."""
    places = [
        (of_x, of_weight)
        for of_weight in range(min(weight_parts, parts))
        for of_x in range(parts - of_weight)
    ]
    return sorted(places, key=sum, reverse=True)


def _product(x, weight, dtype):
    """Of bfloat16 numbers, whose products are exact; asked for whatever the caller's precision."""
    return jnp.matmul(x, weight, precision=lax.Precision.DEFAULT, preferred_element_type=dtype)


def _forward(products, x, weight):
    if weight.perturbed:
        raise NotImplementedError(
            f"products in {products.precision} have no derivative by weights: "
            "train with decoder.at_precision('float32')"
        )
    return _in_parts(products, x.value, weight.value), weight.value


def _backward(products, weight, cotangent):
    return _in_parts(products, cotangent, jnp.swapaxes(weight, -1, -2)), None


_in_parts.defvjp(_forward, _backward, symbolic_zeros=True)


def _cut(x: Float[Array, "*shape"], count: int) -> list[Float[Array, "*shape"]]:
    """So many bfloat16 parts whose sum is x, to their own rounding; the largest first.

    What rounds to no finite bfloat16 number (beyond 3.39e38) has no finite parts.
    """
    parts = []
    for _ in range(count):
        # Not by converting there and back, which XLA may drop.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
