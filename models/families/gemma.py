"""Gemma 1 (transformers.GemmaForCausalLM).

Llama with a gate of gelu, weights of norms that count from 1, and embeddings that are scaled.
"""

from models.families import llama
from models.families.family import Family

FIXED = {"mlp_bias": False, "norm_offset": 1.0, "scale_embedding": True}

FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=llama.fields_without("mlp_bias"),
    fixed=FIXED,
    # Of an old config.json; transformers computes the tanh approximation in any case.
    harmless=frozenset({"hidden_activation"}),
    weights=llama.WEIGHTS,
)
