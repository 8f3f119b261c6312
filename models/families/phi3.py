"""Phi-3, Phi-3.5 and Phi-4, without experts or vision (transformers.Phi3ForCausalLM).

Llama without biases; query, key and value are stored as one, and so are gate and up. Models with a
stretched context are computed within the original one.
"""

from models.families import llama
from models.families.family import Family, OneWindow, RotaryAttributes, linear
from models.families.mistral import NO_BIASES

_PROJECTIONS = (
    *linear(
        llama.LAYER + "self_attn.qkv_proj",
        "blocks.attention.query",
        "blocks.attention.key",
        "blocks.attention.value",
    ),
    *linear(llama.LAYER + "self_attn.o_proj", "blocks.attention.output"),
    *linear(llama.LAYER + "mlp.gate_up_proj", "blocks.mlp.gate", "blocks.mlp.up"),
    *linear(llama.LAYER + "mlp.down_proj", "blocks.mlp.down"),
)

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields=llama.fields_without(*NO_BIASES),
    fixed=NO_BIASES,
    windows=OneWindow(),
    rotary=RotaryAttributes(partial=True, older_kind="type"),
    # transformers copies it to rope_parameters where it is read.
    harmless=frozenset({"original_max_position_embeddings"}),
    only_at={
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
    },
    weights=(*llama.ENDS, *_PROJECTIONS, *llama.NORMS),
)
