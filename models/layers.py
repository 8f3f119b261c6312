"""Norm, rotary embedding, attention over a prefix and a span, gated MLP.

Shapes are those of one sequence: T positions of the span, P of the prefix, d hidden size, H query
heads, K key/value heads, G = H / K, h head size, I neurons. Batches are made with `jax.vmap`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.config import DecoderConfig, Rotary
from models.edits import Site

# Shows a site's value to whoever runs the layer, who may record it, replace it, or both.
Tap = Callable[[Site, Float[Array, "T ..."]], Float[Array, "T ..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of a prefix, as they stand after the rotary embedding.

    Attributes:
        keys, values: [layer, P, K, h]; inside a layer [P, K, h].
        positions: rotary position of each prefix token, [P].
        valid: which of them are tokens and not padding, [P].
    """

    keys: Float[Array, "*layer P K h"]
    values: Float[Array, "*layer P K h"]
    positions: Int[Array, "P"]
    valid: Bool[Array, "P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """What attention must know of the positions that are being computed.

    Attributes:
        positions: rotary position of each token, [T].
        valid: which of them are tokens and not padding, [T].
        cos, sin: of the rotary angles, [T, h / 2].
    """

    positions: Int[Array, "T"]
    valid: Bool[Array, "T"]
    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def rotary_frequencies(rotary: Rotary, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, float64 [h / 2] (RoPE, arXiv 2104.09864).

    "linear" divides positions by a factor (arXiv 2306.15595). "llama3" divides only the slow
    frequencies, those that turn less than `low_freq_factor` times in the original context, and
    blends up to `high_freq_factor` turns (Llama 3.1's reference code).
    """
    frequency = rotary.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rotary.kind == "linear":
        return frequency / rotary.factor
    if rotary.kind == "llama3":
        turns = rotary.original_max_positions * frequency / (2 * np.pi)
        blend = (turns - rotary.low_freq_factor) / (
            rotary.high_freq_factor - rotary.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * frequency / rotary.factor + blend * frequency
    return frequency


def span(config: DecoderConfig, positions, valid, dtype) -> Span:
    """The span at given rotary positions; the angles are computed in `dtype`."""
    frequency = jnp.asarray(rotary_frequencies(config.rotary, config.head_dim), dtype)
    angle = positions.astype(dtype)[:, None] * frequency
    return Span(positions, valid, jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "T N h"], at: Span) -> Float[Array, "T N h"]:
    """Turns channel i and channel i + h / 2 of every head by the position's angle."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = at.cos[:, None], at.sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.jit
def softmax_last_axis(scores: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Softmax over the last axis. Named: difference propagation has a rule for it as a whole."""
    return jax.nn.softmax(scores, axis=-1)


@jax.jit
def inverse_rms_last_axis(x: Float[Array, "... d"], eps: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept. Named, as `softmax_last_axis` is."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return x * inverse_rms_last_axis(x, self.eps) * self.weight[...].astype(x.dtype)


def visible(queries: Span, key_positions, key_valid, window) -> Bool[Array, "T S"]:
    """Key j is visible to query i if it is a token, and i - window < j <= i."""
    distance = queries.positions[:, None] - key_positions
    return key_valid & (distance >= 0) & (distance < window)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; keys may come from a prefix as well."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype, compute_dtype):
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim

        def linear(inputs, outputs, use_bias):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                param_dtype=dtype,
                dtype=compute_dtype,
                rngs=rngs,
            )

        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.query = linear(config.hidden_size, width, config.qkv_bias)
        self.key = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.value = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.output = linear(width, config.hidden_size, config.output_bias)

    def __call__(
        self,
        x: Float[Array, "T d"],
        at: Span,
        window: Int[Array, ""],
        prefix: Cache | None,
        tap: Tap,
    ) -> tuple[Float[Array, "T d"], Float[Array, "T K h"], Float[Array, "T K h"]]:
        """What attention writes, and the keys and values of these positions."""
        length = x.shape[0]
        query = rotate(self.query(x).reshape(length, -1, self.head_dim), at)
        key = rotate(self.key(x).reshape(length, -1, self.head_dim), at)
        value = self.value(x).reshape(length, -1, self.head_dim)

        query = query.reshape(length, self.num_kv_heads, -1, self.head_dim)
        scores = jnp.einsum("tkgh,skh->kgts", query, key)
        mask = visible(at, at.positions, at.valid, window)
        if prefix is not None:
            # The scores are joined, the keys and values never: under vmap over the span, prefix
            # products then stay one matrix product with one operand for the whole batch.
            before = jnp.einsum("tkgh,skh->kgts", query, prefix.keys.astype(x.dtype))
            scores = jnp.concatenate([before, scores], axis=-1)
            seen = visible(at, prefix.positions, prefix.valid, window)
            mask = jnp.concatenate([seen, mask], axis=-1)
        # A finite mask, put on after scaling, keeps every difference finite.
        scores = jnp.where(mask, scores * self.head_dim**-0.5, jnp.finfo(scores.dtype).min / 4)
        weights = softmax_last_axis(scores)
        heads = jnp.einsum("kgts,skh->tkgh", weights[..., -length:], value)
        if prefix is not None:
            heads = heads + jnp.einsum(
                "kgts,skh->tkgh", weights[..., :-length], prefix.values.astype(x.dtype)
            )
        heads = tap(Site.HEAD, heads.reshape(length, -1, self.head_dim))
        return self.output(heads.reshape(length, -1)), key, value


class MLP(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype, compute_dtype):
        def linear(inputs, outputs):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                param_dtype=dtype,
                dtype=compute_dtype,
                rngs=rngs,
            )

        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "T d"], tap: Tap) -> Float[Array, "T d"]:
        """What the MLP writes."""
        return self.down(tap(Site.NEURON, jax.nn.silu(self.gate(x)) * self.up(x)))
