"""How much memory a run may take on its device, and how much it has taken."""

import os
import pathlib

import jax

from models.errors import InputError

# Of the memory that is free when a run starts; the rest is the system's and the compiler's.
DEFAULT_SHARE = 0.8
_GIB = 2**30


def free(memory_gb: float | None = None) -> int:
    """Bytes that the budget leaves, now that the weights are loaded.

    Args:
        memory_gb: all that the run may take on its device, weights and (on a CPU) Python included,
            in GiB; by default `DEFAULT_SHARE` of what is free now, and what is taken already.

    Raises:
        InputError: nothing is left.
    """
    used, total = _used(), _available()
    left = int(DEFAULT_SHARE * total if memory_gb is None else memory_gb * _GIB - used)
    if left <= 0:
        asked = "the device is full" if memory_gb is None else f"--memory_gb={memory_gb}"
        raise InputError(
            f"{asked}: model and program take {used / _GIB:.2f} GiB already, and "
            f"{total / _GIB:.2f} GiB are free"
        )
    return left


def _used() -> int:
    """Bytes that are taken on the device; on a CPU, by this process."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_in_use"]
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available() -> int:
    """Bytes that can still be taken."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    fields = dict(
        line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
    )
    return int(fields["MemAvailable"].split()[0]) * 1024
