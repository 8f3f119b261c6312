"""Rows of CSV, JSON, JSONL and parquet files, each with the line that it begins at."""

import contextlib
import csv
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed.files import reading
from jaxmed.files.reading import DataError


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a CSV file by its header; an empty cell is None."""
    # Bytes that are no UTF-8 become half surrogates, which condemn their row and no other.
    decoded = reading.utf8_bytes(path).decode(errors="surrogateescape")
    lines = csv.reader(io.StringIO(decoded, newline=""), strict=True)
    header = None
    while True:
        number = lines.line_num + 1
        try:
            with _cells_of_at_most(len(decoded)):
                cells = next(lines, None)
            if cells is None:
                return
            if header is not None and cells:
                yield number, _csv_row(header, cells, f"{path}:{number}")
            elif cells:
                header = _csv_header(cells, f"{path}:{number}")
        except csv.Error as error:
            problem = DataError(f"{path}:{number}: not CSV ({error})")
            if header is None:
                raise problem from None
            yield number, problem


@contextlib.contextmanager
def _cells_of_at_most(characters: int) -> Iterator[None]:
    """Sets the length that Python's csv lets a cell have, which is one number for all readers."""
    before = csv.field_size_limit(characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(set(header)) != len(header):
        raise DataError(f"{where}: the header names a column twice")
    return header


def _csv_row(header: list[str], cells: list[str], where: str) -> dict | DataError:
    if len(cells) != len(header):
        return DataError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return DataError(f"{where}: {reading.NOT_UTF8.format(place='')}")
    row: dict[str, Any] = {}
    try:
        for name, cell in zip(header, cells, strict=True):
            is_json = name.endswith("_ids") and cell
            row[name] = reading.parse_json(cell.encode(), where) if is_json else cell or None
    except DataError as error:
        return error
    return row


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The objects of a JSON list, by the lines that they begin at."""
    encoded = reading.utf8_bytes(path)
    if not isinstance(reading.parse_json(encoded, f"{path}"), list):
        raise DataError(f"{path}: expected a list of JSON objects (one a line is .jsonl)")
    content = encoded.decode()
    decoder = json.JSONDecoder()
    line, seen, place = 1, 0, _next_value(content, content.index("[") + 1)
    while content[place] != "]":
        line, seen = line + content.count("\n", seen, place), place
        value, end = decoder.raw_decode(content, place)
        place = _next_value(content, end)
        try:
            yield line, reading.json_object(value, f"{path}:{line}")
        except DataError as error:
            yield line, error


_VALUE_OR_END = re.compile(r"[^\s,]")


def _next_value(content: str, place: int) -> int:
    """Where the next value of a JSON list begins, or the list ends."""
    found = _VALUE_OR_END.search(content, place)
    assert found is not None, "the content was read as a list before"
    return found.start()


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a parquet file, counted from 1."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file, or damaged ({error})") from None
    columns = {name: table[name] for name in table.column_names}
    for index in range(table.num_rows):
        try:
            yield index + 1, {name: column[index].as_py() for name, column in columns.items()}
        except UnicodeDecodeError:
            yield index + 1, DataError(f"{path}:{index + 1}: not UTF-8 text")


# By the end of a file's name: a function of its path that yields the line that each row begins at,
# and the row's fields, or why they cannot be read.
READERS: dict[str, Callable[[pathlib.Path], Iterator[tuple[int, dict | DataError]]]] = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": reading.json_lines,
    ".parquet": _parquet_rows,
}
