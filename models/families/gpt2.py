"""GPT-2 (transformers.GPT2LMHeadModel).

LayerNorms, learned positions, a plain MLP and biases everywhere; weights are stored with their
inputs first.
"""

from models.families.family import Family, linear, norm, plain

_LAYER = "transformer.h.{layer}."

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "max_positions": "n_positions",
        "activation": "activation_function",
        "inverse_layer_scale": "scale_attn_by_inverse_layer_idx",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "learned_positions": True,
    },
    rotary=None,
    # The order of scaling and product, heads for other tasks, and OpenAI's name of vocab_size.
    harmless=frozenset(
        {
            "n_ctx",
            "n_special",
            "n_vocab",
            "predict_special_tokens",
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    only_at={"scale_attn_weights": True},
    base_prefix="transformer.",
    ignored=(r"\.attn\.(masked_)?bias$",),
    weights=(
        *plain("transformer.wte.weight", "embedding"),
        *plain("transformer.wpe.weight", "positions"),
        *norm(_LAYER + "ln_1", "blocks.attention_norm"),
        *linear(
            _LAYER + "attn.c_attn",
            "blocks.attention.query",
            "blocks.attention.key",
            "blocks.attention.value",
            transposed=False,
        ),
        *linear(_LAYER + "attn.c_proj", "blocks.attention.output", transposed=False),
        *norm(_LAYER + "ln_2", "blocks.mlp_norm"),
        *linear(_LAYER + "mlp.c_fc", "blocks.mlp.up", transposed=False),
        *linear(_LAYER + "mlp.c_proj", "blocks.mlp.down", transposed=False),
        *norm("transformer.ln_f", "final_norm"),
        *plain("lm_head.weight", "unembedding"),
    ),
)
