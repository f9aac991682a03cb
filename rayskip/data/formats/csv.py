"""CSV with a header line. Every column is text as written: nothing is guessed, an empty field is "".

Quoted fields may hold line breaks, so rows are found by the csv reader, not by line. Blank lines are skipped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa

from rayskip.data.formats.base import (
    MARK_ROWS,
    MAX_LINE,
    Format,
    Line,
    LongLine,
    Scan,
    read_lines,
    table_of,
    without_bom,
)
from rayskip.errors import InputError, first_line

# The module's own limit, 128 KiB, is less than a long prompt. Process-wide, but only ever raised.
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))


class _Rows:
    """Rows from a byte offset. offset, line: where the row after the last one given begins, counted from there."""

    def __init__(self, url: str, offset: int) -> None:
        self.offset = offset
        self.line = 1
        # Strict: else a quote that nobody closed takes the rows below it into its field.
        self._reader = csv.reader(self._texts(read_lines(url, offset)), strict=True)

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._reader:
            self.line = self._reader.line_num + 1
            if row:
                yield row

    def _texts(self, lines: Iterator[Line]) -> Iterator[str]:
        """Bytes that are not UTF-8 become surrogates, which no Arrow column takes: the row will be broken.

        Raises csv.Error for a line that is too long: it may hold part of a field, so no row is to blame.
        """
        for line in lines:
            if isinstance(line, LongLine):
                raise csv.Error(str(line))
            text = without_bom(line) if self.offset == 0 else line
            self.offset += len(line)
            yield text.decode("utf-8", "surrogateescape")


def scan(url: str) -> Scan:
    rows = _Rows(url, 0)
    count = 0
    try:
        header = next(iter(rows), [])
        marks = [rows.offset]
        for count, _ in enumerate(rows, 1):
            if count % MARK_ROWS == 0:
                marks.append(rows.offset)
    except csv.Error as error:
        where = f"the row that begins in line {rows.line} cannot be read"
        raise InputError(
            f"{url}: {where}, a quote may be missing or too many ({first_line(error)})"
        ) from error
    if not header or len(set(header)) != len(header):
        raise InputError(f"{url}: the first line must name every column once, got {header}")
    try:
        schema = pa.schema([(name, pa.string()) for name in header])
    except UnicodeEncodeError as error:
        raise InputError(f"{url}: the first line, the columns' names, is not valid UTF-8") from error
    return Scan(count, schema, tuple(marks))


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    header = next(iter(_Rows(url, 0)))
    skip = start % MARK_ROWS
    rows = list(islice(_Rows(url, marks[start // MARK_ROWS]), skip, skip + stop - start))
    reasons = [_fault(row, header) for row in rows]
    return table_of([dict(zip(header, row, strict=False)) for row in rows], schema, reasons)


def _fault(row: list[str], header: list[str]) -> str | None:
    if len(row) == len(header):
        return None
    return f"{len(row)} fields where the header names {len(header)}"


FORMAT = Format(scan, read)
