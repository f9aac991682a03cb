"""JSON lines. One pass learns the schema of all rows, so that no shard infers another; ranges are found again by
byte offset. A column whose values have no common type becomes JSON text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from rayskip.data.formats.base import MARK_ROWS, Format, Scan, columns_of, read_lines
from rayskip.errors import InputError

_NO_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def scan(url: str) -> Scan:
    types: dict[str, pa.DataType] = {}
    marks: list[int] = []
    rows = offset = 0
    lines = read_lines(url)
    try:
        while block := list(islice(lines, MARK_ROWS)):
            marks.append(offset)
            offset += sum(map(len, block))
            rows += len(block)
            learn(types, [row for row in map(_parse, block) if isinstance(row, dict)])
    except OSError as error:
        raise InputError(f"{url}: cannot be read ({error})") from error
    return Scan(rows, pa.schema(types.items()), tuple(marks))


def learn(types: dict[str, pa.DataType], rows: Sequence[dict[str, Any]]) -> None:
    """Widen `types` so that every value of `rows` fits its column."""
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            found = pa.infer_type([row.get(name) for row in rows])
            known = pa.schema([(name, types.get(name, pa.null()))])
            merged = pa.unify_schemas([known, pa.schema([(name, found)])], promote_options="permissive")
            types[name] = merged.field(0).type
        except _NO_TYPE:
            types[name] = pa.string()


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    return parsed(read_range(url, marks, start, stop), schema)


def read_range(url: str, marks: tuple[int, ...], start: int, stop: int) -> list[bytes]:
    """Lines [start, stop)."""
    skip = start % MARK_ROWS
    return list(islice(read_lines(url, marks[start // MARK_ROWS]), skip, skip + stop - start))


def parsed(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """Lines as rows; a line that is no JSON object is a broken row."""
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    rows, reasons = [], []
    for line in lines:
        row = _parse(line)
        reasons.append(None if isinstance(row, dict) else row)
        rows.append(_as_text(row, texts) if isinstance(row, dict) else None)
    return columns_of(rows, schema, reasons)


def _parse(line: bytes) -> dict[str, Any] | str:
    """The line's object, or why there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _as_text(row: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    return row | {
        name: json.dumps(row[name], ensure_ascii=False)
        for name in texts
        if row.get(name) is not None and not isinstance(row[name], str)
    }


FORMAT = Format(scan, read)
