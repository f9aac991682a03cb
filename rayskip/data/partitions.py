"""Columns that the names of folders hold, as in lang=de/part.parquet: Hive's way to partition a dataset.

Pure: looks at names only. Does not know formats or file systems.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

_PART = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def values_of(name: str) -> dict[str, str | None]:
    """A file's columns by its name, which is its path below the input's root."""
    parts = (_PART.fullmatch(part) for part in PurePosixPath(name).parts[:-1])
    return {unquote(part[1]): None if part[2] == _NULL else unquote(part[2]) for part in parts if part}


def schema_of(names: Iterable[str]) -> pa.Schema:
    """The columns that the files' names hold: integers where all values are, else text."""
    found: dict[str, list[str]] = {}
    for name in names:
        for column, value in values_of(name).items():
            found.setdefault(column, []).extend([value] if value is not None else [])
    return pa.schema([(column, _kind(values)) for column, values in found.items()])


def with_columns(table: pa.Table, name: str, schema: pa.Schema) -> pa.Table:
    """A file's table with the columns of `schema` that its name holds; null where it holds no such column."""
    values = values_of(name)
    for field in schema:
        value = pa.scalar(values.get(field.name), pa.string()).cast(field.type)
        table = table.append_column(field, pa.repeat(value, table.num_rows))
    return table


def _kind(values: Iterable[str]) -> pa.DataType:
    return pa.int64() if all(map(_INTEGER.fullmatch, values)) else pa.string()
