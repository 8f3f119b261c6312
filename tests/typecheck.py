"""Shapes and types in annotations, checked while tests run."""

import functools
import inspect
import typing

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function):
    """What jaxtyping's import hook checks functions and the fields of dataclasses with.

    JAX takes pytrees apart and fills them with whatever it maps their leaves to: numbers of axes,
    shardings, placeholders, arrays of NumPy on the host. Dataclasses are checked where each field
    of an array holds an array of its kind.
    """
    strict = _strict(function)
    if function.__name__ != "__init__":
        return strict
    signature = inspect.signature(function)
    fields = {name: _kinds(field.annotation) for name, field in signature.parameters.items()}

    @functools.wraps(function)
    def init(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if all(isinstance(given.get(name), kinds) for name, kinds in fields.items() if kinds):
            return strict(*args, **kwargs)
        return function(*args, **kwargs)

    return init


def _kinds(annotation) -> tuple[type, ...]:
    """The kinds of array that a field may hold, and None where it may; empty if it holds none."""
    named = typing.get_args(annotation) or (annotation,)
    kinds = [kind.array_type for kind in named if _is_array_type(kind)]
    return (*kinds, type(None)) if kinds and type(None) in named else tuple(kinds)


def _is_array_type(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)
