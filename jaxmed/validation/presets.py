"""Shapes of models that speed is measured on."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxmed.data.pairs import Pair
from jaxmed.engine import rates
from models.config import DecoderConfig, Rotary
from models.decoder import Decoder
from models.products import numbers_on_host, stored


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shape of a model that speed is measured on.

    Attributes:
        config: the shape.
        tokens: length of both prompts.
    """

    config: DecoderConfig
    tokens: int


def llama(**fields: Any) -> DecoderConfig:
    """The shape of a Llama without biases, with the other fields of `DecoderConfig` as given."""
    return DecoderConfig(
        family="llama",
        norm_eps=1e-5,
        max_positions=131072,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        activation="silu",
        windows=(None,) * fields["num_layers"],
        **fields,
    )


def _llama3(rotary_factor: float, **fields: Any) -> Preset:
    """A Llama 3, with what its sizes differ in as given, as an accelerator runs it."""
    rotary = Rotary(
        kind="llama3",
        theta=500000.0,
        factor=rotary_factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    config = llama(dtype="bfloat16", vocab_size=128256, num_kv_heads=8, rotary=rotary, **fields)
    return Preset(config, tokens=64)


PRESETS = {
    "12x768": Preset(
        llama(
            dtype="float32",
            vocab_size=32000,
            tie_embeddings=False,
            rotary=Rotary(kind="default", theta=10000.0),
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
        ),
        tokens=32,
    ),
    "llama-3.2-1b": _llama3(
        rotary_factor=32.0,
        tie_embeddings=True,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        head_dim=64,
    ),
    "llama-3.1-8b": _llama3(
        rotary_factor=8.0,
        tie_embeddings=False,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        head_dim=128,
    ),
    "llama-3.1-70b": _llama3(
        rotary_factor=8.0,
        tie_embeddings=False,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        head_dim=128,
    ),
}


_DRAWN_AT_ONCE = 2**22  # numbers of a parameter


def with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The shape with so many blocks, none of which has a window; as it is for 0."""
    if not layers:
        return config
    return dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)


def shape(preset: str, *, layers: int = 0, dtype: str = "") -> DecoderConfig:
    """A preset's shape, with so many blocks (0: its own) and weights of that type ("": its own)."""
    config = with_layers(PRESETS[preset].config, layers)
    return dataclasses.replace(config, dtype=dtype or config.dtype)


def decoder_at(
    config: DecoderConfig, precision: str, say: Callable[[str], None], rows: int | None = None
) -> Decoder:
    """A random decoder with its products in one of `products.PRECISIONS`, or as `rates.AUTO` has
    it for so many rows; `say` is told beforehand."""
    say(f"making {config.num_layers} layers of random weights in {config.dtype}")
    decoder = random_decoder(config)
    if precision == rates.AUTO:
        precision = rates.exact_precision(decoder, rows)
    return decoder.at_precision(precision)


def random_decoder(config: DecoderConfig) -> Decoder:
    """A decoder with normal random weights, always the same, that write as much as they read.

    They are drawn a row or a layer at a time: in float32 all together take several times the
    memory of the model.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    parameters = nnx.to_flat_state(state)
    keys = jax.random.split(jax.random.key(0), len(parameters))
    drawn = [
        (path, parameter.replace(_drawn(key, path[-1], parameter.shape, config.dtype)))
        for key, (path, parameter) in zip(keys, parameters, strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(drawn))


@functools.partial(jax.jit, static_argnames=("name", "shape", "dtype"))
def _drawn(key: Array, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    """A parameter, as the decoder keeps it."""
    if name in ("weight", "bias"):
        return jnp.full(shape, float(name == "weight"), dtype)
    scale = shape[-2] ** -0.5 if name == "kernel" else 0.02

    def draw(key):
        return stored((scale * jax.random.normal(key, shape[1:])).astype(dtype))

    at_once = max(1, _DRAWN_AT_ONCE // math.prod(shape[1:]))
    return jax.lax.map(draw, jax.random.split(key, shape[0]), batch_size=at_once)


def in_float64(decoder: Decoder) -> Decoder:
    """The same model with its weights, and so its activations, in float64; to be called, and used,
    under `jax.enable_x64(True)`."""
    config = decoder.config
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="float64")))
    wide = jax.tree.map(
        lambda kept: jnp.asarray(numbers_on_host(kept).astype(np.float64)), nnx.state(decoder)
    )
    return nnx.merge(graph, wide)


def random_pair(config: DecoderConfig, tokens: int) -> Pair:
    """Two prompts of random tokens, that many each; the answers are tokens 1 and 2."""
    generator = np.random.default_rng(0)
    base, source = generator.integers(0, config.vocab_size, (2, tokens)).tolist()
    return Pair(
        id="random",
        prompt_ids=tuple(base),
        counterfactual_ids=tuple(source),
        harmful_ids=(1,),
        safe_ids=(2,),
    )
