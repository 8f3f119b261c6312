"""Products with weights, against float64; and how weights lie in memory."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.lax import Precision

import models
from jaxmed.validation import presets
from models import checkpoint, products
from models.decoder import Decoder
from models.errors import InputError
from models.products import PRECISIONS, Products, multiplied, numbers_on_host, ready, stored
from tests import tiny
from tests.jaxmed.engine.jaxprs import equations

PLATFORMS = ("cpu", "gpu", "tpu")
ROWS, INPUTS, OUTPUTS = 24, 96, 40
# Norm of the errors by that of the product: of float32's sums; of 16 and of 8 bits of x, and of a
# weight that is cut as well.
BOUNDS = {"float32": 1e-6, "split3": 1e-6, "split2": 1e-5, "bfloat16": 5e-3}


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(x, weight, how):
    return multiplied(x, ready(stored(weight), how, x.dtype), how)


def error(found, exact):
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_as_exact_as_their_name_says(dtype, precision, platform):
    x, weight = jnp.asarray(drawn(0, ROWS, INPUTS)), jnp.asarray(drawn(1, INPUTS, OUTPUTS), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    found = product(x, weight, Products(precision, platform))
    assert found.dtype == jnp.float32
    assert error(found, exact) <= BOUNDS[precision]
    if precision == "bfloat16":  # It is what it says, and no more.
        assert error(found, exact) > 1e-4


@pytest.mark.parametrize("precision", ["split3", "split2"])
def test_parts_sum_to_the_number(precision):
    """To 24 and to 16 bits, at any size that float32 has without losing bits."""
    how = Products(precision)
    x = drawn(2, 50, 1) * 2.0 ** np.arange(-75, 75, 3)[:, None]
    x = jnp.asarray(x, jnp.float32)
    found = np.asarray(product(x, jnp.ones((1, 1), "bfloat16"), how)).ravel()
    with mpmath.workprec(200):
        exact = [mpmath.mpf(float(one)) for one in np.asarray(x).ravel()]
        errors = [abs((mpmath.mpf(float(a)) - b) / b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) <= {"split3": 0, "split2": 2**-16}[precision]
    assert not np.asarray(product(jnp.zeros_like(x), jnp.ones((1, 1), "bfloat16"), how)).any()


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_differences_are_multiplied_in_fewer_parts_than_values(precision):
    how = Products(precision)
    assert how.of_values == Products("split3")
    assert Products().of_values == Products()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_made_in_parts_too(dtype, precision, platform):
    """Not of the cutting, which is a step function: that is wrong by 1e-3."""
    how = Products(precision, platform)
    x, weight = jnp.asarray(drawn(0, ROWS, INPUTS)), jnp.asarray(drawn(1, INPUTS, OUTPUTS), dtype)
    seed = jnp.asarray(drawn(2, ROWS, OUTPUTS))
    kept = stored(weight)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(seed * multiplied(x, ready(kept, how, x.dtype), how)))(x)

    exact = np.asarray(seed, np.float64) @ np.asarray(weight, np.float64).T
    assert error(gradient(x), exact) <= BOUNDS[precision]


def test_products_in_parts_have_no_derivative_by_weights():
    x, weight = jnp.ones((2, 3)), jnp.ones((3, 4))
    how = Products("split3")
    with pytest.raises(NotImplementedError, match="split3.*at_precision"):
        jax.grad(lambda w: jnp.sum(multiplied(x, ready(w, how, x.dtype), how)))(weight)


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="'tf32': not one of float32, split3, split2, bfloat16"):
        Products("tf32")
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        assert decoder.at_precision("float32").products.precision == "float32"
        with pytest.raises(InputError, match="--matmul_precision.*in float64"):
            decoder.at_precision("split3")


# --- How weights lie in memory -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_stored_are_the_same_numbers(dtype):
    weight = jnp.asarray(drawn(0, INPUTS, OUTPUTS), dtype)
    kept = stored(weight)
    assert kept.nbytes == weight.nbytes
    np.testing.assert_array_equal(products.numbers(kept), weight)
    np.testing.assert_array_equal(numbers_on_host(kept), np.asarray(weight))
    for precision in PRECISIONS:
        how = Products(precision)
        once = ready(kept, how, jnp.float32)
        np.testing.assert_array_equal(ready(once, how, jnp.float32), once)


def test_a_bfloat16_checkpoint_takes_two_bytes_a_weight(tmp_path):
    tiny.save(tmp_path / "model", dtype="bfloat16")
    decoder, _ = models.load(tmp_path / "model")
    assert decoder.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(decoder)
    assert all(leaf.dtype.itemsize == 2 for leaf in leaves)
    checkpoint.save(decoder, tmp_path / "again")
    again, _ = models.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, decoder, again)
    assert (tmp_path / "again/model.safetensors").stat().st_size == (
        tmp_path / "model/model.safetensors"
    ).stat().st_size


def test_no_stack_of_wider_weights_is_made():
    """XLA's CPU backend widens a stack of bfloat16 matrices that is sliced in a loop."""
    config = tiny.config(
        "llama", dtype="bfloat16", num_layers=8, hidden_size=128, intermediate_size=512
    )
    decoder = jax.eval_shape(lambda: presets.random_decoder(config))
    weights = sum(leaf.size for leaf in jax.tree.leaves(decoder.blocks))

    def run(decoder, tokens):
        return decoder(tokens, sites=("residual",))

    for precision in PRECISIONS:
        lowered = jax.jit(run).lower(
            decoder.at_precision(precision), jax.ShapeDtypeStruct((8,), jnp.int32)
        )
        beside = lowered.compile().memory_analysis().temp_size_in_bytes
        assert beside < 2 * weights, precision


