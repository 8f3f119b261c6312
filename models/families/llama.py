"""Llama 1 to 3, and the many models published in its format (transformers.LlamaForCausalLM)."""

from collections.abc import Mapping

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}
FIXED = {}
WINDOW_ATTRIBUTES = ()

_LAYER = "model.layers.{layer}."
WEIGHTS = (
    ("model.embed_tokens.weight", "embedding", False),
    (_LAYER + "input_layernorm.weight", "blocks.attention_norm.weight", False),
    (_LAYER + "self_attn.q_proj.weight", "blocks.attention.query.kernel", True),
    (_LAYER + "self_attn.q_proj.bias", "blocks.attention.query.bias", False),
    (_LAYER + "self_attn.k_proj.weight", "blocks.attention.key.kernel", True),
    (_LAYER + "self_attn.k_proj.bias", "blocks.attention.key.bias", False),
    (_LAYER + "self_attn.v_proj.weight", "blocks.attention.value.kernel", True),
    (_LAYER + "self_attn.v_proj.bias", "blocks.attention.value.bias", False),
    (_LAYER + "self_attn.o_proj.weight", "blocks.attention.output.kernel", True),
    (_LAYER + "self_attn.o_proj.bias", "blocks.attention.output.bias", False),
    (_LAYER + "post_attention_layernorm.weight", "blocks.mlp_norm.weight", False),
    (_LAYER + "mlp.gate_proj.weight", "blocks.mlp.gate.kernel", True),
    (_LAYER + "mlp.gate_proj.bias", "blocks.mlp.gate.bias", False),
    (_LAYER + "mlp.up_proj.weight", "blocks.mlp.up.kernel", True),
    (_LAYER + "mlp.up_proj.bias", "blocks.mlp.up.bias", False),
    (_LAYER + "mlp.down_proj.weight", "blocks.mlp.down.kernel", True),
    (_LAYER + "mlp.down_proj.bias", "blocks.mlp.down.bias", False),
    ("model.norm.weight", "final_norm.weight", False),
    ("lm_head.weight", "unembedding", False),
)


def windows(attributes: Mapping) -> tuple[None, ...]:
    """Every layer has full attention."""
    return (None,) * attributes["num_hidden_layers"]


def window_attributes(windows: tuple[int | None, ...]) -> dict:
    """Llama has no attribute for a window."""
    return {}
