"""How much memory a run may take on its device, and how much it has taken."""

import pathlib

import jax
import psutil

from models.errors import InputError

# Of the memory that is free when a run starts; the rest is the system's and the compiler's.
DEFAULT_SHARE = 0.8
# On a CPU: what compilers and buffers of the programs take beside what is planned.
_BESIDE = 2**28
_GIB = 2**30
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def free(memory_gb: float | None = None) -> int:
    """Bytes that the budget leaves, now that the weights are loaded.

    Args:
        memory_gb: all that the run may take on its device, weights and (on a CPU) Python included,
            in GiB; by default `DEFAULT_SHARE` of what is free now, and what is taken already.

    Raises:
        InputError: nothing is left.
    """
    available = _available()
    if memory_gb is None:
        return int(DEFAULT_SHARE * available)
    used = _used()
    left = int(memory_gb * _GIB - used)
    if left <= 0:
        raise InputError(
            f"memory_gb={memory_gb}: model and program take {used / _GIB:.2f} GiB already, what "
            f"is computed comes on top, and {available / _GIB:.2f} GiB are free: give more"
        )
    return min(left, available)


def _used() -> int:
    """Bytes that are taken on the device; on a CPU, by this process."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_in_use"]
    return psutil.Process().memory_info().rss + _BESIDE


def _available() -> int:
    """Bytes that can still be taken."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = psutil.virtual_memory().available
    # A container may have less than the machine.
    try:
        limit, taken = (
            int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current")
        )
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - taken))
