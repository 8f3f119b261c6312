"""GPT-NeoX and Pythia (transformers.GPTNeoXForCausalLM).

LayerNorms, a plain MLP, biases, part of each head rotated; attention and MLP mostly in parallel.
Query, key and value are stored as one, head by head.
"""

from models.families.family import Family, RotaryAttributes, linear, norm, plain

_LAYER = "gpt_neox.layers.{layer}."

FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "max_positions": "max_position_embeddings",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "activation": "hidden_act",
        "parallel": "use_parallel_residual",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"norm": "layer", "mlp_bias": True, "gated_mlp": False},
    rotary=RotaryAttributes(
        partial=True, older_base="rotary_emb_base", older_fraction="rotary_pct"
    ),
    base_prefix="gpt_neox.",
    ignored=(r"\battention\.(masked_)?bias$", r"\brotary_emb\.inv_freq$"),
    weights=(
        *plain("gpt_neox.embed_in.weight", "embedding"),
        *norm(_LAYER + "input_layernorm", "blocks.attention_norm"),
        *linear(
            _LAYER + "attention.query_key_value",
            "blocks.attention.query",
            "blocks.attention.key",
            "blocks.attention.value",
            by_head=True,
        ),
        *linear(_LAYER + "attention.dense", "blocks.attention.output"),
        *norm(_LAYER + "post_attention_layernorm", "blocks.mlp_norm"),
        *linear(_LAYER + "mlp.dense_h_to_4h", "blocks.mlp.up"),
        *linear(_LAYER + "mlp.dense_4h_to_h", "blocks.mlp.down"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *plain("embed_out.weight", "unembedding"),
    ),
)
