"""How much memory a run may take on its device, and how much it has taken."""

import pathlib
from collections.abc import Iterator

import jax
import psutil

from models.errors import InputError

# Of the memory that is free when a run starts; the rest is the system's and the compiler's.
DEFAULT_SHARE = 0.8
# On a CPU: what compilers and buffers of the programs take beside what is planned.
_BESIDE = 2**28
_GIB = 2**30
_ROOT = pathlib.Path("/")

# By type of file system, the files of a control group: its limits, what it uses, and the keys of
# memory.stat that say how much of that is pages of files, which the kernel takes back when needed.
_CGROUP_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def free(memory_gb: float | None = None) -> int:
    """Bytes that the budget leaves, now that the weights are loaded.

    Args:
        memory_gb: all that the run may take on its device, weights and (on a CPU) Python included,
            in GiB; by default `DEFAULT_SHARE` of what is free now, and what is taken already.

    Raises:
        InputError: nothing is left, or the device does not say how much there is.
    """
    available = _available()
    if memory_gb is None:
        if available is None:
            kind = jax.devices()[0].device_kind
            raise InputError(
                f"memory_gb (--memory_gb): the device, {kind}, does not say how much memory it "
                "has; give all that the run may take there, weights included, in GiB"
            )
        return int(DEFAULT_SHARE * available)
    used = _used()
    left = int(memory_gb * _GIB - used)
    if left <= 0:
        told = "" if available is None else f", and {available / _GIB:.2f} GiB are free"
        raise InputError(
            f"memory_gb={memory_gb} (--memory_gb): model and program take {used / _GIB:.2f} GiB "
            f"already, what is computed comes on top{told}: give more"
        )
    return left if available is None else min(left, available)


def left_in_cgroups(root: pathlib.Path) -> int | None:
    """Bytes that this process's control groups leave it; None where none of them has a limit.

    A container is a control group, and so is each that it is inside of: the tightest counts. Pages
    of files that can be taken back are not counted as used.

    Args:
        root: of the machine's files.
    """
    lefts = []
    for kind, folder in _cgroups(root):
        limits, usage, reclaimable = _CGROUP_FILES[kind]
        found = [limit for name in limits if (limit := _number(folder / name)) is not None]
        used = _number(folder / usage)
        if found and used is not None:
            stat = _stat(folder / "memory.stat")
            taken = used - sum(stat.get(key, 0) for key in reclaimable)
            lefts.append(min(found) - taken)
    return max(0, min(lefts)) if lefts else None


def _used() -> int:
    """Bytes that are taken on the device; on a CPU, by this process."""
    device = jax.devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_in_use"]
    if device.platform == "cpu":
        return psutil.Process().memory_info().rss + _BESIDE
    arrays = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in arrays if shard.device == device)


def _available() -> int | None:
    """Bytes that can still be taken; None where an accelerator does not say."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        machine, container = psutil.virtual_memory().available, left_in_cgroups(_ROOT)
        return machine if container is None else min(machine, container)
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def _cgroups(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """The control groups of this process that can be seen, each before the one around it.

    Yields:
        The type of their file system, a key of `_CGROUP_FILES`, and their folder.
    """
    memberships = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        controller = {"cgroup2": "", "cgroup": "memory"}.get(kind)
        if controller is None or controller not in ("", *options.split(",")):
            continue
        # What part of the hierarchy is seen, and where: a container may see its own group alone.
        top, point = (pathlib.PurePosixPath(path) for path in mount.split(" ")[3:5])
        first = root / point.relative_to("/")
        for _, controllers, path in memberships:
            if controller in controllers.split(","):
                inside = _inside(pathlib.PurePosixPath(path), top)
                folder = first / inside if (first / inside).is_dir() else first
                yield kind, folder
                while folder != first:
                    folder = folder.parent
                    yield kind, folder


def _inside(path: pathlib.PurePosixPath, top: pathlib.PurePosixPath) -> pathlib.PurePosixPath:
    """A group's path from the top of what is seen; that top itself where it lies outside."""
    if ".." in path.parts or not path.is_relative_to(top):
        return pathlib.PurePosixPath()
    return path.relative_to(top)


def _lines(file: pathlib.Path) -> list[str]:
    """Of a file that other systems than Linux do not have."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(file: pathlib.Path) -> int | None:
    """What a file holds; None where that is no number ("max", for no limit) or it is missing."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _stat(file: pathlib.Path) -> dict[str, int]:
    pairs = [line.split() for line in _lines(file)]
    return {name: int(value) for name, value in pairs}
