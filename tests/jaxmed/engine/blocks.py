"""A decoder block of every family, written plainly in jnp: what difference propagation must know.

Each block maps the residual stream of T positions, [T, D], to the next one. Its attention also sees
P positions of a prefix, whose keys and values do not change; P may be 0. Weights are drawn anew by
`Weights`, by name and shape, so that a block is read without a list of its parameters.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.engine import difference as difference_lib
from jaxmed.engine.rules import rules
from models.layers import inverse_rms_last_axis, softmax_last_axis
from models.products import Products

D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, T = 24, 4, 2, 6, 40, 5
VOCABULARY = 29
MASKED = -1e30


class Weights:
    """Named random weights: the same numbers, which float32 holds, in any type."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, name: str, *shape: int):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        scale = shape[0] ** -0.5 if len(shape) == 2 else 0.3
        drawn = (scale * generator.normal(size=shape)).astype(np.float32)
        return jnp.asarray(drawn, self.dtype)

    def prefix(self, length: int):
        """Keys and values, [2, P, HEADS, HEAD_DIM]; a block uses as many heads as it has."""
        return self("prefix", 2, length, HEADS, HEAD_DIM)


@jax.jit
def log_softmax_last_axis(x):
    """No part of a decoder, but there is a rule for it."""
    return jax.nn.log_softmax(x, axis=-1)


difference = functools.partial(
    difference_lib.difference,
    rules={**rules(Products()), log_softmax_last_axis: difference_lib.log_softmax},
)


def rms_norm(x, weight, offset=0.0):
    return x * inverse_rms_last_axis(x, 1e-6) * (offset + weight)


