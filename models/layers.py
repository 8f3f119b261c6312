"""Norms, rotary embedding, attention over a prefix and a span, MLP.

Shapes are named in `models.shapes`; those of dataclasses may have the axes of a batch in front.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from models import products
from models.config import ACTIVATIONS, DecoderConfig, Rotary
from models.products import Products
from models.shapes import Heads, KeyValues, Layer, Neurons, Residual, SiteValue
from models.sites import Site

# Shows a site's value to whoever runs the layer, who may record it, replace it, or both.
Tap = Callable[[Site, SiteValue], SiteValue]


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
    positions: Int[Array, "*batch P"]
    valid: Bool[Array, "*batch P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """What attention must know of the positions that are being computed.

    Attributes:
        positions: rotary position of each token, [T].
        valid: which of them are tokens and not padding, [T].
        cos, sin: of the rotary angles of each of the model's R rotary embeddings, [R, T, r / 2],
            where r is the number of channels that are rotated; R = 0 if there is none.
    """

    positions: Int[Array, "*batch T"]
    valid: Bool[Array, "*batch T"]
    cos: Float[Array, "*batch R T half"]
    sin: Float[Array, "*batch R T half"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traits:
    """What layers differ in beside their weights; arrays, so that one program serves all layers.

    Attributes:
        window: sliding window in positions, the largest integer where there is none.
        rotary: which of the model's rotary embeddings.
        score_scale: what attention scores are multiplied by.
    """

    window: Int[Array, "*layer"]
    rotary: Int[Array, "*layer"]
    score_scale: Float[Array, "*layer"]

    def at(self, layer: Layer) -> "Traits":
        """Those of one layer."""
        return jax.tree.map(lambda stacked: stacked[layer], self)


def traits(config: DecoderConfig, dtype) -> Traits:
    """The traits of all layers, stacked."""
    windows = config.windows
    scale = (config.query_scalar or config.head_dim) ** -0.5
    share = np.arange(1, config.num_layers + 1) if config.inverse_layer_scale else 1
    return Traits(
        window=jnp.array([w or np.iinfo(np.int32).max for w in windows], jnp.int32),
        rotary=jnp.array([bool(w and config.window_rotary) for w in windows], jnp.int32),
        score_scale=jnp.asarray(np.full(config.num_layers, scale) / share, dtype),
    )


def rotary_frequencies(rotary: Rotary, rotated: int) -> np.ndarray:
    """Angle per position of each pair of channels, float64 [r / 2] (RoPE, arXiv 2104.09864).

    "linear" divides positions by a factor (arXiv 2306.15595). "llama3" divides only the slow
    frequencies, those that turn less than `low_freq_factor` times in the original context, and
    blends up to `high_freq_factor` turns (Llama 3.1's reference code). "longrope" divides each by
    its own factor (arXiv 2402.13753).
    """
    frequency = rotary.theta ** -(np.arange(0, rotated, 2) / rotated)
    stretch = rotary.factor or 1.0
    if rotary.kind == "linear":
        return frequency / stretch
    if rotary.kind == "llama3":
        turns = rotary.original_max_positions * frequency / (2 * np.pi)
        blend = (turns - rotary.low_freq_factor) / (
            rotary.high_freq_factor - rotary.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * frequency / stretch + blend * frequency
    if rotary.kind == "longrope":
        return frequency / np.array(rotary.short_factors)
    return frequency


def rotary_scale(rotary: Rotary) -> float:
    """What rotated vectors are multiplied by; 1 but for "longrope" (arXiv 2402.13753, eq. 6)."""
    if rotary.kind != "longrope":
        return 1.0
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    original = rotary.original_max_positions
    stretch = rotary.factor or (rotary.stretched_max_positions or original) / original
    return max(1.0, 1 + np.log(stretch) / np.log(original)) ** 0.5


def span(config: DecoderConfig, positions, valid, dtype) -> Span:
    """The span at given rotary positions; the angles are computed in `dtype`."""
    cos, sin = [], []
    for rotary in filter(None, (config.rotary, config.window_rotary)):
        frequency = rotary_frequencies(rotary, rotary.rotated(config.head_dim))
        angle = positions.astype(dtype)[:, None] * jnp.asarray(frequency, dtype)
        cos.append(jnp.cos(angle) * rotary_scale(rotary))
        sin.append(jnp.sin(angle) * rotary_scale(rotary))
    nothing = jnp.zeros((0, len(positions), 0), dtype)
    return Span(
        positions, valid, jnp.stack(cos) if cos else nothing, jnp.stack(sin) if sin else nothing
    )


def rotate(x: Float[Array, "T N h"], at: Span, rotary: Int[Array, ""]) -> Float[Array, "T N h"]:
    """Turns channels i and i + r / 2 of every head by the position's angle; the rest stay."""
    if not at.cos.size:
        return x
    cos, sin = at.cos[rotary][:, None], at.sin[rotary][:, None]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + [rest] if rest.shape[-1] else turned, axis=-1)


