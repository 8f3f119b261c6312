"""What runs load: the checkpoint, multiplied in a precision that is fast on this machine."""

import dataclasses
import datetime
import json
import pathlib
import re
import typing
from collections.abc import Callable, Collection

import jax
from flax import nnx

import models
from jaxmed.data.tokens import Encoder
from jaxmed.engine import rates
from jaxmed.store import claims
from models import checkpoint, placement
from models.decoder import Decoder
from models.errors import InputError

# Of a device's memory, the most that weights take of it where they can be spread over more devices.
_OF_WEIGHTS = 0.6

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


@typing.runtime_checkable
class Settled(typing.Protocol):
    """Settings of what is loaded, of what is settled when a run begins, and of its folder."""

    __dataclass_fields__: typing.ClassVar[dict[str, typing.Any]]

    @property
    def model(self) -> str:
        """Folder or Hugging Face hub id."""
        ...

    @property
    def adapter(self) -> str:
        """Folder or hub id of a LoRA adapter that is merged into it; "" for none."""
        ...

    @property
    def dtype(self) -> str:
        """Of the parameters; "" for the checkpoint's own."""
        ...

    @property
    def ignore_config(self) -> Collection[str]:
        """As in `models.load`."""
        ...

    @property
    def date(self) -> str:
        """The day, as 2026-01-31, or ""."""
        ...

    @property
    def template_args(self) -> str:
        """A JSON object, or ""."""
        ...

    @property
    def matmul_precision(self) -> str:
        """One of `products.PRECISIONS`, or `rates.AUTO`."""
        ...

    @property
    def mesh(self) -> str:
        """As 8x1, or "" for as few devices along `model` as hold the weights."""
        ...

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether a run that is there is begun again."""
        ...


Settings = typing.TypeVar("Settings", bound=Settled)


def load(settings: Settled, rows: int | None = None) -> Loaded:
    """Loads the checkpoint of a run.

    Args:
        settings: which, and how it is multiplied.
        rows: as of `rates.exact_precision`.

    Raises:
        InputError: as `models.load`; or --mesh is none of this process's devices.
    """
    folder = checkpoint.resolve(settings.model)
    adapter = checkpoint.resolve_adapter(settings.adapter)
    dtype, ignore_config = settings.dtype or None, settings.ignore_config

    def size() -> int:
        return checkpoint.size(folder, adapter=adapter, dtype=dtype, ignore_config=ignore_config)

    decoder, tokenizer = models.load(
        folder,
        adapter=adapter,
        dtype=dtype,
        mesh=_mesh(settings, size),
        ignore_config=ignore_config,
    )
    precision = settings.matmul_precision
    if precision == rates.AUTO:
        precision = rates.exact_precision(decoder, rows)
    return Loaded(folder, adapter, decoder.at_precision(precision), tokenizer)


def _mesh(settings: Settled, size: Callable[[], int]) -> jax.sharding.Mesh | None:
    """The devices of this process; `size` gives the bytes of all weights."""
    count = jax.local_device_count()
    if settings.mesh:
        return placement.of_devices(_stored_over(settings.mesh, count))
    return placement.of_devices(_fewest(size(), count) if count > 1 else 1)


def _stored_over(mesh: str, count: int) -> int:
    """Over how many of so many devices a mesh stores weights.

    Raises:
        InputError: it is no mesh, or one of another number of devices.
    """
    sweep, storing = mesh_sizes(mesh)
    if sweep * storing != count:
        possible = ", ".join(f"{count // model}x{model}" for model in _divisors(count))
        raise InputError(
            f"--mesh={mesh}: has {sweep * storing} devices, and this process has {count}: give one "
            f"of {possible}; it takes fewer where it sees fewer (CUDA_VISIBLE_DEVICES=0,1)"
        )
    return storing


def mesh_sizes(mesh: str) -> tuple[int, int]:
    """The sizes of a mesh that is written as 8x1.

    Raises:
        InputError: it is not.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if not found:
        raise InputError(f"--mesh={mesh}: must be two numbers of devices, as 8x1")
    return int(found[1]), int(found[2])


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def _fewest(size: int, count: int) -> int:
    """Over how many of so many devices weights of so many bytes are stored at least; over all of
    them where they do not fit then either, which shows as they are loaded."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # A CPU's devices share its memory.
        return 1
    hold = [number for number in _divisors(count) if size <= number * _OF_WEIGHTS * memory]
    return min(hold, default=count)


def shapes(settings: Settled) -> Loaded:
    """What `load` gives, but for the weights, which are not read: the decoder has their shapes.

    Raises:
        InputError: as `load`.
    """
    folder = checkpoint.resolve(settings.model)
    adapter = checkpoint.resolve_adapter(settings.adapter)
    decoder, tokenizer = checkpoint.shapes(
        folder,
        adapter=adapter,
        dtype=settings.dtype or None,
        ignore_config=settings.ignore_config,
    )
    decoder.mesh = _mesh(settings, lambda: weights_size(decoder))
    precision = settings.matmul_precision
    if precision == rates.AUTO:
        precision = rates.exact_precision(decoder)
    return Loaded(folder, adapter, decoder.at_precision(precision), tokenizer)


def weights_size(decoder: Decoder) -> int:
    """Bytes of a model's weights, on all devices together."""
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(nnx.state(decoder)))


def settled(settings: Settings) -> Settings:
    """The settings, with what is settled when a run begins as `run.json` records it.

    The day for chat templates is the one that is given, else the one of the run that is gone on
    with, else today. Their arguments that mean the same are written alike. A precision that is not
    given is that of the run that is gone on with; it is left to `load` where there is none.

    Raises:
        InputError: as `template_settings`, or the folder's `run.json` is damaged.
    """
    _, args = template_settings(settings.date, settings.template_args)

    def earlier(key: str):
        return None if settings.overwrite else claims.recorded(settings.out, key)

    precision = settings.matmul_precision
    if precision == rates.AUTO:
        precision = earlier("matmul_precision") or precision
    return dataclasses.replace(
        settings,
        date=settings.date or earlier("date") or datetime.date.today().isoformat(),
        matmul_precision=precision,
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
