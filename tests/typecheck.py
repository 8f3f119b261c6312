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
    # What each field that holds an array can be: it has no value where it may be None.
    arrays = {
        name: jax.Array | np.ndarray | (None if _is_optional(parameter.annotation) else jax.Array)
        for name, parameter in signature.parameters.items()
        if _has_array(parameter.annotation)
    }

    @functools.wraps(function)
    def init(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if all(isinstance(given.get(name), kinds) for name, kinds in arrays.items()):
            return strict(*args, **kwargs)
        return function(*args, **kwargs)

    return init


def _has_array(annotation) -> bool:
    kinds = (annotation, *typing.get_args(annotation))
    return any(isinstance(kind, type) and issubclass(kind, AbstractArray) for kind in kinds)


def _is_optional(annotation) -> bool:
    return type(None) in typing.get_args(annotation)
