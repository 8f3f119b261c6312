"""Shapes of models that speed is measured on."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from jaxmed.data.pairs import Pair
from models.config import DecoderConfig, Rotary
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shape of a model, and the length of both prompts in tokens."""

    config: DecoderConfig
    tokens: int
    matmul_precision: str


def llama(dtype: str, vocab_size: int, tie: bool, rotary: Rotary, **sizes: int) -> DecoderConfig:
    """The shape of a Llama without biases."""
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        norm_eps=1e-5,
        max_positions=131072,
        rotary=rotary,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        activation="silu",
        windows=(None,) * sizes["num_layers"],
        tie_embeddings=tie,
        dtype=dtype,
        **sizes,
    )


def _llama3_rotary(factor: float) -> Rotary:
    return Rotary(
        kind="llama3",
        theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )


PRESETS = {
    "12x768": Preset(
        llama(
            *("float32", 32000, False, Rotary(kind="default", theta=10000.0)),
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
        ),
        tokens=32,
        matmul_precision="float32",
    ),
    "llama-3.2-1b": Preset(
        llama(
            *("bfloat16", 128256, True, _llama3_rotary(32.0)),
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
        ),
        tokens=64,
        matmul_precision="bfloat16",
    ),
    "llama-3.1-8b": Preset(
        llama(
            *("bfloat16", 128256, False, _llama3_rotary(8.0)),
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
        ),
        tokens=64,
        matmul_precision="bfloat16",
    ),
}


def random_decoder(config: DecoderConfig) -> Decoder:
    """A decoder with the initialisers' random weights."""
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def random_pair(config: DecoderConfig, tokens: int) -> Pair:
    """Two prompts of random tokens."""
    generator = np.random.default_rng(0)
    base, source = generator.integers(0, config.vocab_size, (2, tokens)).tolist()
    return Pair("random", tuple(base), tuple(source), (1,), (2,))
