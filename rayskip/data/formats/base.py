"""What every input format answers, and what they share: plain schemas, broken rows, lines found by offset.

Does not know which files a job reads, or how its rows become prompts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayskip.data.locate import filesystem
from rayskip.data.records import BROKEN_ROW
from rayskip.errors import InputError

MARK_ROWS = 1000
"""Rows between two remembered byte offsets of a text file: planning keeps a number per so many rows."""

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"

NO_FIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
"""What Arrow raises for a value that is not of a column's type, or text that UTF-8 cannot hold."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found. marks: whatever helps the format to find a range of rows again."""

    rows: int
    schema: pa.Schema
    marks: tuple[int, ...] = ()


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema that holds every file's columns. Raises ArrowInvalid or ArrowTypeError if none does."""
    return pa.unify_schemas(list(schemas), promote_options="permissive")


@dataclass(frozen=True)
class Format:
    """scan(url): raises InputError for a file that cannot be read as a whole.

    read(url, marks, start, stop, schema): rows [start, stop) under the job's schema, with the column
    BROKEN_ROW saying why a row could not be read. Raises OSError or ArrowException when the file changed.
    unify(schemas): the job's schema from its files'.
    """

    scan: Callable[[str], Scan]
    read: Callable[[str, tuple[int, ...], int, int, pa.Schema], pa.Table]
    unify: Callable[[Sequence[pa.Schema]], pa.Schema] = unify


def plain_schema(schema: pa.Schema, url: str) -> pa.Schema:
    """The schema without metadata, extension types and dictionaries: what any process can read and unify."""
    twice = {name for name in schema.names if schema.names.count(name) > 1}
    if twice:
        raise InputError(f"{url}: has several columns named {', '.join(sorted(twice))}")
    plain = pa.schema([(field.name, _plain_type(field.type)) for field in schema])
    empty = [field.name for field in plain if keyless(field.type)]
    if empty:
        raise InputError(
            f"{url}: the objects in column {empty[0]} have no keys, which Parquet cannot hold; drop it"
        )
    return plain


def keyless(kind: pa.DataType) -> bool:
    """Whether a type holds, somewhere, objects that never have a key. Parquet has no such type."""
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return any(map(keyless, children)) if children else bool(pa.types.is_struct(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def refuse_ray_types(metadata: bytes, url: str) -> None:
    """Ray's extension types carry pickled code: look at the raw schema, before anything interprets it."""
    if b"ray.data." in metadata:
        raise InputError(
            f"{url}: has Ray extension types (ray.data.*), which are not read; save plain columns"
        )


def rows_between(batches: Iterable[pa.RecordBatch], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Rows [start, stop) of consecutive batches, holding no others. schema: the batches' own."""
    kept, before = [], 0
    for batch in batches:
        low, high = max(start, before), min(stop, before + batch.num_rows)
        if low < high:
            kept.append(batch.slice(low - before, high - low))
        before += batch.num_rows
        if before >= stop:
            break
    return pa.Table.from_batches(kept, schema)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table under the job's schema. Rows whose text is not UTF-8 are marked broken, the text repaired."""
    reasons: list[str | None] = [None] * table.num_rows
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        column = column.cast(_plain_type(column.type))
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):  # the file is corrupt, and its values not safe to touch
                raise
            column = _repaired(field.name, column, reasons)
        columns.append(column.cast(field.type))
    return with_broken(columns, schema, reasons)


def _repaired(name: str, column: pa.ChunkedArray, reasons: list[str | None]) -> pa.Array:
    """A text with bad bytes gets U+FFFD in their place; a nested value that holds one becomes null."""
    values = []
    for index, scalar in enumerate(column):
        try:
            values.append(scalar.as_py())
        except UnicodeDecodeError as error:
            reasons[index] = f"column {name!r} is not valid UTF-8"
            nested = pa.types.is_nested(column.type)
            values.append(None if nested else error.object.decode("utf-8", "replace"))
    return pa.array(values, column.type)


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema, reasons: list[str | None]) -> pa.Table:
    """Rows as a table of `schema`; a row with a value that does not fit is marked broken in `reasons`."""
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        try:
            columns.append(pa.array(values, field.type))
        except NO_FIT:
            columns.append(pa.array(_fitting(field, values, reasons), field.type))
    return with_broken(columns, schema, reasons)


def _fitting(field: pa.Field, values: Sequence[Any], reasons: list[str | None]) -> list[Any]:
    kept = []
    for index, value in enumerate(values):
        try:
            pa.array([value], field.type)
            kept.append(value)
        except NO_FIT as error:
            reasons[index] = reasons[index] or f"column {field.name!r}: {error}"
            kept.append(None)
    return kept


def with_broken(columns: Sequence[pa.Array], schema: pa.Schema, reasons: Sequence[str | None]) -> pa.Table:
    """A table of `schema` and the column BROKEN_ROW."""
    broken = pa.field(BROKEN_ROW, pa.string())
    return pa.Table.from_arrays([*columns, pa.array(reasons, pa.string())], schema=schema.append(broken))


def read_lines(url: str, offset: int = 0) -> Iterator[bytes]:
    """Lines with their line ends, from a byte offset that begins one. Only a newline ends a line."""
    store, path = filesystem(url)
    with io.BufferedReader(store.open_input_file(path), _BUFFER) as source:
        source.seek(offset)
        yield from source


def without_bom(line: bytes) -> bytes:
    """The first line of a file without the mark that some editors put there."""
    return line.removeprefix(_BOM)
