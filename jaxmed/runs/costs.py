"""What a scan costs, as people are told: before it starts, and once its first pair is done."""

import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmed.engine import propagate
from models.decoder import Decoder

# Shorter waits are not worth a sentence.
_WORTH_TELLING = 30.0


def shares(operations: Mapping[str, float], units: Mapping[str, int]) -> str:
    """A sentence on which granularity takes how much, the dearest first.

    Args:
        operations: floating-point operations of each.
        units: how many of each a pair has at most.
    """
    total = sum(operations.values())
    told = [
        f"{name} {operations[name] / total:.1%} ({units[name]:,} units a pair)"
        for name in _dearest_first(operations)
    ]
    return f"Of these operations {', '.join(told)}."


def dearest(operations: Mapping[str, float]) -> str:
    """The granularity that takes most."""
    return _dearest_first(operations)[0]


def least_time(operations: float, decoder: Decoder, matmul_precision: str) -> str:
    """A sentence on how long so many floating-point operations take on this machine."""
    rate = _product_rate(decoder, matmul_precision)
    return (
        f"This machine's matrix products make {rate:.1e} a second, so it takes at least "
        f"{_duration(operations / rate)}, and compilation beside (some seconds for each length of "
        "prompt, most of the time for a small model); the bar tells the real time."
    )


def left(seconds: float, done: float, operations: Mapping[str, float]) -> str:
    """A sentence on the time that is left, by that of the first pair; "" where it is short.

    Args:
        seconds: that the first pair took.
        done: its floating-point operations.
        operations: those of the other pairs, by granularity.
    """
    total = seconds * sum(operations.values()) / done if done else 0.0
    if total < _WORTH_TELLING:
        return ""
    each = {name: seconds * operations[name] / done for name in _dearest_first(operations)}
    told = [f"{name} {_duration(one)}" for name, one in each.items() if one >= 0.01 * total]
    return (
        f"The first pair took {_duration(seconds)}, compilation included; at that pace the others "
        f"take {_duration(total)}: {', '.join(told)}"
    )


def _dearest_first(operations: Mapping[str, float]) -> list[str]:
    return sorted(operations, key=lambda name: operations[name], reverse=True)


def _duration(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"


def _product_rate(decoder: Decoder, matmul_precision: str) -> float:
    """Floating-point operations a second of a product of the MLP's shape, measured now."""
    rows, config = 512, decoder.config
    dtype = propagate.MATMUL_PRECISIONS[matmul_precision] or decoder.compute_dtype
    left = jnp.ones((rows, config.hidden_size), dtype)
    right = jnp.ones((config.hidden_size, config.intermediate_size), dtype)
    product = jax.jit(
        functools.partial(
            jnp.matmul,
            precision="float32",
            preferred_element_type=decoder.compute_dtype,
        )
    )
    product(left, right).block_until_ready()
    repeats = 5
    start = time.perf_counter()
    for _ in range(repeats):
        product(left, right).block_until_ready()
    seconds = time.perf_counter() - start
    return 2.0 * rows * config.hidden_size * config.intermediate_size * repeats / seconds
