"""Arrow values as Python objects: of the columns that a prompt needs, or of all where rows are written as text.

Python's dates end in the year 9999, and a time zone may be one that this machine does not know. Arrow holds both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from rayskip.data.records import BROKEN_ROW

Row = dict[str, Any]

_NOT_IN_PYTHON = (ValueError, OverflowError, KeyError)
"""What pyarrow raises for a value that Python has no object for."""

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def python_rows(table: pa.Table, columns: Collection[str]) -> Iterator[Row]:
    """The table's rows, with those of `columns` that are there, and BROKEN_ROW. A value that Python cannot hold is
    null, and its BROKEN_ROW says so."""
    names = [name for name in table.column_names if name in columns]
    reasons = table[BROKEN_ROW].to_pylist()
    values = [_python(name, table[name], reasons) for name in names]
    for index, reason in enumerate(reasons):
        yield {name: column[index] for name, column in zip(names, values, strict=True)} | {BROKEN_ROW: reason}


def whole_rows(table: pa.Table) -> list[Row]:
    """The table's rows, with a text for what Python cannot hold."""
    try:
        rows: list[Row] = table.to_pylist()
        return rows
    except _NOT_IN_PYTHON:
        columns = [[_held(scalar) for scalar in column] for column in table.columns]
        return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def text_of(value: Any) -> str:
    """A value as text; a null, such as CSV's empty field, is an empty one."""
    return "" if value is None else str(value)


def _python(name: str, column: pa.ChunkedArray, reasons: list[str | None]) -> list[Any]:
    try:
        found: list[Any] = column.to_pylist()
        return found
    except _NOT_IN_PYTHON:
        pass
    values = []
    for index, scalar in enumerate(column):
        try:
            values.append(scalar.as_py())
        except _NOT_IN_PYTHON as error:
            values.append(None)
            reasons[index] = (
                reasons[index] or f"column {name!r}: a {column.type} that cannot be read: {error}"
            )
    return values


def _held(scalar: pa.Scalar) -> Any:
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(kind):
        return {field.name: _held(scalar[field.name]) for field in kind}
    if pa.types.is_map(kind):
        return [(_held(entry["key"]), _held(entry["value"])) for entry in _entries(scalar)]
    if pa.types.is_nested(kind):
        return [_held(item) for item in scalar.values]
    try:
        return scalar.as_py()
    except _NOT_IN_PYTHON:
        return _text(scalar)


def _entries(scalar: pa.MapScalar) -> pa.StructArray:
    keys, items = scalar.values.flatten()
    return pa.StructArray.from_arrays([keys, items], ["key", "value"])


def _text(scalar: pa.Scalar) -> str | float:
    """A point in time as ISO 8601 has it, in UTC where it has a zone; a duration in seconds."""
    kind, number = scalar.type, scalar.value
    if pa.types.is_duration(kind):
        return float(number / _PER_SECOND[kind.unit])
    zoned = pa.types.is_timestamp(kind) and kind.tz is not None
    naive = pa.scalar(number, pa.timestamp(kind.unit)) if zoned else scalar
    text: str = naive.cast(pa.string()).as_py()
    if text.startswith("<"):  # a year that Arrow's calendar has not
        return f"{number} {kind.unit if pa.types.is_timestamp(kind) else 'days'} since 1970"
    whole, _, fraction = text.replace(" ", "T").partition(".")
    return whole + (f".{fraction}" if fraction.strip("0") else "") + ("Z" if zoned else "")
