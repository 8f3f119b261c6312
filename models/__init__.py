"""Instrumented decoders: from a Hugging Face checkpoint to a Flax NNX module, and back."""

from models.checkpoint import load
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Edit, Site

__all__ = ["Decoder", "DecoderConfig", "Edit", "Site", "load"]
