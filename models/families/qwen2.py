"""Qwen2 and Qwen2.5, without experts or vision (transformers.Qwen2ForCausalLM).

Llama with biases on query, key and value, and a sliding window on some layers.
"""

from models.families import llama
from models.families.family import Family, WindowsFromLayer

_BIASES = {"qkv_bias": True, "output_bias": False, "mlp_bias": False}

# transformers reads head_dim where config.json has it, though its class does not declare it.
FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=llama.fields_without(*_BIASES),
    fixed=_BIASES,
    windows=WindowsFromLayer(),
    weights=llama.WEIGHTS,
)
