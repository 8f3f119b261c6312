"""Gemma 3, text only (transformers.Gemma3ForCausalLM).

Gemma 2 with a norm on every head's query and key, and another rotary base on the layers that have a
sliding window.
"""

from models.families import gemma, gemma2, llama
from models.families.family import Family, RotaryAttributes, WindowsByType

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields=gemma2.FIELDS,
    fixed=gemma.FIXED | {"post_norm": True, "query_key_norm": "head"},
    windows=WindowsByType("sliding_window_pattern", "_sliding_window_pattern"),
    rotary=RotaryAttributes(by_layer_type=True),
    weights=(*gemma2.WEIGHTS, *llama.QUERY_KEY_NORMS),
)
