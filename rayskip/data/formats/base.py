"""What every input format answers, and what they share: broken rows, values that do not fit.

Does not know which files a job reads, or how its rows become prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayskip.data.formats.types import plain_column, with_bytes
from rayskip.data.records import BROKEN_ROW
from rayskip.errors import first_line

BUFFER = 1 << 20
"""Bytes that are read at once of what is read in small pieces."""

NO_FIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
"""What Arrow raises for a value that is not of a column's type, or text that UTF-8 cannot hold."""


UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeError, OverflowError)
"""What pyarrow raises over a damaged file that `open_input` opened."""


@dataclass(frozen=True)
class Reading:
    """What a job says of how text is read; None: the file tells.

    encoding: a codec's name. delimiter: between CSV's fields. text_columns: columns of CSV, by their names in the
    file, that stay text; None: all, and nothing is guessed.
    """

    encoding: str | None = None
    delimiter: str | None = None
    text_columns: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found. marks: whatever helps the format to find a range of rows again. notes: what
    is not usual in how it is read, in words. warnings: what a job should not go on with unseen."""

    rows: int
    schema: pa.Schema
    marks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema that holds every file's columns. Raises ArrowInvalid or ArrowTypeError if none does."""
    return pa.unify_schemas(list(schemas), promote_options="permissive")


@dataclass(frozen=True)
class Format:
    """scan(url, reading): raises InputError for a file that cannot be read as a whole, or UNREADABLE.

    read(url, reading, marks, start, stop, schema): rows [start, stop) under the job's schema, with the column
    BROKEN_ROW saying why a row could not be read. Raises UNREADABLE when the file changed or is damaged.
    unify(schemas): the job's schema from its files'. text: whether files are text, which may be compressed, and
    which planning reads whole, as text has no index of its rows.
    """

    scan: Callable[[str, Reading], Scan]
    read: Callable[[str, Reading, tuple[int, ...], int, int, pa.Schema], pa.Table]
    unify: Callable[[Sequence[pa.Schema]], pa.Schema] = unify
    text: bool = False


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
    """The table under the job's schema. Rows whose text is not UTF-8 are marked broken, the text repaired; so are
    those with a value that the schema's type does not hold, which becomes null.

    Raises ArrowInvalid when the table is corrupt.
    """
    reasons: list[str | None] = [None] * table.num_rows
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if vet(column):
            with suppress(pa.ArrowInvalid):
                columns.append(plain_column(column, field.type))
                continue
        columns.append(_one_by_one(field, column, reasons))
    return with_broken(columns, schema, reasons)


def vet(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all text of a column is UTF-8. Raises ArrowInvalid when it is corrupt.

    To be called before anything else looks at values: what is corrupt is not safe to touch.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        return False
    return True


def _one_by_one(field: pa.Field, column: pa.ChunkedArray, reasons: list[str | None]) -> pa.ChunkedArray:
    """The column as the field has it, each row on its own. A text with bad bytes gets U+FFFD in their place; any
    other value that holds one, or does not fit, becomes null."""
    kept = []
    for index, value in enumerate(_singles(column)):
        if vet(value):
            try:
                kept += plain_column(pa.chunked_array([value]), field.type).chunks
                continue
            except pa.ArrowInvalid as error:
                utf8 = "UTF8" in str(error)
                wrong = "is not valid UTF-8" if utf8 else f"does not fit: {first_line(error)}"
                kept.append(pa.nulls(1, field.type))
        else:
            wrong = "is not valid UTF-8"
            kept.append(pa.array([_repaired(value)], field.type))
        reasons[index] = reasons[index] or f"column {field.name!r} {wrong}"
    return pa.chunked_array(kept, field.type)


def _singles(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """A column's rows, each an array of one that has no part of others; nested ones with bytes in place of text.
    Raises ArrowInvalid when it is corrupt."""
    for chunk in column.chunks:
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        if pa.types.is_dictionary(chunk.type):
            chunk.indices.validate(full=True)
            for entry in chunk.indices.to_pylist():
                if entry is not None and not 0 <= entry < len(chunk.dictionary):
                    raise pa.ArrowInvalid(f"a dictionary of {len(chunk.dictionary)} has no entry {entry}")
                yield pa.nulls(1, chunk.type) if entry is None else chunk.dictionary.slice(entry, 1)
            continue
        if nested := pa.types.is_nested(chunk.type):
            chunk = plain_column(pa.chunked_array([chunk]), with_bytes(chunk.type)).combine_chunks()
            chunk.validate(full=True)
        for index in range(len(chunk)):
            one = chunk.slice(index, 1)
            yield one.take(pa.array([0])) if nested else one


def _repaired(value: pa.Array) -> str:
    """The text of an array of one with U+FFFD for bad bytes."""
    return str(value[0].as_buffer().to_pybytes().decode("utf-8", "replace"))


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema, reasons: list[str | None]) -> pa.Table:
    """Rows as a table of `schema`; a row with a value that does not fit is marked broken in `reasons`."""
    columns = [column_of(field, [row.get(field.name) for row in rows], reasons) for field in schema]
    return with_broken(columns, schema, reasons)


def column_of(field: pa.Field, values: Sequence[Any], reasons: list[str | None]) -> pa.Array:
    """Values as a column; those that do not fit are null, and their rows marked broken in `reasons`."""
    try:
        return pa.array(values, field.type)
    except NO_FIT:
        return pa.array(_fitting(field, values, reasons), field.type)


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
