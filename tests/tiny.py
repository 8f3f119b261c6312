"""Tiny random models of every family, in memory or as checkpoints in Hugging Face's format."""

import os
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import checkpoint
from models.config import DecoderConfig, Rotary
from models.decoder import Decoder
from models.products import stored

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
_NO_GROUPS = {"num_kv_heads": 4, "head_dim": 6}
_GEMMA = {
    "norm_offset": 1.0,
    "scale_embedding": True,
    "activation": "gelu_pytorch_tanh",
    "tie_embeddings": True,
}
_GEMMA2 = _GEMMA | {"post_norm": True, "query_scalar": 5, "windows": (5, None, 5)}
_PLAIN = {"norm": "layer", "mlp_bias": True, "gated_mlp": False} | _NO_GROUPS
_BIASES = {"qkv_bias": True, "output_bias": True}
# What a family has of its own. Windows are shorter than the prompts of the tests.
_FAMILIES = {
    "llama": {},
    "mistral": {"windows": (5, 5, 5)},
    "qwen2": {"qkv_bias": True, "windows": (None, 5, 5)},
    "qwen3": {"query_key_norm": "head", "windows": (None, 5, 5)},
    "gemma": _GEMMA | {"num_kv_heads": 1},
    "gemma2": _GEMMA2 | {"score_cap": 2.0, "logit_cap": 1.5},
    "gemma3_text": _GEMMA2 | {"query_key_norm": "head", "window_rotary": Rotary(theta=100.0)},
    "phi3": {"head_dim": 6, "windows": (5, 5, 5)},
    "olmo2": {"query_key_norm": "all", "pre_norm": False, "post_norm": True},
    "gpt2": _PLAIN
    | _BIASES
    | {"rotary": None, "learned_positions": True, "activation": "gelu_new", "tie_embeddings": True},
    "gpt_neox": _PLAIN
    | _BIASES
    | {"rotary": Rotary(theta=10000.0, fraction=0.34), "activation": "gelu", "parallel": True},
}
FAMILIES = tuple(_FAMILIES)
# Their structures differ most: serial with grouped heads; norms on both sides, windows and caps;
# parallel modules with biases.
STRUCTURES = ("llama", "gemma2", "gpt_neox")


def costly_families(families: Iterable[str] = FAMILIES) -> list:
    """Families as parameters of a costly test: `make test` runs three, `make parity` the others."""
    return [
        pytest.param(family, marks=() if family in STRUCTURES else pytest.mark.parity)
        for family in families
    ]


def config(family: str = "llama", **fields) -> DecoderConfig:
    """The shape of a tiny model of the family, but for the given fields."""
    own = dict(_FAMILIES[family])
    layers = fields.get("num_layers", _SHAPE["num_layers"])
    windows = own.pop("windows", (None,))
    # Layers beyond those that a family names have the window of the last that it does.
    own["windows"] = (*windows, *windows[-1:] * layers)[:layers]
    return DecoderConfig(family=family, **_SHAPE | own | fields)


def decoder(family: str = "llama", *, seed: int = 0, **fields) -> Decoder:
    """A model with normal weights of standard deviation 0.1; norms scale by around 1."""
    shape = config(family, **fields)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, parameter):
        centre = 1.0 - shape.norm_offset if path[-1] == "weight" else 0.0
        values = rng.normal(centre, 0.1, parameter.shape)
        bits = parameter.dtype == jnp.uint16
        values = jnp.asarray(values, jnp.bfloat16 if bits else parameter.dtype)
        return parameter.replace(stored(values) if bits else values)

    drawn = [(path, draw(path, parameter)) for path, parameter in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def save(folder: str | os.PathLike, family: str = "llama", *, seed: int = 0, **fields) -> Decoder:
    """Writes `decoder(family, ...)` as a checkpoint, and returns it."""
    module = decoder(family, seed=seed, **fields)
    checkpoint.save(module, folder)
    return module
