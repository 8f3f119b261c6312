"""What runs load: the checkpoint, multiplied in a precision that is fast on this machine."""

import dataclasses
import datetime
import json
import pathlib
import typing
from collections.abc import Collection

import models
from jaxmed.data.tokens import Encoder
from jaxmed.engine import rates
from jaxmed.store import claims
from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError

AS_IT_STANDS = (
    "Prompts are text and are used as they stand; --chat wraps them in the tokenizer's chat "
    "template"
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was loaded.

    Attributes:
        folder: of the checkpoint.
        adapter: folder of what was merged into it; None where nothing was.
        decoder, tokenizer: as `models.load` gives them.
    """

    folder: pathlib.Path
    adapter: pathlib.Path | None
    decoder: Decoder
    tokenizer: typing.Any


def load(
    model: str, adapter: str, dtype: str, ignore_config: Collection[str], matmul_precision: str
) -> Loaded:
    """Loads a checkpoint.

    Args:
        model: folder or Hugging Face hub id.
        adapter: folder or hub id of a LoRA adapter that is merged into it; "" for none.
        dtype: of the parameters; "" for the checkpoint's own.
        ignore_config: as in `models.load`.
        matmul_precision: one of `products.PRECISIONS`, or `rates.AUTO`.

    Raises:
        InputError: as `models.load`.
    """
    folder, merged = checkpoint.resolve(model), checkpoint.resolve_adapter(adapter)
    decoder, tokenizer = models.load(
        folder,
        adapter=merged,
        dtype=dtype or None,
        ignore_config=ignore_config,
    )
    if matmul_precision == rates.AUTO:
        matmul_precision = rates.exact_precision(decoder)
    return Loaded(folder, merged, decoder.at_precision(matmul_precision), tokenizer)


def precision(given: str, out: str, *, overwrite: bool) -> str:
    """The precision of a run: what is given, or what its folder's `run.json` says of `rates.AUTO`.

    Args:
        given: one of `products.PRECISIONS`, or `rates.AUTO`.
        out, overwrite: as in `day`.

    Raises:
        InputError: the folder's `run.json` is damaged.
    """
    if given != rates.AUTO or overwrite:
        return given
    return claims.recorded(out, "matmul_precision") or given


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


def template_settings(date: str, template_args: str) -> tuple[datetime.date | None, dict]:
    """The day and the arguments for a chat template, as `MediateSettings` has them; no day for "".

    Raises:
        InputError: --date is no date, or --template_args is no JSON object.
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
    return on, args


def encoder(tokenizer, *, chat: bool, date: str, template_args: str) -> Encoder:
    """Makes tokens of text, as the settings of these names say.

    Args:
        tokenizer: a Hugging Face tokenizer; None if there is none.
        chat, date, template_args: as in `MediateSettings`; without a date it is today.

    Raises:
        InputError: as `template_settings`, or the template does not read an argument.
    """
    on, args = template_settings(date, template_args)
    try:
        return Encoder(tokenizer, chat=chat, date=on, template_args=args)
    except InputError as error:
        raise InputError(f"--{error}") from None
