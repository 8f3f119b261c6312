"""How fast this machine multiplies by a model's weights, and so which precision is the faster."""

import functools
import hashlib
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.engine import cost
from jaxmed.files import atomic
from models import cache, products
from models.config import DecoderConfig
from models.decoder import Decoder

AUTO = "auto"
# How much faster split3 must be: less may be noise, and is not worth another rounding.
_WORTH = 1.1
# Weights of a matrix from which on it is worth looking: products of smaller ones take no time.
_SMALL = 2**18
_SECONDS = 0.2  # for which a product is repeated, at least


def exact_precision(decoder: Decoder, rows: int | None = None) -> str:
    """The faster of "float32" and "split3" on this machine, for a model of this shape.

    Both are as exact. Measured once for each machine and shape, and noted in the cache folder.

    Args:
        decoder: the model.
        rows: that are multiplied together; as many as the engine's batches have by default.
            Products of few rows take as long as it takes to read the weights.
    """
    config = decoder.config
    small = config.hidden_size * config.intermediate_size < _SMALL
    if small or decoder.compute_dtype == jnp.float64 or jax.default_backend() == "tpu":
        return "float32"
    plain, split = (
        operations_per_second(decoder.at_precision(name), rows) for name in products.EXACT
    )
    return "split3" if split > _WORTH * plain else "float32"


def operations_per_second(decoder: Decoder, rows: int | None = None) -> float:
    """Operations of useful products of differences with the MLP's weights; measured once for each
    machine, shape and precision. Arguments as of `exact_precision`."""
    config = decoder.config
    rows = rows or cost.positions_together(jax.default_backend())
    about = (config.hidden_size, config.intermediate_size, decoder.dtype.name, rows)
    about += (decoder.products.precision,)
    rate = noted(about)
    if rate is None:
        rate = _measure(config, decoder.dtype, decoder.products, rows)
        note(about, rate)
    return rate


def noted(about: tuple) -> float | None:
    """A number that `note` has kept on this machine; None if there is none."""
    try:
        return float(json.loads(_note(about).read_text()))
    except (OSError, ValueError):
        return None


def note(about: tuple, number: float) -> None:
    """Keeps a number that holds on this machine, in the cache folder.

    Args:
        about: what it is of: texts and numbers.
        number: the number.
    """
    file = _note(about)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_file(file, lambda path: path.write_text(json.dumps(number)))
    except OSError:  # Not needed: a folder that cannot be written to has no notes.
        pass


def _note(about: tuple) -> pathlib.Path:
    machine = (jax.devices()[0].device_kind, os.cpu_count(), platform.node(), jax.__version__)
    key = repr((machine, about)).encode()
    return cache.default_folder() / "rates" / hashlib.blake2b(key, digest_size=16).hexdigest()


def _measure(config: DecoderConfig, dtype, how: products.Products, rows: int) -> float:
    widths = (config.hidden_size, config.intermediate_size)
    compute = jnp.promote_types(dtype, jnp.float32)
    prepare = jax.jit(products.ready, static_argnums=(1, 2))
    multiply = jax.jit(functools.partial(products.multiplied, products=how))
    done = seconds = 0.0
    for inputs, outputs in (widths, widths[::-1]):
        # From the host: what makes numbers is one more program to compile.
        weight = jax.device_put(np.ones((inputs, outputs), dtype))
        weight = prepare(products.stored(weight), how, compute)
        x = jax.device_put(np.ones((rows, inputs), compute))
        multiply(x, weight).block_until_ready()
        began, repeats, spent = time.perf_counter(), 0, 0.0
        while not repeats or spent < _SECONDS:
            multiply(x, weight).block_until_ready()
            repeats, spent = repeats + 1, time.perf_counter() - began
        done += 2.0 * rows * inputs * outputs
        seconds += spent / repeats
    return done / seconds
