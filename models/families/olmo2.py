"""OLMo 2 (transformers.Olmo2ForCausalLM).

Llama with norms after attention and MLP in place of those before, and a norm on the queries and
keys of all heads together.
"""

from models.families import llama
from models.families.family import Family, RotaryAttributes, norm

_NORMS = (
    *norm(llama.LAYER + "post_attention_layernorm", "blocks.attention_post_norm"),
    *norm(llama.LAYER + "post_feedforward_layernorm", "blocks.mlp_post_norm"),
)

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=llama.fields_without("mlp_bias"),
    fixed={"mlp_bias": False, "pre_norm": False, "post_norm": True, "query_key_norm": "all"},
    rotary=RotaryAttributes(older_kind="type"),
    weights=(*llama.ENDS, *llama.ATTENTION, *llama.MLP, *_NORMS, *llama.QUERY_KEY_NORMS),
)
