"""What runs load: the checkpoint, in a type that this machine computes well in."""

import datetime
import json
import pathlib
import typing

import jax
import jax.numpy as jnp

import models
from jaxmed.data.tokens import Encoder
from jaxmed.store import claims
from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError

AS_IT_STANDS = (
    "Prompts are text and are used as they stand; --chat wraps them in the tokenizer's chat "
    "template"
)


def load(model: str, dtype: str) -> tuple[pathlib.Path, Decoder, typing.Any]:
    """A checkpoint's folder, decoder and tokenizer, which is None where there is none.

    Args:
        model: folder or Hugging Face hub id.
        dtype: of the parameters; "" for the checkpoint's own, but at least float32 on a CPU.

    Raises:
        InputError: as `models.load`.
    """
    folder = checkpoint.resolve(model)
    decoder, tokenizer = models.load(folder, dtype=_parameter_type(dtype, folder))
    return folder, decoder, tokenizer


def day(given: str, out: str, *, overwrite: bool) -> str:
    """The day that it is for chat templates, as 2026-01-31.

    Args:
        given: it, or "".
        out: folder of the run, whose day is kept where it is gone on with.
        overwrite: begin again, today.

    Raises:
        InputError: the folder's `run.json` is damaged.
    """
    earlier = None if overwrite else claims.recorded(out, "date")
    return given or earlier or datetime.date.today().isoformat()


def encoder(tokenizer, *, chat: bool, date: str, template_args: str) -> Encoder:
    """Makes tokens of text, as the settings of these names say.

    Args:
        tokenizer: a Hugging Face tokenizer; None if there is none.
        chat, date, template_args: as in `MediateSettings`; without a date it is today.

    Raises:
        InputError: --date is no date, or --template_args is not what the template reads.
    """
    try:
        on = datetime.date.fromisoformat(date) if date else None
    except ValueError:
        raise InputError(f"--date={date}: must be a day, as 2026-01-31") from None
    try:
        args = json.loads(template_args or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"--template_args={template_args}: not JSON ({error})") from None
    if not isinstance(args, dict):
        raise InputError(f"--template_args={template_args}: must be a JSON object")
    try:
        return Encoder(tokenizer, chat=chat, date=on, template_args=args)
    except InputError as error:
        raise InputError(f"--{error}") from None


def _parameter_type(asked: str, folder: pathlib.Path) -> str | None:
    """The type that parameters are loaded in; None for the checkpoint's own."""
    if asked or jax.default_backend() != "cpu":
        return asked or None
    # XLA's CPU backend slices no 16-bit floats: it would convert all layers for every chunk.
    return str(jnp.promote_types(checkpoint.stored_dtype(folder), jnp.float32))
