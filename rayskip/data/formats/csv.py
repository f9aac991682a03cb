"""CSV with a header line, as pandas reads it: a column has the type of all its values, an empty field is null.

Types are pyarrow.csv's, found over the whole file, so that every shard reads the same. What only looks like a
number, since it has leading zeros or more digits than a number holds, stays text.

Quoted fields may hold line breaks, so rows are found by the csv reader, not by line. Blank lines are skipped.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

import pyarrow as pa
import pyarrow.csv as pa_csv

from rayskip.data.formats.base import Format, Reading, Scan, column_of, with_broken
from rayskip.data.formats.jsonl import unify_loosely
from rayskip.data.formats.text import (
    MARK_ROWS,
    MAX_LINE,
    LongLine,
    encoding_of,
    inner_suffix,
    read_lines,
    without_bom,
)
from rayskip.data.formats.types import plain_type
from rayskip.errors import InputError, first_line

# The module's own limit, 128 KiB, is less than a long prompt. Process-wide, but only ever raised.
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))

_DELIMITERS = (",", ";", "\t", "|")
_SNIFFED_ROWS = 100

_KINDS = (
    pa.int64(),
    pa.bool_(),
    pa.float64(),
    pa.date32(),
    pa.time32("s"),
    *(pa.timestamp(unit, zone) for unit in ("s", "us", "ns") for zone in (None, "UTC")),
)
"""Types that a column may have, the first that fits; else it is text."""

_NULLS = frozenset(pa_csv.ConvertOptions().null_values)
"""How a null is written where a column is no text; in text only an empty field is one."""

_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9xX]")
_MANY_DIGITS = re.compile(r"\s*[-+]?[0-9]{16,}\s*")


class _Rows:
    """Rows from a byte offset. offset, line: where the row after the last one given begins, counted from there."""

    def __init__(self, url: str, reading: Reading, delimiter: str, offset: int = 0) -> None:
        self.offset = offset
        self.line = 1
        self._url = url
        self._reading = reading
        # Strict: else a quote that nobody closed takes the rows below it into its field.
        self._reader = csv.reader(self._texts(), strict=True, delimiter=delimiter)

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._reader:
            self.line = self._reader.line_num + 1
            if row:
                yield row

    def _texts(self) -> Iterator[str]:
        """Bytes that are not UTF-8, in a file that the job says is, become surrogates, which no Arrow column takes:
        the row will be broken. Raises InputError in any other file.

        Raises csv.Error for a line that is too long: it may hold part of a field, so no row is to blame.
        """
        encoding = _encoding(self._reading)
        for line in read_lines(self._url, encoding, self.offset):
            if isinstance(line, LongLine):
                raise csv.Error(str(line))
            text = without_bom(line) if self.offset == 0 else line
            self.offset += len(line)
            try:
                yield text.decode("utf-8", "strict" if encoding is None else "surrogateescape")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self._url}: line {self._reader.line_num + 1} is not UTF-8; name the encoding, such as "
                    "input.encoding: latin-1 (with utf-8 such rows come out as errors)"
                ) from error


def scan(url: str, reading: Reading) -> Scan:
    delimiter = _delimiter(url, reading)
    rows = _Rows(url, reading, delimiter)
    count, block, size = 0, list[list[str]](), 0
    try:
        header = next(iter(rows), [])
        _check_header(url, header)
        columns = [_Column(_guessed(name, reading)) for name in header]
        marks = [rows.offset]
        for count, row in enumerate(rows, 1):
            if count % MARK_ROWS == 0:
                marks.append(rows.offset)
            block.append(row)
            size += sum(map(len, row))
            if len(block) == MARK_ROWS or size > MAX_LINE:
                _look(columns, block)
                block, size = [], 0
    except csv.Error as error:
        where = f"the row that begins in line {rows.line} cannot be read"
        raise InputError(
            f"{url}: {where}, a quote may be missing or too many ({first_line(error)})"
        ) from error
    _look(columns, block)
    schema = pa.schema([(name, column.kind) for name, column in zip(header, columns, strict=True)])
    return Scan(count, schema, tuple(marks), _notes(url, reading, delimiter))


def read(
    url: str, reading: Reading, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    delimiter = _delimiter(url, reading)
    header = next(iter(_Rows(url, reading, delimiter)))
    skip = start % MARK_ROWS
    found = _Rows(url, reading, delimiter, marks[start // MARK_ROWS])
    rows = list(islice(found, skip, skip + stop - start))
    reasons = [_fault(row, header) for row in rows]
    fields = {name: _values(rows, place) for place, name in enumerate(header)}
    columns = [_column(field, fields.get(field.name), reasons, reading) for field in schema]
    return with_broken(columns, schema, reasons)


class _Column:
    """What the type of a column can be, by the values so far."""

    def __init__(self, guessed: bool) -> None:
        self._kinds = list(_KINDS) if guessed else []
        self._guessed = guessed
        self._empty = True
        self._null = True

    def look(self, values: Sequence[str]) -> None:
        self._empty = self._empty and not any(values)
        self._null = self._null and _NULLS.issuperset(values)
        self._kinds = [kind for kind in self._kinds if _fits(values, kind)]

    @property
    def kind(self) -> pa.DataType:
        if self._guessed and self._empty:
            return pa.null()
        return pa.string() if self._null or not self._kinds else plain_type(self._kinds[0])


def _look(columns: Sequence[_Column], rows: Sequence[list[str]]) -> None:
    whole = [row for row in rows if len(row) == len(columns)]  # the others will be broken
    for place, column in enumerate(columns):
        column.look(_values(whole, place))


def _guessed(name: str, reading: Reading) -> bool:
    return reading.text_columns is not None and name not in reading.text_columns


def _values(rows: Sequence[list[str]], place: int) -> list[str]:
    return [row[place] if place < len(row) else "" for row in rows]


def _fits(values: Sequence[str], kind: pa.DataType) -> bool:
    """Whether all values that are UTF-8 are of a type, and would not lose by it."""
    try:
        _converted(values, kind)
    except UnicodeEncodeError:
        return _fits(list(filter(_encodable, values)), kind)
    except pa.ArrowInvalid:
        return False
    if pa.types.is_floating(kind) and any(map(_MANY_DIGITS.fullmatch, values)):
        return False
    return pa.types.is_temporal(kind) or not any(map(_LEADING_ZERO.match, values))


def _converted(values: Sequence[str], kind: pa.DataType) -> pa.Array:
    """Values as pyarrow.csv reads them. Raises ArrowInvalid where one is not of the type, UnicodeEncodeError."""
    if not values:
        return pa.array([], kind)
    text = "".join('"{}"\n'.format(value.replace('"', '""')) for value in values).encode()
    table = pa_csv.read_csv(
        pa.BufferReader(text),
        pa_csv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=["c"]),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(column_types={"c": kind}),
    )
    return table["c"].combine_chunks()


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _column(
    field: pa.Field, values: Sequence[str] | None, reasons: list[str | None], reading: Reading
) -> pa.Array:
    """A column of the job's schema. values: what the file has there, None where it lacks the column."""
    if values is None or pa.types.is_null(field.type):
        return pa.nulls(len(reasons), field.type)
    if pa.types.is_string(field.type):
        as_written = reading.text_columns is None
        return column_of(field, values if as_written else [value or None for value in values], reasons)
    for row, value in enumerate(values):
        if not _encodable(value):
            reasons[row] = reasons[row] or f"column {field.name!r} is not valid UTF-8"
    kept = [value if reason is None else "" for value, reason in zip(values, reasons, strict=True)]
    return _converted(kept, field.type)