# --- The decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.STRUCTURES)
def test_a_decoder_in_parts_is_as_exact_as_in_float32(family):
    decoder = tiny.decoder(family, dtype="bfloat16")
    tokens = np.arange(12) % decoder.config.vocab_size
    with jax.enable_x64(True):
        exact = np.asarray(presets.in_float64(decoder)(tokens)[0])
    plain = error(decoder(tokens)[0], exact)
    for precision in PRECISIONS[1:]:  # Values are multiplied alike in all of them.
        assert error(decoder.at_precision(precision)(tokens)[0], exact) <= max(2e-6, 1.5 * plain)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_product_with_a_weight_depends_on_jaxs_default(precision, platform):
    """float32 is float32 outside of every context, where JAX's own is TF32 or bfloat16 on some
    devices; and parts take one pass inside of one."""
    how = Products(precision, platform)

    def run(x, weight):
        return multiplied(x, ready(weight, how, x.dtype), how)

    for context in ("bfloat16", "float32"):
        with jax.default_matmul_precision(context):
            jaxpr = jax.make_jaxpr(run)(jnp.ones((2, 3)), stored(jnp.ones((3, 4), jnp.bfloat16)))
        found = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        assert found
        for equation in found:
            asked = equation.params["precision"][0]
            narrow = equation.invars[0].aval.dtype == jnp.bfloat16
            two = precision == "split2" and platform == "tpu"
            wide = Precision.HIGH if two else Precision.HIGHEST
            assert asked == (Precision.DEFAULT if narrow else wide)


def test_at_precision_copies_no_weights():
    decoder = tiny.decoder("llama", dtype="bfloat16")
    other = decoder.at_precision("split2", platform="gpu")
    assert other.products == Products("split2", "gpu")
    assert other.blocks.mlp.down.products == other.products
    assert decoder.products == Products()
    assert isinstance(other, Decoder)
    for a, b in zip(jax.tree.leaves(decoder), jax.tree.leaves(other), strict=True):
        assert a is b


def test_in_parts_every_product_with_a_weight_takes_bfloat16():
    decoder = tiny.decoder("llama", dtype="bfloat16").at_precision("split2")
    jaxpr = jax.make_jaxpr(lambda decoder, tokens: decoder(tokens)[0])(decoder, jnp.arange(6))
    operands = [
        [variable.aval for variable in equation.invars]
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    of_weights = [pair for pair in operands if "bfloat16" in [one.dtype.name for one in pair]]
    assert len(of_weights) == 7 + 1  # seven in a block, one in the unembedding
    assert all(values.shape[0] == 3 for values, _ in of_weights)  # each with all three parts
    assert all(one.dtype == jnp.bfloat16 for pair in of_weights for one in pair)
    # Scores and values, each also of the keys before, of which there are none.
    assert len(operands) - len(of_weights) == 4
