"""Where files lie: in a local folder or in a bucket; one way to read and write both.

Files appear whole or not at all, and can be replaced only if nobody else has replaced them since
they were read (TensorStore's key-value store: a rename here, a precondition of the request there).
"""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import tensorstore as ts

from models.errors import InputError

# Of requests to a bucket that fail for a while: TensorStore's own, a quarter of an hour in all.
RETRIES = {"max_retries": 32, "initial_delay": "1s", "max_delay": "32s"}

_SCHEME = re.compile(r"(?:^|=)([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"gs://([^/]+)/*(.*?)/*")
_LOCK = ".__lock"  # TensorStore's: what a file is called while it is written
_AT_ONCE = 256  # requests under way, where many files are read or written


class PlaceError(InputError):
    """A place cannot be read or written: a full disk, missing rights, a bucket that is gone.

    What was written before is whole, and whoever comes again goes on with it.
    """


def scheme(path: str) -> str:
    """The scheme of SCHEME://..., or of NAME=SCHEME://...; "" for a local path."""
    found = _SCHEME.search(path)
    return found[1] if found else ""


def at(folder: "str | os.PathLike | Place") -> "Place":
    """The place of this name: a local path, in which ~ is the user's home, or gs://bucket/path.

    Raises:
        InputError: it is the address of something else.
    """
    return folder if isinstance(folder, Place) else Place(os.fspath(folder))


def gone(place: "Place", name: str) -> PlaceError:
    """The error where a file was deleted that was there before."""
    return PlaceError(
        f"{place.path(name)}: is there no longer; the folder, or its bucket, was deleted meanwhile"
    )


class Place:
    """A local folder or a part of a bucket, which need not be there yet; see `at`.

    Files in it are named by their paths below it, with "/". Where it cannot be read or written the
    methods raise `PlaceError`.

    Attributes:
        folder: the local folder; None for a bucket.
        context: with which TensorStore opens arrays in it.
    """

    def __init__(self, folder: str):
        self.folder: pathlib.Path | None = None
        self.context = ts.Context({"gcs_request_retries": RETRIES})
        bucket = _BUCKET.fullmatch(folder)
        if bucket:
            self._name = folder.rstrip("/")
            path = f"{bucket[2]}/" if bucket[2] else ""
            self._spec = {"driver": "gcs", "bucket": bucket[1], "path": path}
        elif scheme(folder):
            raise InputError(f"{folder}: neither a local path nor gs://bucket/path")
        else:
            self.folder = pathlib.Path(os.path.expanduser(folder))
            self._name = str(self.folder)
            self._spec = {"driver": "file", "path": f"{os.path.abspath(self.folder)}/"}
        with self.reading():
            self._files = ts.KvStore.open(self._spec, context=self.context).result()

    def __str__(self) -> str:
        return self._name

    def path(self, name: str) -> str:
        """How a file is called in messages."""
        return f"{self}/{name}"

    def spec(self, name: str) -> dict[str, Any]:
        """How TensorStore names what is below this."""
        return {**self._spec, "path": f"{self._spec['path']}{name}/"}

    def make(self) -> None:
        """Makes the folder if it is local and not there."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlaceError(f"{self}: cannot be made ({error.strerror})") from error

    def is_empty(self) -> bool:
        """Whether no file is there."""
        if self.folder is None:
            return not self.names()
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return all(path.name.endswith(_LOCK) for path in there)

    def read(self, name: str) -> bytes | None:
        """What a file holds; None if there is none."""
        return self.look(name)[0]

    def look(self, name: str) -> tuple[bytes | None, bytes]:
        """What a file holds, None if there is none, and its generation, which `replace` takes."""
        with self.reading():
            found = self._files.read(name).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.read(name) is not None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        with self.writing():
            self._files.write(name, data).result()

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Writes many files, several at a time; each is whole or not there."""
        for some in _batches(files):
            with self.writing():
                _wait([self._files.write(name, data) for name, data in some])

    def replace(self, name: str, data: bytes, generation: bytes) -> bool:
        """Writes a file if it is still of this generation, and says whether it was.

        Where a bucket's answer is lost, so that the request is repeated, it may say no though it
        was.
        """
        with self.writing():
            stamp = self._files.write(name, data, if_equal=generation).result()
        return bool(stamp.generation)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file if there is none of this name, and says whether it has this content now:
        of several that write each its own at once, it is true for one."""
        there, generation = self.look(name)
        if there is not None:
            return False
        return self.replace(name, data, generation) or self.read(name) == data

    def names(self, prefix: str = "") -> list[str]:
        """The files whose names begin so, in order."""
        with self.reading():
            found = self._files.list(_beginning(prefix)).result()
        return sorted(name.decode() for name in found)

    def read_all(self, prefix: str) -> Iterator[tuple[str, bytes, bytes]]:
        """Name, content and generation of the files whose names begin so, in order of names."""
        for some in _batches(self.names(prefix)):
            with self.reading():
                found = _wait([self._files.read(name) for name in some])
            for name, one in zip(some, found, strict=True):
                if one.state == "value":
                    yield name, one.value, one.stamp.generation

    def delete(self, name: str) -> None:
        """Deletes a file, and all that is below this name; nothing if there is none."""
        if self.folder is None:
            with self.writing():
                self._files.delete_range(_beginning(f"{name}/")).result()
                self._files.write(name, None).result()
            return
        path = self.folder / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise PlaceError(f"{path}: cannot be deleted ({error.strerror})") from error

    def publish(self, local: pathlib.Path) -> None:
        """Copies all files of a local folder, those in folders of it first."""
        files = [path for path in local.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (-len(path.parts), path)):
            self.write(path.relative_to(local).as_posix(), path.read_bytes())

    @contextlib.contextmanager
    def written_locally(self) -> Iterator[pathlib.Path]:
        """A local folder for those who write files by path: the place itself, or one whose files
        are published at the end."""
        try:
            if self.folder is not None:
                yield self.folder
                return
            with tempfile.TemporaryDirectory() as folder:
                yield pathlib.Path(folder)
                self.publish(pathlib.Path(folder))
        except OSError as error:
            raise self._not_written(error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Has what TensorStore raises while it writes here be a `PlaceError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> PlaceError:
        return PlaceError(
            f"{self}: cannot be written to ({reason(error)}). What was finished is kept: see to "
            "room, rights and connection, and give the same command again"
        )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Has what TensorStore raises while it reads here be a `PlaceError`."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            raise PlaceError(f"{self}: cannot be read ({reason(error)})") from error


def _wait(futures: list[ts.Future]) -> list:
    return [future.result() for future in futures]


def _batches(items: Iterable) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, _AT_ONCE)), [])


def _beginning(prefix: str) -> ts.KvStore.KeyRange:
    """Names that begin so."""
    after = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    return ts.KvStore.KeyRange(prefix, after)


def reason(error: Exception) -> str:
    """What the system says; or TensorStore, without what it adds for its developers: a status
    before, and notes in brackets after."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = re.sub(r"^[A-Z_]+: ", "", str(error))
    text = re.sub(r"\s*\[[\w ]+='.*?'\](?=\s*(\[|$))", "", text, flags=re.DOTALL)
    return text if len(text) <= 300 else text[:297] + "..."
