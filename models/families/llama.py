"""Llama 1 to 3, and the many models published in its format (transformers.LlamaForCausalLM)."""

from models.families.family import Family, linear, norm, plain

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

LAYER = "model.layers.{layer}."
ENDS = (
    *plain("model.embed_tokens.weight", "embedding"),
    *norm("model.norm", "final_norm"),
    *plain("lm_head.weight", "unembedding"),
)
ATTENTION = (
    *linear(LAYER + "self_attn.q_proj", "blocks.attention.query"),
    *linear(LAYER + "self_attn.k_proj", "blocks.attention.key"),
    *linear(LAYER + "self_attn.v_proj", "blocks.attention.value"),
    *linear(LAYER + "self_attn.o_proj", "blocks.attention.output"),
)
MLP = (
    *linear(LAYER + "mlp.gate_proj", "blocks.mlp.gate"),
    *linear(LAYER + "mlp.up_proj", "blocks.mlp.up"),
    *linear(LAYER + "mlp.down_proj", "blocks.mlp.down"),
)
NORMS = (
    *norm(LAYER + "input_layernorm", "blocks.attention_norm"),
    *norm(LAYER + "post_attention_layernorm", "blocks.mlp_norm"),
)
QUERY_KEY_NORMS = (
    *norm(LAYER + "self_attn.q_norm", "blocks.attention.query_norm"),
    *norm(LAYER + "self_attn.k_norm", "blocks.attention.key_norm"),
)
WEIGHTS = (*ENDS, *ATTENTION, *MLP, *NORMS)

FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", fields=FIELDS, weights=WEIGHTS)


def fields_without(*fields: str) -> dict[str, str]:
    """Llama's attributes but for those that another family does not have."""
    return {field: name for field, name in FIELDS.items() if field not in fields}
