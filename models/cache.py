"""Converted weights on disk, so that the next start is fast.

An entry is a folder: `arrays`, an Orbax checkpoint (Zarr 3, not compressed) that holds each
parameter under its dotted name, and `entry.json`, which says what it is and lists its files. Orbax
writes it. It is read by TensorStore, on which Orbax stands: straight into the buffers that become
the parameters, and only the parts that are asked for; Orbax makes copies on the way.

An entry appears only once it is complete, and is never changed.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import psutil
import tensorstore as ts
from absl import logging

from models.errors import InputError
from models.shapes import AnyArray
from models.weights import Path, Row

# Part of every entry's name: to be raised when entries are laid out in another way.
_LAYOUT = 1
_ARRAYS, _MANIFEST = "arrays", "entry.json"
# The unit in which an array is read: small beside the weights, large beside a disk's latency.
_CHUNK_BYTES = 2**24
# Chunks that are read at the same time.
_READERS = 8
# Smaller files are hashed anew each time.
_REMEMBERED_FROM_BYTES = 2**26


class DamagedEntryError(InputError):
    """An entry whose files are not as they were written."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Converted weights of one checkpoint.

    Attributes:
        folder: where they are.
        about: what `write` was told of them.
        size: of its files, in bytes.
    """

    folder: pathlib.Path
    about: Mapping[str, object]
    size: int

    def read_into(self, path: Path, where: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads a part of a parameter, and converts it to the type of `out`.

        Raises:
            DamagedEntryError: it cannot be read.
        """
        try:
            stored = ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{self._array(path)}/"},
                    # A chunk that is gone would be read as zeros.
                    "fill_missing_data_reads": False,
                },
                context=_context(),
                open=True,
                read=True,
            ).result()
            ts.array(out).write(ts.cast(stored, ts.dtype(out.dtype))[where]).result()
        except ValueError as error:
            raise DamagedEntryError(f"{self._array(path)}: cannot be read ({error})") from error

    def _array(self, path: Path) -> pathlib.Path:
        return self.folder / _ARRAYS / ".".join(path)


