"""CSV with a header line. Every column is text, as written: nothing is guessed, an empty field is an empty text.

Quoted fields may hold line breaks, so rows are found by the csv reader, not by line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa

from rayskip.data.formats.base import MARK_ROWS, Format, Scan, columns_of, read_lines
from rayskip.errors import InputError


class _Rows:
    """Rows from a byte offset. offset: where the next row begins."""

    def __init__(self, url: str, offset: int) -> None:
        self.offset = offset
        self._rows = csv.reader(self._texts(read_lines(url, offset)), strict=False)

    def _texts(self, lines: Iterator[bytes]) -> Iterator[str]:
        for line in lines:
            self.offset += len(line)
            yield line.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[list[str]]:
        return (row for row in self._rows if row)


def scan(url: str) -> Scan:
    try:
        rows = _Rows(url, 0)
        header = [name.removeprefix("\ufeff") for name in next(iter(rows), [])]
        if not header or len(set(header)) != len(header):
            raise InputError(f"{url}: the first line must name every column once, got {header}")
        marks, count = [rows.offset], 0
        for count, _ in enumerate(rows, 1):
            if count % MARK_ROWS == 0:
                marks.append(rows.offset)
    except (csv.Error, OSError) as error:
        raise InputError(f"{url}: not a readable CSV file ({error})") from error
    return Scan(count, pa.schema([(name, pa.string()) for name in header]), tuple(marks))


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    header = [name.removeprefix("\ufeff") for name in next(iter(_Rows(url, 0)))]
    skip = start % MARK_ROWS
    fields = list(islice(iter(_Rows(url, marks[start // MARK_ROWS])), skip, skip + stop - start))
    reasons = [
        None if len(row) == len(header) else f"{len(row)} fields where the header names {len(header)}" for row in fields
    ]
    return columns_of([dict(zip(header, row, strict=False)) for row in fields], schema, reasons)


FORMAT = Format(scan, read)
