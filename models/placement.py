"""Where parameters live: how they are split over a mesh, and how they get there without a copy."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models.weights import Path

# Edits and prompts are spread over both axes of a mesh, weights over the second alone.
SWEEP, MODEL = "sweep", "model"

# Attention and MLP are split by their inner units, vocabularies by the numbers of a token's vector,
# so that few tokens' vectors can be looked up before they are gathered: the axis of each parameter
# that goes along the mesh's `model` axis, counted from the last. All others are on every device.
_OUTPUTS = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
_INPUTS = ("attention.output", "mlp.down")
_SPLIT_AXIS = {
    "embedding": -1,
    "unembedding": -1,
    **{f"blocks.{module}.kernel": -1 for module in _OUTPUTS},
    **{f"blocks.{module}.bias": -1 for module in _OUTPUTS},
    **{f"blocks.{module}.kernel": -2 for module in _INPUTS},
}

# XLA takes over a host buffer that starts at a multiple of it, in bytes.
_ALIGNMENT = 64
# Numbers that are converted at a time, so that they stay in the processor's cache, and rows of a
# matrix that is transposed: as many numbers as fill a line of that cache.
_BLOCK = 2**15
_BLOCK_ROWS = 16


def check(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that parameters cannot be placed on.

    Raises:
        ValueError: it lacks an axis, or has one that is not AxisType.Auto.
    """
    if set(mesh.axis_names) != {SWEEP, MODEL} or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"a mesh needs the axes {SWEEP!r} and {MODEL!r}, of AxisType.Auto; this is {mesh}"
        )


def of_devices(model: int = 1) -> Mesh | None:
    """This process's devices as a mesh, so many of them along `model`; None where there is one.

    Raises:
        ValueError: their number is no multiple of `model`.
    """
    devices = jax.local_devices()
    return None if len(devices) == 1 == model else of(devices, model)


def of(devices: Sequence[Any], model: int) -> Mesh:
    """A mesh of JAX's devices, so many of them along `model`; errors those of `of_devices`."""
    if len(devices) % model:
        raise ValueError(f"{len(devices)} devices: {model} along {MODEL!r} do not divide them")
    shape = (len(devices) // model, model)
    return jax.make_mesh(shape, (SWEEP, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def named(mesh: Mesh | None) -> str:
    """Its sizes, as 8x1; 1x1 of one device."""
    return "1x1" if mesh is None else f"{mesh.shape[SWEEP]}x{mesh.shape[MODEL]}"


def split_axis(path: Path, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> int | None:
    """The axis of a parameter that is split, counted from the last, which is -1; None where it is
    on every device. An axis that `model` does not divide stays whole."""
    axis = _SPLIT_AXIS.get(".".join(path))
    return None if axis is None or shape[axis] % mesh.shape[MODEL] else axis


def sharding(path: Path, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """How a parameter lies on a mesh."""
    axis = split_axis(path, shape, mesh)
    if axis is None:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) + axis), MODEL))


def path_of(keys: tuple) -> Path:
    """A parameter's path, from JAX's keys of its array in a module."""
    *path, _ = keys  # The last is that of the array in the parameter.
    return tuple(key.name for key in path)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a parameter that one or several devices of this host hold.

    Attributes:
        where: the part, a slice for each axis.
        buffer: its values.
    """

    where: tuple[slice, ...]
    buffer: np.ndarray

    def of_layer(self, layer: int | None) -> "Piece":
        """The part of one layer; all of it where the parameter has no layer axis."""
        return self if layer is None else Piece(self.where[1:], self.buffer[layer])


class Placing:
    """A parameter on its way to the devices: empty buffers, to be filled and handed over.

    On a CPU they become the parameter itself. A part that several devices hold is there once.

    Args:
        shape, dtype: of the parameter's numbers.
        sharding: where it goes; None for the default device.
    """

    def __init__(self, shape: tuple[int, ...], dtype, sharding: NamedSharding | None):
        self._shape, self._dtype, self._sharding = shape, np.dtype(dtype), sharding
        whole = (slice(None),) * len(shape)
        devices: dict[Any, tuple[slice, ...]] = {None: whole}
        if sharding is not None:
            parts = sharding.addressable_devices_indices_map(shape)
            devices = {device: where or whole for device, where in parts.items()}
        # By their bounds, because Python 3.11 does not hash slices.
        self._bounds = {
            device: tuple(s.indices(n)[:2] for s, n in zip(where, shape, strict=True))
            for device, where in devices.items()
        }
        self._pieces = {
            bounds: Piece(
                tuple(slice(*pair) for pair in bounds),
                _aligned([stop - start for start, stop in bounds], self._dtype),
            )
            for bounds in set(self._bounds.values())
        }

    @property
    def pieces(self) -> list[Piece]:
        """The parts of the parameter that this host's devices hold; they do not overlap."""
        return list(self._pieces.values())

    def hand_over(self, kept_as: DTypeLike | None = None) -> jax.Array:
        """The parameter, once every piece is filled; its buffers must not be changed any more.

        Args:
            kept_as: the type of an integer for the bits of its numbers; by default their own.
        """
        kept_as = self._dtype if kept_as is None else kept_as
        if self._sharding is None:
            (piece,) = self.pieces
            return jax.device_put(piece.buffer.view(kept_as))
        arrays = [
            jax.device_put(self._pieces[bounds].buffer.view(kept_as), device)
            for device, bounds in self._bounds.items()
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


def copy(values: np.ndarray, out: np.ndarray) -> bool:
    """Copies and converts block by block; returns whether all that was written is finite."""
    bits = _bits(out)
    finite = True
    with np.errstate(over="ignore"):  # An overflow is not finite.
        for block in _blocks(values):
            converted = values[block].astype(out.dtype, copy=False)
            finite = finite and _is_finite(converted)
            bits[block] = _bits(converted)
    return finite


def all_finite(values: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity."""
    return all(_is_finite(values[block]) for block in _blocks(values))


def _is_finite(values: np.ndarray) -> bool:
    """As integers without their sign, numbers that are not finite are the largest."""
    bits, infinity = _bits(values), _bits(np.array(np.inf, values.dtype))
    return bool((bits << 1).max() < infinity << 1)


def _bits(values: np.ndarray) -> np.ndarray:
    """The array as integers; NumPy is several times slower with bfloat16, which is not its own."""
    return values.view(f"u{values.itemsize}")


def _blocks(values: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Cuts an array along the axis on which its memory is furthest apart."""
    axis = int(np.argmax(np.abs(values.strides)))
    length = values.shape[axis]
    rows = max(_BLOCK_ROWS, _BLOCK * length // values.size)
    for first in range(0, length, rows):
        yield (slice(None),) * axis + (slice(first, first + rows),)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
