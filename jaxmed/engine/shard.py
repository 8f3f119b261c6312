"""The engine's steps on all devices of a process.

Rows, the units that are edited, are spread over both axes of the decoder's mesh, of which
`models.placement` tells, and every device carries its own, by itself: no product is split, and no
sum crosses devices. The axis `model` only stores: where it is longer than 1 a device has parts of
the weights, and a layer's are gathered as its turn comes (`Decoder.whole`). All devices then have
to take the same turns of a loop that gathers, whose bounds are therefore the earliest and latest of
any device's rows.

What is not spread is computed by every device alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from models import placement
from models.decoder import Decoder

# The axes that rows are spread over.
_ALL = (placement.SWEEP, placement.MODEL)
# Of an argument that every device has whole.
WHOLE = PartitionSpec()


def rows(axis: int) -> PartitionSpec:
    """Of arrays that are spread along an axis."""
    return PartitionSpec(*[None] * axis, _ALL)


def over(
    step: Callable,
    decoder: Decoder,
    *arguments: PyTree,
    given: Sequence[Any],
    gives: Any,
) -> Any:
    """step(decoder, *arguments), made by every device of the decoder's mesh with what is its own.

    Args:
        step: a function that is being compiled; of a decoder whose `parts` are those of a device.
        decoder, arguments: what it is given, whole.
        given: of each argument, `WHOLE` or `rows`; a tree of them where its parts differ.
        gives: likewise of what it returns.
    """
    mesh = decoder.mesh
    if mesh is None:
        return step(decoder, *arguments)
    leaves, structure = jax.tree_util.tree_flatten_with_path(decoder)
    paths = [placement.path_of(keys) for keys, _ in leaves]
    arrays = [array for _, array in leaves]
    places = [
        placement.sharding(path, array.shape, mesh).spec
        for path, array in zip(paths, arrays, strict=True)
    ]
    parts = ()
    if mesh.shape[placement.MODEL] > 1:
        axes = [
            placement.split_axis(path, array.shape, mesh)
            for path, array in zip(paths, arrays, strict=True)
        ]
        parts = tuple((path, axis) for path, axis in zip(paths, axes, strict=True) if axis)

    def on_each(arrays, *arguments):
        own = jax.tree.unflatten(structure, arrays)
        own.mesh, own.parts = None, parts
        return step(own, *arguments)

    return jax.shard_map(
        on_each, mesh=mesh, in_specs=(places, *given), out_specs=gives, check_vma=False
    )(arrays, *arguments)


def earliest(decoder: Decoder, turn: Int[Array, ""]) -> Int[Array, ""]:
    """Of a number that each device has of its own the least, where all must take the same turns."""
    return jax.lax.pmin(turn, _ALL) if decoder.parts else turn


def latest(decoder: Decoder, turn: Int[Array, ""]) -> Int[Array, ""]:
    """Likewise, the largest."""
    return jax.lax.pmax(turn, _ALL) if decoder.parts else turn


def spread(decoder: Decoder, tree: PyTree, axis: int = -1) -> PyTree:
    """Arrays of rows on the devices that carry them.

    Args:
        decoder: whose devices.
        tree: arrays.
        axis: that of the rows, counted from the last.
    """
    if decoder.mesh is None:
        return jax.device_put(tree)
    mesh = decoder.mesh
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, rows(x.ndim + axis))), tree)


def first_everywhere(decoder: Decoder, tree: PyTree, number: int) -> PyTree:
    """The first `number` of arrays that are spread along their first axis, whole on every device.

    They are gathered from device to device: a copy of what is spread goes through the host.
    """
    return tree if decoder.mesh is None else _first_everywhere(tree, number, decoder.mesh)


@functools.partial(jax.jit, static_argnames=("number", "mesh"))
def _first_everywhere(tree: PyTree, number: int, mesh: Mesh) -> PyTree:
    def on_each(tree):
        def gathered(own):
            return jax.lax.all_gather(own, _ALL, tiled=True)[:number]

        return jax.tree.map(gathered, tree)

    return jax.shard_map(on_each, mesh=mesh, in_specs=rows(0), out_specs=WHOLE, check_vma=False)(
        tree
    )
