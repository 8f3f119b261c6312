"""Flags are made from a dataclass of settings: names, types, defaults, help and ranges."""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from absl import flags

from jaxmed.runs import settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

# The flags belong to the program that asks for them, whose --help then shows them.
flags.disclaim_key_flags()


def of(kind: type[Settings], **defaults: Any) -> Callable[[], Settings]:
    """Defines a flag for each setting; one without a default must be given.

    Args:
        kind: the dataclass, of fields that `jaxmed.runs.settings.setting` makes.
        defaults: those that differ from the fields' own.

    Returns:
        A function that gives the settings, once the flags have been parsed.
    """
    fields = dataclasses.fields(kind)
    for field in fields:
        _define(kind, field, defaults.get(field.name, field.default))

    def given() -> Settings:
        return kind(**{field.name: _value(field) for field in fields})

    return given


def _define(kind: type, field: dataclasses.Field, default: Any) -> None:
    about, value_type = settings.about_field(field), settings.value_type(kind, field.name)
    name, help, required = field.name, about.help, default is dataclasses.MISSING
    if required:
        default = None
    least = about.above if about.least is None else about.least
    if value_type is tuple:
        define = flags.DEFINE_list if about.commas else flags.DEFINE_multi_string
        define(name, None if default is None else list(default), help, required=required)
    elif value_type is bool:
        flags.DEFINE_bool(name, default, help, required=required)
    elif value_type is int:
        low, high = (None if bound is None else int(bound) for bound in (least, about.most))
        flags.DEFINE_integer(name, default, help, low, high, required=required)
    elif value_type is float:
        flags.DEFINE_float(name, default, help, least, about.most, required=required)
    elif about.choices:
        flags.DEFINE_enum(name, default, about.choices, help, required=required)
    else:
        flags.DEFINE_string(name, default, help, required=required)


def _value(field: dataclasses.Field) -> Any:
    """What a setting's flag has; a shell leaves a ~ behind the = to the program."""
    value = flags.FLAGS[field.name].value
    is_path = settings.about_field(field).path
    if isinstance(value, list):
        return tuple(map(_at_home, value)) if is_path else tuple(value)
    return _at_home(value) if is_path and value else value


def _at_home(path: str) -> str:
    """The path, or NAME=PATH, with what ~ or ~USER stands for; an unknown user's stays."""
    return re.sub(r"(?<![^=])~[^/=]*(?=/|$)", lambda found: os.path.expanduser(found[0]), path)
