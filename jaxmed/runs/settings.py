"""Settings of a program: dataclasses whose fields each carry their help, default and range.

A field that is made by `setting` is all there is to write for a flag: `launch.flags` makes the flag
of it, and `check` refuses a value out of range, which a flag or a user of Python may have given.

    @dataclasses.dataclass(frozen=True)
    class ScanSettings:
        model: str = setting(help="Folder or Hugging Face hub id of a checkpoint.", path=True)
        rounds: int = setting(help="How often.", default=5, least=1)

A setting is called as its flag is, in errors too: --rounds=0.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from jaxmed.files import places
from models.errors import InputError

_KEY = "setting"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a field, beside its name, type and default; see `setting`."""

    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    commas: bool = False
    needs: str = ""
    path: bool = False
    bucket: bool = False


def setting(
    *,
    help: str,
    default: Any = dataclasses.MISSING,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    commas: bool = False,
    needs: str = "",
    path: bool = False,
    bucket: bool = False,
) -> Any:
    """A field of a dataclass of settings. Its annotation is str, int, float or bool, or one of
    these or None, or tuple[str, ...].

    Args:
        help: what `--help` says of it, with its unit.
        default: without one, the setting must be given.
        choices: the values that a text may have, or each text of a tuple.
        least, most: the range of a number, which has to be finite where `least` is given.
        above: what a number must be larger than.
        commas: a tuple is given as one flag, with commas; else the flag is given several times.
        needs: another setting, "name" or "name=value", without which (or without which value) this
            one would say nothing, and must keep its default.
        path: whether it is a path, or NAME=PATH; a ~ in its flag is the user's home.
        bucket: whether the path may be gs://bucket/path.
    """
    about = Setting(help, tuple(choices), least, most, above, commas, needs, path, bucket)
    return dataclasses.field(default=default, metadata={_KEY: about})


def like(kind: type, name: str, **changes: Any) -> Any:
    """A field of the same meaning as one of another dataclass of settings.

    Args:
        kind: that dataclass.
        name: of its field.
        changes: a `default` of its own, or other arguments of `setting`.
    """
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    default = changes.pop("default", field.default)
    about = dataclasses.replace(about_field(field), **changes)
    return dataclasses.field(default=default, metadata={_KEY: about})


def about_field(field: dataclasses.Field) -> Setting:
    """What is known of a field that `setting` or `like` has made."""
    return field.metadata[_KEY]


def value_type(kind: type, name: str) -> type:
    """The type of a setting, of those that are not None; tuple where it is several texts."""
    annotation = typing.get_type_hints(kind)[name]
    if isinstance(annotation, types.UnionType):
        (annotation,) = set(typing.get_args(annotation)) - {type(None)}
    return typing.get_origin(annotation) or annotation


def given(settings, name: str) -> bool:
    """Whether a setting is something else than its default."""
    return getattr(settings, name) != getattr(type(settings), name)


def check(settings) -> None:
    """Raises `InputError` where a setting is out of its range, or says nothing without another."""
    fields = {field.name: about_field(field) for field in dataclasses.fields(settings)}
    for name, about in fields.items():
        value = getattr(settings, name)
        if about.choices and value is not None:
            check_choice(f"--{name}", value, about.choices)
        elif about.path and value is not None:
            _check_local(name, value, about)
        elif value is not None:
            _check_range(name, value, about)
    for name, about in fields.items():
        needed, _, value = about.needs.partition("=")
        if needed and given(settings, name):
            has = getattr(settings, needed)
            if not has or (value and has != value):
                raise InputError(f"--{name} needs --{needed}={value or 'K'}")


def check_choice(name: str, value: str | tuple[str, ...], choices: Iterable[str]) -> None:
    """Raises `InputError`, about the flag or argument of this name, where a text, or one of
    several, is none of the choices."""
    choices = list(choices)
    values = value if isinstance(value, tuple) else (value,)
    if unknown := sorted({str(each) for each in values if each not in choices}):
        raise InputError(f"{name}={','.join(unknown)}: not one of {', '.join(choices)}")


def _check_local(name: str, value: str | tuple[str, ...], about: Setting) -> None:
    for path in value if isinstance(value, tuple) else (value,):
        scheme = places.scheme(path)
        if scheme and not (about.bucket and scheme == "gs"):
            buckets = ", or gs://bucket/path" if about.bucket else ", and no bucket"
            raise InputError(f"--{name}={path}: must be a local path{buckets}")


def _check_range(name: str, value: Any, about: Setting) -> None:
    # Written so that NaN fails.
    if about.least is not None and not about.least <= value < math.inf:
        raise InputError(f"--{name}={value}: must be a number, and at least {about.least}")
    if about.above is not None and not about.above < value < math.inf:
        raise InputError(f"--{name}={value}: must be above {about.above}")
    if about.most is not None and not value <= about.most:
        raise InputError(f"--{name}={value}: must be a number, and at most {about.most}")
