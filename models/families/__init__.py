"""The families of models that can be read: one short file each, named after HF's `model_type`.

Each file defines a `Family` in `FAMILY`.
"""

from models.families import (
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
)
from models.families.family import Family

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    gemma3_text,
    phi3,
    olmo2,
    gpt2,
    gpt_neox,
)
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def get(model_type: str | None) -> Family:
    """The family of a Hugging Face `model_type`; ValueError if there is none."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
