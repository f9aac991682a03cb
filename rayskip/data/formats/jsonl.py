"""JSON lines: one object per line, blank lines skipped.

One pass learns the schema of all rows, so that no shard infers another. A column whose values have no common
type, or whose objects have ever new keys or never any, is text: what is no text in it is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from rayskip.data.formats.base import NO_FIT, Format, Reading, Scan, table_of, unify
from rayskip.data.formats.text import MARK_ROWS, MAX_LINE, Line, LongLine, read_lines, without_bom
from rayskip.data.formats.types import keyless

MOST_FIELDS = 200
"""An object with more keys over all rows is taken for a mapping, not for a record."""

MAX_DEPTH = 64
"""Lists and objects in one another. Arrow's own limit, and JSON readers differ in theirs."""

Row = dict[str, Any]


Numbered = Callable[[int], Iterator[tuple[int, Line]]]
"""Rows' JSON texts with their byte offsets, from the offset of one."""


def scan(url: str, reading: Reading) -> Scan:
    return scan_rows(lines_of(url, reading))


def read(
    url: str, reading: Reading, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    return read_rows(lines_of(url, reading), marks, start, stop, schema)


def lines_of(url: str, reading: Reading) -> Numbered:
    return partial(_lines, url, reading.encoding)


def scan_rows(numbered: Numbered) -> Scan:
    """Rows, the schema of all of them, and marks."""
    schema = pa.schema([])
    rows, marks = 0, list[int]()
    block, size = list[Row](), 0
    for rows, (offset, line) in enumerate(numbered(0), 1):
        if rows % MARK_ROWS == 1:
            marks.append(offset)
        block.append(parse(line)[0])
        size += len(line)
        if len(block) == MARK_ROWS or size > MAX_LINE:
            schema = unify_loosely([schema, _infer(block)])
            block, size = [], 0
    return Scan(rows, unify_loosely([schema, _infer(block)]), tuple(marks))


def read_rows(
    numbered: Numbered, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    """Rows [start, stop) as a table."""
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    rows, reasons = [], list[str | None]()
    for line in rows_between(numbered, marks, start, stop):
        row, reason = parse(line)
        rows.append(row | {name: as_text(row[name]) for name in texts if name in row})
        reasons.append(reason)
    return table_of(rows, schema, reasons)


def rows_between(numbered: Numbered, marks: tuple[int, ...], start: int, stop: int) -> list[Line]:
    """JSON texts of rows [start, stop)."""
    skip = start % MARK_ROWS
    lines = (line for _, line in numbered(marks[start // MARK_ROWS]))
    return list(islice(lines, skip, skip + stop - start))


def parse(line: Line) -> tuple[Row, str | None]:
    """The line's object, and why it is broken if it is; what is no object gives an empty one."""
    if isinstance(line, LongLine):
        return {}, str(line)
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return {}, f"not valid UTF-8 at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        return {}, f"not valid JSON: {error}"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        return {}, f"nested more than {MAX_DEPTH} deep"
    return _encodable(value) if b"\\ud" in line.lower() else (value, None)


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in one another more than `most` deep."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for outer in level
            for item in (outer.values() if type(outer) is dict else outer)
            if type(item) in (dict, list)
        ]
    return bool(level)


def _encodable(row: Row) -> tuple[Row, str | None]:
    """The row; or, when an escape in it is half a surrogate pair, one with "?" in its place, and the fault."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return json.loads(text.encode(errors="replace")), f"text that is not valid Unicode: {error.reason}"
    return row, None


def as_text(value: Any) -> str | None:
    """A text or null as it is, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def unify_files(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The job's schema. Objects that never have a key are text, as Parquet cannot hold them."""
    found = unify_loosely(schemas)
    return pa.schema([(field.name, pa.string() if keyless(field.type) else field.type) for field in found])


def unify_loosely(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for all; a column without a common type is text."""
    columns: dict[str, list[pa.Schema]] = {}
    for schema in schemas:
        for field in schema:
            columns.setdefault(field.name, []).append(pa.schema([field]))
    return pa.schema([(name, _common(found)) for name, found in columns.items()])


def _common(found: Sequence[pa.Schema]) -> pa.DataType:
    try:
        kind: pa.DataType = unify(found).field(0).type
    except NO_FIT:
        return pa.string()
    return kind if _fields(kind) <= MOST_FIELDS else pa.string()


def _fields(kind: pa.DataType) -> int:
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return len(children) + sum(map(_fields, children))


def _infer(rows: Sequence[Row]) -> pa.Schema:
    """Columns of rows, in order of first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, _kind([row.get(name) for row in rows])) for name in names])


def _kind(values: Sequence[Any]) -> pa.DataType:
    try:
        kind = pa.infer_type(values)
        pa.array(values, kind)  # inference does not look at the size of numbers
    except NO_FIT:
        return pa.string()
    return kind


def _lines(url: str, encoding: str | None, offset: int) -> Iterator[tuple[int, Line]]:
    """Lines that are not blank, with their byte offsets."""
    for line in read_lines(url, encoding, offset):
        if isinstance(line, LongLine):
            yield offset, line
        elif not line.isspace():
            yield offset, without_bom(line) if offset == 0 else line
        offset += len(line)


FORMAT = Format(scan, read, unify_files, text=True)
