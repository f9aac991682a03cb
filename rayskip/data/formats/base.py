"""What every input format answers, and what the text formats share: lines found again by byte offset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rayskip.data.locate import filesystem
from rayskip.data.records import BROKEN_ROW

MARK_ROWS = 1000
"""Rows between two remembered byte offsets: planning a text file keeps 8 bytes per so many rows."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found. marks: byte offset of every MARK_ROWS-th row (text formats)."""

    rows: int
    schema: pa.Schema
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Format:
    """scan(url): raises InputError for a file that cannot be read as a whole.

    read(url, scan marks, start, stop, schema): rows [start, stop) under the job's schema, with the column
    BROKEN_ROW saying why a row could not be read.
    """

    scan: Callable[[str], Scan]
    read: Callable[[str, tuple[int, ...], int, int, pa.Schema], pa.Table]


def open_file(url: str) -> pa.NativeFile:
    """A file for random access; memory-mapped when it is local."""
    store, path = filesystem(url)
    return pa.memory_map(path) if isinstance(store, fs.LocalFileSystem) else store.open_input_file(path)


def with_broken(table: pa.Table, reasons: Sequence[str | None]) -> pa.Table:
    """Add the BROKEN_ROW column."""
    return table.append_column(BROKEN_ROW, pa.array(reasons, pa.string()))


def read_lines(url: str, offset: int = 0) -> Iterator[bytes]:
    """Lines with their line ends, from a byte offset that begins one."""
    store, path = filesystem(url)
    with store.open_input_file(path) as source:
        source.seek(offset)
        rest = b""
        while block := source.read(1 << 22):
            lines = (rest + block).splitlines(keepends=True) if b"\r" not in block else _split(rest + block)
            rest = lines.pop() if not lines[-1].endswith(b"\n") else b""
            yield from lines
        if rest:
            yield rest


def _split(data: bytes) -> list[bytes]:
    """Split after newlines alone: a lone carriage return may stand inside a value."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return lines + [parts[-1]] if parts[-1] else lines


def columns_of(rows: Sequence[dict[str, Any] | None], schema: pa.Schema, reasons: list[str | None]) -> pa.Table:
    """Rows as a table of `schema`; a row with a value that does not fit becomes broken (`reasons` is filled in)."""
    columns = []
    for field in schema:
        values = [row.get(field.name) if row is not None else None for row in rows]
        try:
            columns.append(pa.array(values, field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            columns.append(pa.array(_fitting(field, values, reasons), field.type))
    return with_broken(pa.Table.from_arrays(columns, schema=schema), reasons)


def _fitting(field: pa.Field, values: Iterable[Any], reasons: list[str | None]) -> list[Any]:
    kept = []
    for index, value in enumerate(values):
        try:
            pa.array([value], field.type)
            kept.append(value)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            reasons[index] = reasons[index] or f"column {field.name!r}: {error}"
            kept.append(None)
    return kept