@jax.jit
def softmax_last_axis(scores: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Softmax over the last axis. Named: difference propagation has a rule for it as a whole."""
    return jax.nn.softmax(scores, axis=-1)


def scores_of(
    query: Float[Array, "T K G h"], keys: Float[Array, "S K h"]
) -> Float[Array, "K G T S"]:
    """Every query's product with every key.

    Keys are repeated for the heads that share them, and come first: in a batch of queries each
    head's product then takes them as they lie in memory, and nothing is transposed.
    """
    length, kv_heads, group, size = query.shape
    repeated = jnp.repeat(keys, group, axis=1)
    scores = jnp.einsum("snh,tnh->nst", repeated, query.reshape(length, -1, size))
    return jnp.swapaxes(scores, 1, 2).reshape(kv_heads, group, length, -1)


def sums_of(
    weights: Float[Array, "K G T S"], values: Float[Array, "S K h"]
) -> Float[Array, "T K G h"]:
    """The sum of values, each weighted; laid out as `scores_of`."""
    kv_heads, group, length, _ = weights.shape
    repeated = jnp.repeat(values, group, axis=1)
    by_head = jnp.swapaxes(weights.reshape(kv_heads * group, length, -1), 1, 2)
    heads = jnp.einsum("snh,nst->nht", repeated, by_head)
    return jnp.moveaxis(heads, 2, 0).reshape(length, kv_heads, group, -1)


@jax.jit
def weighted_sum(
    earlier_scores: Float[Array, "K G T P"],
    scores: Float[Array, "K G T S"],
    values: Float[Array, "S K h"],
    earlier_values: Float[Array, "P K h"],
) -> Float[Array, "T K G h"]:
    """The sum of values, each weighted by the softmax of all scores of its query. Named, as
    `softmax_last_axis` is.

    The scores are joined, the values never: under vmap over the span the product with earlier
    values is then one matrix product, with one operand for the whole batch.
    """
    weights = softmax_last_axis(jnp.concatenate([earlier_scores, scores], axis=-1))
    earlier, now = jnp.split(weights, [earlier_scores.shape[-1]], axis=-1)
    return sums_of(now, values) + sums_of(earlier, earlier_values)


@jax.jit
def inverse_rms_last_axis(
    x: Float[Array, "... d"], eps: Float[ArrayLike, ""]
) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept. Named, as `softmax_last_axis` is."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, offset: float, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The vectors, each normed by its own root mean square."""
        weight = self.weight[...].astype(x.dtype)
        return x * inverse_rms_last_axis(x, self.eps) * (self.offset + weight)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * (offset + weight) + bias (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, offset: float, dtype):
        super().__init__(size, eps, offset, dtype)
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """The vectors, each centred and normed."""
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return super().__call__(centred) + self.bias[...].astype(x.dtype)


def norm(config: DecoderConfig, size: int, dtype) -> RMSNorm | LayerNorm:
    """The model's kind of norm."""
    kind = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return kind(size, config.norm_eps, config.norm_offset, dtype)


def visible(queries: Span, key_positions, key_valid, window) -> Bool[Array, "T S"]:
    """Key j is visible to query i if it is a token, and i - window < j <= i."""
    distance = queries.positions[:, None] - key_positions
    return key_valid & (distance >= 0) & (distance < window)


def _nothing_before(keys: KeyValues, values: KeyValues) -> Cache:
    """A prefix of no tokens."""
    nowhere = jnp.zeros(0, int)
    return Cache(keys[:0], values[:0], nowhere, nowhere == 0)


class Linear(nnx.Module):
    """x @ weight + bias, multiplied as `models.products` says.

    Attributes:
        kernel: the weight, [in, out], as `products.stored` keeps it.
        bias: [out]; None if there is none.
        products: how it multiplies.
    """

    def __init__(self, inputs: int, outputs: int, use_bias: bool, *, rngs: nnx.Rngs, dtype):
        weight = nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), dtype)
        self.kernel = nnx.Param(products.stored(weight))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if use_bias else None
        self.products = Products()

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """The product with every vector."""
        weight = products.ready(self.kernel[...], self.products, x.dtype)
        y = products.multiplied(x, weight, self.products.of_values)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; keys may come from a prefix as well."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.score_cap = config.score_cap
        shared = dict(rngs=rngs, dtype=dtype)
        inputs = config.hidden_size
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.query = Linear(inputs, width, config.qkv_bias, **shared)
        self.key = Linear(inputs, kv_width, config.qkv_bias, **shared)
        self.value = Linear(inputs, kv_width, config.qkv_bias, **shared)
        self.output = Linear(width, inputs, config.output_bias, **shared)
        self.normed_together = config.query_key_norm == "all"
        sizes = (width, kv_width) if self.normed_together else (config.head_dim,) * 2
        norms = [norm(config, size, dtype) if config.query_key_norm else None for size in sizes]
        self.query_norm, self.key_norm = norms

    def __call__(
        self,
        x: Residual,
        at: Span,
        traits: Traits,
        prefix: Cache | None,
        tap: Tap,
    ) -> tuple[Residual, KeyValues, KeyValues]:
        """What attention writes, and the keys and values of these positions."""
        length = x.shape[0]
        query = rotate(self._heads(self.query(x), self.query_norm), at, traits.rotary)
        key = rotate(self._heads(self.key(x), self.key_norm), at, traits.rotary)
        value = self._heads(self.value(x))

        query = query.reshape(length, self.num_kv_heads, -1, self.head_dim)
        if prefix is None:
            prefix = _nothing_before(key, value)

        def seen(scores, positions, valid):
            scores = scores * traits.score_scale
            scores = scores if self.score_cap is None else capped(scores, self.score_cap)
            # A finite mask, put on after scaling, keeps every difference finite.
            mask = visible(at, positions, valid, traits.window)
            return jnp.where(mask, scores, jnp.finfo(scores.dtype).min / 4)

        earlier = scores_of(query, prefix.keys.astype(x.dtype))
        heads = weighted_sum(
            seen(earlier, prefix.positions, prefix.valid),
            seen(scores_of(query, key), at.positions, at.valid),
            value,
            prefix.values.astype(x.dtype),
        )
        heads = tap(Site.HEAD, heads.reshape(length, -1, self.head_dim))
        return self.write(heads), key, value

    def write(self, heads: Heads) -> Residual:
        """What the heads' outputs become, before any norm that follows."""
        return self.output(heads.reshape(heads.shape[0], -1))

    def _heads(self, x: Float[Array, "T w"], norm: nnx.Module | None = None):
        """A projection cut into heads, [T, N, h]; normed where it has a norm."""
        if norm is not None and self.normed_together:
            x = norm(x)
        x = x.reshape(x.shape[0], -1, self.head_dim)
        return x if norm is None or self.normed_together else norm(x)


# Those of the tanh approximation (arXiv 1606.08415) differ in how they round.
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def capped(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Bounds x smoothly by -cap and cap (Gemma 2, arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (GLU, arXiv 2002.05202), or down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        shared = dict(rngs=rngs, dtype=dtype)
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate = Linear(width, inner, bias, **shared) if config.gated_mlp else None
        self.up = Linear(width, inner, bias, **shared)
        self.down = Linear(inner, width, bias, **shared)

    def __call__(self, x: Residual, tap: Tap) -> Residual:
        """What the MLP writes."""
        activation = _ACTIVATIONS[ACTIVATIONS[self.activation]]
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            hidden = activation(self.gate(x)) * self.up(x)
        return self.write(tap(Site.NEURON, hidden))

    def write(self, neurons: Neurons) -> Residual:
        """What the neurons become, before any norm that follows."""
        return self.down(neurons)
