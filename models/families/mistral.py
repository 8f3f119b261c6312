"""Mistral, without experts (transformers.MistralForCausalLM).

Llama without biases; the first versions have a sliding window on every layer.
"""

from models.families import llama
from models.families.family import Family, OneWindow

NO_BIASES = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=llama.fields_without(*NO_BIASES),
    fixed=NO_BIASES,
    windows=OneWindow(),
    weights=llama.WEIGHTS,
)
