"""Qwen3, without experts or vision (transformers.Qwen3ForCausalLM).

Llama with a norm on every head's query and key, and a sliding window on some layers.
"""

from models.families import llama
from models.families.family import Family, WindowsFromLayer

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=llama.fields_without("mlp_bias"),
    fixed={"mlp_bias": False, "query_key_norm": "head"},
    windows=WindowsFromLayer(),
    weights=(*llama.WEIGHTS, *llama.QUERY_KEY_NORMS),
)
