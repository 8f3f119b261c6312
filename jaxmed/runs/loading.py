"""What runs load: the checkpoint, in a type that this machine computes well in."""

import dataclasses
import datetime
import json
import pathlib
import typing
from collections.abc import Collection

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


def load(model: str, adapter: str, dtype: str, ignore_config: Collection[str]) -> Loaded:
    """Loads a checkpoint.

    Args:
        model: folder or Hugging Face hub id.
        adapter: folder or hub id of a LoRA adapter that is merged into it; "" for none.
        dtype: of the parameters; "" for the checkpoint's own, but at least float32 on a CPU.
        ignore_config: as in `models.load`.

    Raises:
        InputError: as `models.load`.
    """
    folder, merged = checkpoint.resolve(model), checkpoint.resolve_adapter(adapter)
    decoder, tokenizer = models.load(
        folder,
        adapter=merged,
        dtype=_parameter_type(dtype, folder, merged, ignore_config),
        ignore_config=ignore_config,
    )
    return Loaded(folder, merged, decoder, tokenizer)


@typing.runtime_checkable
class AskedOfTemplates(typing.Protocol):
    """Settings that say what chat templates are given, and the folder of the run."""

    __dataclass_fields__: typing.ClassVar[dict[str, typing.Any]]

    @property
    def date(self) -> str:
        """The day, as 2026-01-31, or ""."""
        ...

    @property
    def template_args(self) -> str:
        """A JSON object, or ""."""
        ...

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether a run that is there is begun again."""
        ...


Settings = typing.TypeVar("Settings", bound=AskedOfTemplates)


def settled(settings: Settings) -> Settings:
    """The settings, with what chat templates are given as `run.json` records it.

    The day is the one that is given, else the one of the run that is gone on with, else today.
    Arguments that mean the same are written alike.

    Raises:
        InputError: as `template_settings`, or the folder's `run.json` is damaged.
    """
    _, args = template_settings(settings.date, settings.template_args)
    earlier = None if settings.overwrite else claims.recorded(settings.out, "date")
    return dataclasses.replace(
        settings,
        date=settings.date or earlier or datetime.date.today().isoformat(),
        template_args=json.dumps(args, sort_keys=True, ensure_ascii=False) if args else "",
    )


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


def _parameter_type(
    asked: str,
    folder: pathlib.Path,
    adapter: pathlib.Path | None,
    ignore_config: Collection[str],
) -> str | None:
    """The type that parameters are loaded in; None for the checkpoint's own."""
    if asked or jax.default_backend() != "cpu":
        return asked or None
    # XLA's CPU backend slices no 16-bit floats: it would convert all layers for every chunk.
    stored = checkpoint.stored_dtype(folder, adapter, ignore_config)
    return str(jnp.promote_types(stored, jnp.float32))
