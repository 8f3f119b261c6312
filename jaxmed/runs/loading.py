"""What runs load: the checkpoint, in a type that this machine computes well in."""

import pathlib
import typing
from collections.abc import Collection

import jax
import jax.numpy as jnp

import models
from models import checkpoint
from models.decoder import Decoder

AS_IT_STANDS = (
    "Prompts are text and are used as they stand; --chat wraps them in the tokenizer's chat "
    "template"
)


def load(
    model: str, dtype: str, ignore_config: Collection[str]
) -> tuple[pathlib.Path, Decoder, typing.Any]:
    """A checkpoint's folder, decoder and tokenizer, which is None where there is none.

    Args:
        model: folder or Hugging Face hub id.
        dtype: of the parameters; "" for the checkpoint's own, but at least float32 on a CPU.
        ignore_config: as in `models.load`.

    Raises:
        InputError: as `models.load`.
    """
    folder = checkpoint.resolve(model)
    decoder, tokenizer = models.load(
        folder,
        dtype=_parameter_type(dtype, folder, ignore_config),
        ignore_config=ignore_config,
    )
    return folder, decoder, tokenizer


def _parameter_type(asked: str, folder: pathlib.Path, ignore_config: Collection[str]) -> str | None:
    """The type that parameters are loaded in; None for the checkpoint's own."""
    if asked or jax.default_backend() != "cpu":
        return asked or None
    # XLA's CPU backend slices no 16-bit floats: it would convert all layers for every chunk.
    return str(jnp.promote_types(checkpoint.stored_dtype(folder, ignore_config), jnp.float32))
