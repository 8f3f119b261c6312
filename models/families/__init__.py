"""The families of models that can be read: one short file each, named after HF's `model_type`.

A family is a module with
    MODEL_TYPE         Hugging Face's `model_type`
    ARCHITECTURE       name of the transformers class, written into exported checkpoints
    FIELDS             field of DecoderConfig -> attribute of the HF config
    FIXED              fields of DecoderConfig that the family always has
    WINDOW_ATTRIBUTES  attributes of the HF config that say which layers have a sliding window
    windows, window_attributes
                       from these attributes to `DecoderConfig.windows`, and back
    WEIGHTS            rows (tensor in the checkpoint, parameter of the Decoder, transposed or not)

A row whose parameter a given Decoder does not have (a bias, the unembedding) does not apply to it.
"""

import types

from models.families import llama, qwen2

_FAMILIES = {family.MODEL_TYPE: family for family in (llama, qwen2)}


def get(model_type: str | None) -> types.ModuleType:
    """The family of a Hugging Face `model_type`; ValueError if there is none."""
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]