def _fault(row: list[str], header: list[str]) -> str | None:
    if len(row) == len(header):
        return None
    return f"{len(row)} fields where the header names {len(header)}"


def _check_header(url: str, header: list[str]) -> None:
    if not header or len(set(header)) != len(header):
        raise InputError(f"{url}: the first line must name every column once, got {header}")
    if not all(map(_encodable, header)):
        raise InputError(f"{url}: the first line, the columns' names, is not valid UTF-8")


def _encoding(reading: Reading) -> str | None:
    """What a file is said to be; None: what it begins with tells, and every line must be it."""
    return reading.encoding or ("utf-8" if reading.text_columns is None else None)


def _delimiter(url: str, reading: Reading) -> str:
    if reading.delimiter is not None or reading.text_columns is None:
        return reading.delimiter or ","
    if inner_suffix(url) == ".tsv":
        return "\t"
    return max(_DELIMITERS, key=lambda delimiter: _agreement(url, reading, delimiter))


def _agreement(url: str, reading: Reading, delimiter: str) -> tuple[int, int]:
    """(rows that have as many fields as the header, fields) among a file's first rows, if this is the delimiter;
    zeros where the header has one field."""
    rows = list[list[str]]()
    with suppress(csv.Error):  # what came before it counts
        rows.extend(islice(_Rows(url, reading, delimiter), _SNIFFED_ROWS))
    fields = len(rows[0]) if rows else 0
    return (sum(len(row) == fields for row in rows), fields) if fields > 1 else (0, 0)


def _notes(url: str, reading: Reading, delimiter: str) -> tuple[str, ...]:
    """How the file is read, where that is not CSV's usual way."""
    names = {"\t": "tabs", ",": ""}
    fields = names.get(delimiter, repr(delimiter))
    encoding = encoding_of(url, _encoding(reading))
    return (*([f"fields between {fields}"] if fields else []), *([f"text in {encoding}"] if encoding else []))


FORMAT = Format(scan, read, unify_loosely, text=True)  # text where files differ, as it is written in each
