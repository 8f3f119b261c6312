"""Reading a user's file: what is wrong with it is told by file and line."""

import codecs
import difflib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from models.errors import InputError


class DataError(InputError):
    """Something is wrong with a file of pairs or prompts; the message names the file and line."""


def existing_file(path: str | os.PathLike) -> pathlib.Path:
    """The path, of a file that is there; `DataError` if it is not."""
    path = pathlib.Path(os.path.expanduser(path))
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    return path


# Longer marks first: that of UTF-32 begins as that of UTF-16 does.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
NOT_UTF8 = (
    "not UTF-8 text{place}: save the file as UTF-8, or convert it, as by iconv -f ENCODING "
    "-t UTF-8 (what older programs wrote is often in WINDOWS-1252)"
)


def utf8_bytes(path: pathlib.Path) -> bytes:
    """What a file of text holds, in UTF-8 without a byte-order mark.

    A file that begins with the byte-order mark of UTF-16 or UTF-32 is converted. Whether others
    are UTF-8 is not checked.

    Raises:
        DataError: the file cannot be read, is not in the encoding that its byte-order mark names,
            or is UTF-16 without one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            try:
                return content.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: begins with the byte-order mark of {encoding}, but is no {encoding} "
                    f"text (byte {error.start}); save it as UTF-8"
                ) from None
    if 0 in content[:2]:
        raise DataError(
            f"{path}: looks like UTF-16 without a byte-order mark (byte {content.index(0)} is 0); "
            "save it as UTF-8, or convert it, as by iconv -f UTF-16LE -t UTF-8"
        )
    return content.removeprefix(codecs.BOM_UTF8)


@runtime_checkable
class HasId(Protocol):
    """What `collect` makes."""

    @property
    def id(self) -> str:
        """Its name, unique in its file."""
        ...


Made = TypeVar("Made", bound=HasId)


def collect(
    path: pathlib.Path,
    rows: Iterable[tuple[int, dict | DataError]],
    make: Callable[[dict, int, str], Made],
    *,
    what: str,
    known: Iterable[tuple[str, ...]] = (),
    on_bad: Callable[[DataError], None] | None,
    say: Callable[[str], None] | None = None,
) -> list[Made]:
    """Makes an object with an `id` of every row of a file.

    Args:
        path: the file.
        rows: the line that each row begins at, and its fields, or why they cannot be read. A field
            that is None is as good as absent.
        make: called with the fields, the row's place in the file, from 1, and "file:line"; makes
            the object or raises.
        what: name of what is made, for messages.
        known: the names of fields that `make` reads, those together of which a row has one.
        on_bad: told of a bad row, which is then left out; by default a bad row is an error.
        say: told of fields that are not read, and whose names are like those of others that are.

    Raises:
        DataError: a bad row, an id that was used before, or nothing is left.
    """
    made: list[Made] = []
    used: dict[str, str] = {}
    unread: dict[tuple[str, str], list[str]] = {}
    known = tuple(known)
    for place, (number, fields) in enumerate(rows, start=1):
        where = f"{path}:{number}"
        try:
            if isinstance(fields, DataError):
                raise fields
            fields = {name: value for name, value in fields.items() if value is not None}
            misspelt = _misspelt(tuple(fields), known)
            for both in misspelt.items():
                unread.setdefault(both, []).append(where)
            try:
                one = make(fields, place, where)
            except DataError as error:
                if not misspelt:
                    raise
                asked = ", ".join(map(_did_you_mean, misspelt.items()))
                raise DataError(f"{error}; {asked}") from None
            if one.id in used:
                raise DataError(f"{where}: id '{one.id}' was used before, by {used[one.id]}")
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        used[one.id] = where
        made.append(one)
    if not made:
        raise DataError(f"{path}: holds no {what}")
    if say is not None:
        for both, places in unread.items():
            say(f"{places[0]}: {_did_you_mean(both)} (in {len(places)} of its lines)")
    return made


@functools.lru_cache(maxsize=256)  # the rows of a file have mostly the same
def _misspelt(names: tuple[str, ...], known: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """Of names that are not known, those that are like a known one in whose place nothing is
    given, and that one."""
    read = {name for together in known for name in together}
    free = [name for together in known if not set(together) & set(names) for name in together]
    found = {}
    for name in names:
        if isinstance(name, str) and name not in read and len(name) > 3:
            for meant in difflib.get_close_matches(name.lower(), free, n=1, cutoff=0.8):
                found[name] = meant
    return found


def _did_you_mean(both: tuple[str, str]) -> str:
    name, meant = both
    return f"its field '{name}' is not read: did you mean '{meant}'?"


def json_lines(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The number and the fields of each line of a JSONL file; blank lines are passed over."""
    for number, line in enumerate(utf8_bytes(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield number, json_object(parse_json(line, where), where)
            except DataError as error:
                yield number, error


def object_in(path: pathlib.Path, kind: type[InputError] = DataError, way_out: str = "") -> dict:
    """The JSON object that a file holds.

    Args:
        path: the file.
        kind: what is raised.
        way_out: the end of the message.

    Raises:
        InputError: of that kind; the file cannot be read, or holds something else.
    """
    try:
        return json_object(parse_json(utf8_bytes(path), str(path)), str(path))
    except DataError as error:
        raise kind(f"{error}{way_out}") from None


def parse_json(encoded: bytes, where: str) -> Any:
    """The value of UTF-8 JSON; `DataError`, beginning with `where`, if it is not."""
    try:
        return json.loads(encoded.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from None
    except UnicodeDecodeError as error:
        place = f" (byte {error.start})"
        raise DataError(f"{where}: {NOT_UTF8.format(place=place)}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise DataError(f"{where}: not to be read as JSON ({error})") from None


def json_object(value: Any, where: str) -> dict:
    """The fields of a JSON object; `DataError` if it is none, or has text that is no text."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: has half of a surrogate pair, which is no character") from None
    return value