def default_folder() -> pathlib.Path:
    """`jaxmed` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "jaxmed"


def name(
    weights_hash: str, adapter_hash: str | None, source_bytes: int, rows: Iterable[Row]
) -> str:
    """The name of the entry of a checkpoint's weights.

    Args:
        weights_hash: of the weight files.
        adapter_hash: of what is merged into them; None where nothing is.
        source_bytes: the size of all these files; it tells without a hash that there can be no
            entry.
        rows: how they hold the parameters.
    """
    said = repr((_LAYOUT, weights_hash, adapter_hash, list(rows)))
    return f"{source_bytes}-{hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}"


def may_hold(cache_dir: pathlib.Path, source_bytes: int) -> bool:
    """Whether there is an entry of a checkpoint of this size."""
    return any((cache_dir / "weights").glob(f"{source_bytes}-*"))


def find(cache_dir: pathlib.Path, entry: str) -> Entry | None:
    """The entry of that name, or None if there is none.

    Raises:
        DamagedEntryError: one of its files is gone, or was changed.
    """
    folder = cache_dir / "weights" / entry
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected, about = dict(manifest["files"]), manifest["about"]
        size = sum(size for size, _ in expected.values())
        found = _files(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{folder / _MANIFEST}: cannot be read ({error})") from error
    if changed := sorted(file for file in expected if expected[file] != found.get(file)):
        raise DamagedEntryError(f"{folder / changed[0]}: is gone, or not as it was written")
    return Entry(folder, about, size)


def write(
    cache_dir: pathlib.Path,
    entry: str,
    parameters: Mapping[Path, AnyArray],
    about: Mapping[str, object],
) -> Entry:
    """Writes an entry; a damaged one of that name is replaced.

    If another process has written it in the meantime, that one stays.

    Args:
        cache_dir: the cache.
        entry: its name.
        parameters: what it holds.
        about: what a reader of its entry.json may want to know.

    Raises:
        OSError: there is no place for it, or no permission.
    """
    folder = cache_dir / "weights" / entry
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    _check_room(folder.parent, sum(array.nbytes for array in parameters.values()))
    partial = folder.with_name(f"{_partial_prefix(folder)}{os.getpid()}")
    partial.mkdir()
    try:
        _write_arrays(partial / _ARRAYS, parameters)
        manifest = {"about": dict(about), "files": _files(partial)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = find(cache_dir, entry)
    assert found is not None
    return found


def remembered_hash(
    cache_dir: pathlib.Path, files: Iterable[pathlib.Path], compute: Callable[[], str]
) -> str:
    """A hash of files that is computed once, unless one of them changes.

    A note of it is named by the files' paths, sizes and times.

    Args:
        cache_dir: where notes are.
        files: what is hashed.
        compute: computes the hash.
    """

    def state() -> list:
        stats = [(str(file.resolve()), file.stat()) for file in files]
        return [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]

    before = state()
    if sum(size for _, size, *_ in before) < _REMEMBERED_FROM_BYTES:
        return compute()
    note = cache_dir / "hashes" / hashlib.blake2b(repr(before).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        noted = note.read_text()
        # One that a power cut has left empty is as good as none.
        if re.fullmatch("[0-9a-f]{64}", noted):
            return noted
    computed = compute()
    if state() == before:
        partial = note.with_name(f".{note.name}.partial-{os.getpid()}")
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(computed)
            os.replace(partial, note)
        except OSError:  # It is not needed: a folder that cannot be written to has no notes.
            pass
    return computed


def _write_arrays(folder: pathlib.Path, parameters: Mapping[Path, AnyArray]) -> None:
    import orbax.checkpoint as ocp  # Here, because only a program that writes needs it.

    arrays = {".".join(path): array for path, array in parameters.items()}
    chunks = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    # Orbax refuses an array that is larger than the limit.
    limit_gb = max(array.nbytes for array in arrays.values()) // 10**9 + 1

    def save() -> None:
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, use_compression=False, save_concurrent_gb=limit_gb
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=chunks))

    # Orbax has threads that go on writing when it is interrupted. So it is not: Ctrl-C reaches the
    # main thread, which leaves this block when all is written.
    with _quiet(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(save).result()
        except ValueError as error:  # TensorStore's, for whatever the disk says.
            raise OSError(str(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports each of its steps to absl's log, which a program shows."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _partial_prefix(folder: pathlib.Path) -> str:
    """What begins the names of unfinished entries of this machine; the process's id ends them."""
    return f".{folder.name}.partial-{platform.node()}-"


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a process that was killed has left of an entry."""
    prefix = _partial_prefix(folder)
    for partial in folder.parent.glob(f"{glob.escape(prefix)}*"):
        process = partial.name.removeprefix(prefix)
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(partial, ignore_errors=True)


def _check_room(folder: pathlib.Path, needed: int) -> None:
    """Raises OSError where there are not so many bytes: Orbax's threads do not end well then."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


def _files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Size in bytes and time of the last change of every file of an entry but its manifest."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / _MANIFEST:
            stat = file.stat()
            found[file.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns]
    return found


def _move(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a complete entry its name, unless a sound one has it already."""
    try:
        if find(folder.parent.parent, folder.name) is not None:
            return
    except DamagedEntryError:
        # Out of the way at once, for whoever looks for it now.
        damaged = partial / "damaged"
        os.rename(folder, damaged)
        shutil.rmtree(damaged)
    try:
        os.rename(partial, folder)
    except OSError:
        if find(folder.parent.parent, folder.name) is None:
            raise


@functools.cache
def _context() -> ts.Context:
    return ts.Context(
        {
            "file_io_concurrency": {"limit": _READERS},
            "data_copy_concurrency": {"limit": _READERS},
            # Files are mapped, so that a chunk is copied once: to its place.
            "file_io_mode": {"mode": "memmap"},
        }
    )
