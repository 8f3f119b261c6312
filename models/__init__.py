"""Instrumented decoders: from a Hugging Face checkpoint to a Flax NNX module, and back.

Names are loaded when they are first asked for: `import models` alone loads no JAX.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.checkpoint import load
    from models.config import DecoderConfig
    from models.decoder import Decoder
    from models.edits import Edit
    from models.sites import Site

# transformers serves configs and tokenizers here: where torch is not found, it is not missing.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

_HOMES = {
    "Decoder": "models.decoder",
    "DecoderConfig": "models.config",
    "Edit": "models.edits",
    "Site": "models.sites",
    "load": "models.checkpoint",
}
__all__ = ["Decoder", "DecoderConfig", "Edit", "Site", "load"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
