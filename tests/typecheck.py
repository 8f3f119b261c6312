"""Shapes and types in annotations, checked while tests run."""

import functools
import inspect
import typing

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function):
    """What jaxtyping's import hook checks functions and the fields of dataclasses with.

    JAX takes pytrees apart and fills them with whatever it maps over their leaves: numbers of axes,
    shardings, placeholders. Where a dataclass is made of those, there is nothing to check.
    """
    strict = _strict(function)
    if function.__name__ != "__init__":
        return strict
    signature = inspect.signature(function)
    arrays = {
        name: annotation
        for name, parameter in signature.parameters.items()
        for annotation in [parameter.annotation]
        if any(map(_is_array_type, (annotation, *typing.get_args(annotation))))
    }

    @functools.wraps(function)
    def init(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if all(isinstance(given.get(name), jax.Array | np.ndarray | None) for name in arrays):
            return strict(*args, **kwargs)
        return function(*args, **kwargs)

    return init


def _is_array_type(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, AbstractArray)
