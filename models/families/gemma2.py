"""Gemma 2 (transformers.Gemma2ForCausalLM).

Gemma with norms after attention and MLP as well, caps on scores and logits, and a sliding window on
every other layer.
"""

from models.families import gemma, llama
from models.families.family import Family, WindowsByType, norm

FIELDS = llama.fields_without("mlp_bias") | {
    "activation": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "score_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
NORMS = (
    *norm(llama.LAYER + "input_layernorm", "blocks.attention_norm"),
    *norm(llama.LAYER + "post_attention_layernorm", "blocks.attention_post_norm"),
    *norm(llama.LAYER + "pre_feedforward_layernorm", "blocks.mlp_norm"),
    *norm(llama.LAYER + "post_feedforward_layernorm", "blocks.mlp_post_norm"),
)
WEIGHTS = (*llama.ENDS, *llama.ATTENTION, *llama.MLP, *NORMS)

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=FIELDS,
    fixed=gemma.FIXED | {"post_norm": True},
    windows=WindowsByType(),
    harmless=frozenset({"hidden_act"}),
    weights=WEIGHTS,
)
