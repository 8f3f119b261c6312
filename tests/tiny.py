"""Tiny random models of every family, in memory or as checkpoints in Hugging Face's format."""

import os

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import checkpoint
from models.config import DecoderConfig, Rotary
from models.decoder import Decoder

# Grouped heads, and a head size that is not hidden_size / num_heads, are the hard cases.
_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-5,
    "max_positions": 64,
    "rotary": Rotary(theta=10000.0),
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "activation": "silu",
    "tie_embeddings": False,
    "dtype": "float32",
}
# What a family has of its own: fields, and the window of every layer but the first.
_FAMILIES = {"llama": ({}, None), "qwen2": ({"qkv_bias": True}, 5)}
FAMILIES = tuple(_FAMILIES)


def config(family: str = "llama", **fields) -> DecoderConfig:
    """The shape of a tiny model of the family, but for the given fields."""
    own, window = _FAMILIES[family]
    fields = _SHAPE | own | fields
    fields.setdefault("windows", (None,) + (window,) * (fields["num_layers"] - 1))
    return DecoderConfig(family=family, **fields)


def decoder(family: str = "llama", *, seed: int = 0, **fields) -> Decoder:
    """A model with normal weights of standard deviation 0.1; those of norms are around 1."""
    shape = config(family, **fields)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, parameter):
        centre = 1.0 if path[-1] == "weight" else 0.0
        values = rng.normal(centre, 0.1, parameter.shape)
        return parameter.replace(jnp.asarray(values, parameter.dtype))

    drawn = [(path, draw(path, parameter)) for path, parameter in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def save(folder: str | os.PathLike, family: str = "llama", *, seed: int = 0, **fields) -> Decoder:
    """Writes `decoder(family, ...)` as a checkpoint, and returns it."""
    module = decoder(family, seed=seed, **fields)
    checkpoint.save(module, folder)
    return module