def layer_norm(x, weight, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * inverse_rms_last_axis(centred, 1e-5) * weight + bias


def rotate(x, positions, base=10000.0, rotated=HEAD_DIM):
    """Rotary embedding of the first `rotated` channels."""
    frequency = base ** -(np.arange(0, rotated, 2) / rotated)
    angle = jnp.asarray(positions[:, None] * frequency, x.dtype)[:, None]
    first, second, rest = jnp.split(x, [rotated // 2, rotated], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend(query, key, value, prefix, *, window=None, cap=None):
    """Grouped-query attention, causal; [T, HEADS, h], [T, kv, h] to [T, HEADS h]."""
    kv_heads, length = key.shape[1], prefix.shape[1]
    prefix_key, prefix_value = prefix[:, :, :kv_heads]
    query = query.reshape(T, kv_heads, -1, HEAD_DIM)
    scores = jnp.einsum("tkgh,skh->kgts", query, key)
    if length:
        earlier = jnp.einsum("tkgh,skh->kgts", query, prefix_key)
        scores = jnp.concatenate([earlier, scores], axis=-1)
    scores = scores * HEAD_DIM**-0.5
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    distance = (length + np.arange(T))[:, None] - np.arange(length + T)
    seen = (distance >= 0) & (distance < (window or length + T))
    weights = softmax_last_axis(jnp.where(seen, scores, MASKED))
    heads = jnp.einsum("kgts,skh->tkgh", weights[..., length:], value)
    if length:
        heads += jnp.einsum("kgts,skh->tkgh", weights[..., :length], prefix_value)
    return heads.reshape(T, -1)


def project(w, name, x, outputs, bias=False):
    y = x @ w(name, x.shape[-1], outputs)
    return y + w(name + ".bias", outputs) if bias else y


def heads_of(x, count):
    return x.reshape(T, count, HEAD_DIM)


def projections(w, x, bias=False, kv_heads=KV_HEADS):
    query = heads_of(project(w, "q", x, HEADS * HEAD_DIM, bias), HEADS)
    key = heads_of(project(w, "k", x, kv_heads * HEAD_DIM, bias), kv_heads)
    return query, key, heads_of(project(w, "v", x, kv_heads * HEAD_DIM, bias), kv_heads)


def gated(w, x, activation):
    hidden = activation(project(w, "gate", x, HIDDEN)) * project(w, "up", x, HIDDEN)
    return project(w, "down", hidden, D)


def plain_mlp(w, x, activation):
    hidden = activation(project(w, "up", x, HIDDEN, True))
    return project(w, "down", hidden, D, True)


def gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x):
    return jax.nn.gelu(x, approximate=False)


def positions_after(prefix):
    return prefix.shape[1] + np.arange(T)


def _llama_like(w, x, prefix, *, bias=False, window=None, qk_norm=False):
    at = positions_after(prefix)
    query, key, value = projections(w, rms_norm(x, w("norm1", D)), bias)
    if qk_norm:
        query, key = rms_norm(query, w("qn", HEAD_DIM)), rms_norm(key, w("kn", HEAD_DIM))
    heads = attend(rotate(query, at), rotate(key, at), value, prefix, window=window)
    x = x + project(w, "o", heads, D)
    return x + gated(w, rms_norm(x, w("norm2", D)), jax.nn.silu)


def llama(w, x, prefix):
    return _llama_like(w, x, prefix)


def mistral(w, x, prefix):
    return _llama_like(w, x, prefix, window=3)


def qwen2(w, x, prefix):
    return _llama_like(w, x, prefix, bias=True)


def qwen3(w, x, prefix):
    return _llama_like(w, x, prefix, qk_norm=True)


def phi3(w, x, prefix):
    """Fused projections."""
    at = positions_after(prefix)
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    fused = project(w, "qkv", rms_norm(x, w("norm1", D)), width + 2 * kv_width)
    query, key, value = jnp.split(fused, [width, width + kv_width], axis=-1)
    query, key, value = heads_of(query, HEADS), heads_of(key, KV_HEADS), heads_of(value, KV_HEADS)
    x = x + project(w, "o", attend(rotate(query, at), rotate(key, at), value, prefix), D)
    gate, up = jnp.split(project(w, "gate_up", rms_norm(x, w("norm2", D)), 2 * HIDDEN), 2, axis=-1)
    return x + project(w, "down", up * jax.nn.silu(gate), D)


def olmo2(w, x, prefix):
    """Norms follow the modules; queries and keys are normed over all heads together."""
    at = positions_after(prefix)
    query = rms_norm(project(w, "q", x, HEADS * HEAD_DIM), w("qn", HEADS * HEAD_DIM))
    key = rms_norm(project(w, "k", x, KV_HEADS * HEAD_DIM), w("kn", KV_HEADS * HEAD_DIM))
    value = heads_of(project(w, "v", x, KV_HEADS * HEAD_DIM), KV_HEADS)
    query, key = rotate(heads_of(query, HEADS), at), rotate(heads_of(key, KV_HEADS), at)
    x = x + rms_norm(project(w, "o", attend(query, key, value, prefix), D), w("norm1", D))
    return x + rms_norm(gated(w, x, jax.nn.silu), w("norm2", D))


def gemma(w, x, prefix):
    """From the embedding on, which is scaled; the norms' weights are offsets from 1."""
    x = x * jnp.asarray(D**0.5, x.dtype)
    at = positions_after(prefix)
    query, key, value = projections(w, rms_norm(x, w("norm1", D), 1.0), kv_heads=1)
    x = x + project(w, "o", attend(rotate(query, at), rotate(key, at), value, prefix), D)
    return x + gated(w, rms_norm(x, w("norm2", D), 1.0), gelu_tanh)


def gemma2(w, x, prefix):
    """Norms before and after; scores and logits are soft-capped; ends with the logits."""
    at = positions_after(prefix)
    query, key, value = projections(w, rms_norm(x, w("norm1", D), 1.0))
    heads = attend(rotate(query, at), rotate(key, at), value, prefix, window=4, cap=50.0)
    x = x + rms_norm(project(w, "o", heads, D), w("norm2", D), 1.0)
    written = gated(w, rms_norm(x, w("norm3", D), 1.0), gelu_tanh)
    x = x + rms_norm(written, w("norm4", D), 1.0)
    logits = rms_norm(x, w("norm5", D), 1.0) @ w("embedding", VOCABULARY, D).T
    return 30.0 * jnp.tanh(logits / 30.0)


def gemma3(w, x, prefix):
    at = positions_after(prefix)
    query, key, value = projections(w, rms_norm(x, w("norm1", D), 1.0))
    query, key = rms_norm(query, w("qn", HEAD_DIM), 1.0), rms_norm(key, w("kn", HEAD_DIM), 1.0)
    query, key = rotate(query, at / 8, 1e6), rotate(key, at / 8, 1e6)
    x = x + rms_norm(project(w, "o", attend(query, key, value, prefix), D), w("norm2", D), 1.0)
    written = gated(w, rms_norm(x, w("norm3", D), 1.0), gelu_tanh)
    return x + rms_norm(written, w("norm4", D), 1.0)


def gpt2(w, x, prefix):
    """From the embedding on, to which learned positions are added."""
    x = x + jnp.take(w("positions", 64, D), positions_after(prefix), axis=0)
    normed = layer_norm(x, w("norm1", D), w("bias1", D))
    query, key, value = projections(w, normed, True, HEADS)
    x = x + project(w, "o", attend(query, key, value, prefix), D, True)
    return x + plain_mlp(w, layer_norm(x, w("norm2", D), w("bias2", D)), gelu_tanh)


def gpt_neox(w, x, prefix):
    """Attention and MLP in parallel; part of each head is rotated; exact gelu."""
    at = positions_after(prefix)
    query, key, value = projections(w, layer_norm(x, w("norm1", D), w("bias1", D)), True, HEADS)
    heads = attend(rotate(query, at, rotated=2), rotate(key, at, rotated=2), value, prefix)
    written = plain_mlp(w, layer_norm(x, w("norm2", D), w("bias2", D)), gelu_exact)
    return x + project(w, "o", heads, D, True) + written


FAMILIES = {
    f.__name__: f
    for f in [
        llama,
        mistral,
        qwen2,
        qwen3,
        phi3,
        olmo2,
        gemma,
        gemma2,
        gemma3,
        gpt2,
        gpt_neox,
    ]
}
