"""The shape of a decoder. Needs no JAX: a program can refuse it before it loads anything."""

import dataclasses
import math
from typing import TypeGuard


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    Attributes:
        theta: the base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`), "llama3" (the slow frequencies
            divided by `factor`) or "longrope" (each frequency divided by its own factor).
        fraction: how much of each head is rotated: its first channels.
        factor: how far the context was stretched.
        low_freq_factor, high_freq_factor: "llama3" only; turns within the original context below
            which a frequency is divided by `factor`, and above which it is kept.
        original_max_positions: "llama3" and "longrope" only; length of the context before it was
            stretched.
        short_factors: "longrope" only; of each frequency, within the original context.
        long_factors: "longrope" only; of each frequency beyond it, where jaxmed does not go.
        stretched_max_positions: "longrope" only; length of the context after it was stretched.
        attention_factor: "longrope" only; scales the rotated vectors. None follows from how far
            the context was stretched.
    """

    theta: float
    kind: str = "default"
    fraction: float = 1.0
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    stretched_max_positions: int | None = None
    attention_factor: float | None = None

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so that it can be a static argument of `jax.jit`.

    The defaults are what Llama does.

    Attributes:
        family: Hugging Face's `model_type`.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, size of each.
        norm_eps: added to the mean square in every norm.
        max_positions: the longest sequence that can be computed.
        rotary: position embedding; None if there is none.
        qkv_bias, output_bias, mlp_bias: whether these projections have a bias.
        activation: of the MLP's gate, or of its hidden units where it has none; Hugging Face's
            name of it, a key of `ACTIVATIONS`.
        windows: sliding window of each layer, None for full attention; key j is visible to query i
            iff i - window < j <= i.
        tie_embeddings: whether the unembedding is the embedding.
        dtype: of the checkpoint's parameters; float16, bfloat16, float32 or float64.
        window_rotary: the position embedding of layers that have a window, where it is another.
        norm: "rms" or "layer", of every norm.
        norm_offset: added to the weights of every norm.
        pre_norm, post_norm: whether the input of attention and MLP is normed, and their output.
        query_key_norm: None, or whether queries and keys are normed by "head" or "all" heads at
            once, before the rotary embedding.
        query_scalar: scores are divided by its square root; None for the head size.
        inverse_layer_scale: whether scores are also divided by 1 + the index of the layer.
        score_cap, logit_cap: c, where scores or logits go through c tanh(. / c); None if not.
        gated_mlp: whether the MLP has a gate.
        parallel: whether attention and MLP both read the block's input (else the MLP reads what
            attention has added to as well).
        scale_embedding: whether embeddings are multiplied by the square root of the hidden size.
        learned_positions: whether an embedding of each token's position is added.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rotary: Rotary | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    windows: tuple[int | None, ...]
    tie_embeddings: bool
    dtype: str
    window_rotary: Rotary | None = None
    norm: str = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    query_key_norm: str | None = None
    query_scalar: float | None = None
    inverse_layer_scale: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None
    gated_mlp: bool = True
    parallel: bool = False
    scale_embedding: bool = False
    learned_positions: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_positions"):
            check_whole(name, getattr(self, name))
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        for name in ("qkv_bias", "output_bias", "mlp_bias", "tie_embeddings", "parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("query_scalar", "score_cap", "logit_cap"):
            if getattr(self, name) is not None:
                check_above(0, name, getattr(self, name))
        check_above(0, "norm_eps", self.norm_eps)
        for window in self.windows:
            if window is not None:
                check_above(0, "sliding_window", window)
                check_whole("sliding_window", window)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        for rotary in filter(None, (self.rotary, self.window_rotary)):
            self._check_rotary(rotary)

    @property
    def block_weights(self) -> tuple[int, int]:
        """Numbers in the matrices of a block's attention and MLP."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        matrices = 3 if self.gated_mlp else 2
        width = self.hidden_size
        return width * self.head_dim * heads, matrices * width * self.intermediate_size

    def _check_rotary(self, rotary: Rotary) -> None:
        check_above(0, "rope_theta", rotary.theta)
        check_above(0, "the rotated share of a head", rotary.fraction)
        for name in ("factor", "attention_factor"):
            if getattr(rotary, name) is not None:
                check_above(0, f"{name} of the rotary embedding", getattr(rotary, name))
        for factor in (*rotary.short_factors, *rotary.long_factors):
            check_above(0, "a factor of a rotary frequency", factor)
        if rotary.kind == "llama3":
            check_above(0, "low_freq_factor", rotary.low_freq_factor)
            check_above(rotary.low_freq_factor, "high_freq_factor", rotary.high_freq_factor)
        if rotary.kind in ("llama3", "longrope"):
            check_whole("original_max_position_embeddings", rotary.original_max_positions)
        rotated = rotary.rotated(self.head_dim)
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise ValueError(
                f"{rotated} of the {self.head_dim} channels of a head would be rotated; the rotary "
                "embedding needs pairs"
            )
        if rotary.kind == "longrope" and len(rotary.short_factors) != rotated // 2:
            raise ValueError(
                f"{len(rotary.short_factors)} short factors for {rotated // 2} rotary frequencies"
            )


DTYPES = ("float16", "bfloat16", "float32", "float64")


def check_above(bound: float, name: str, value: object) -> None:
    """Raises ValueError unless the value is a finite number above the bound."""
    # Written so that NaN fails.
    if not _is_number(value) or not bound < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a number above {bound}")


def check_whole(name: str, value: object) -> None:
    """Raises ValueError unless the value is a size or an index: at least 1, of 32 bits."""
    if not _is_number(value) or isinstance(value, float) or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, and at least 1")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Hugging Face's names of what an MLP may use, and which function of `models.layers` each is.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
