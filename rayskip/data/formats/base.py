"""What every input format answers, and what they share: broken rows, lines found by offset.

Does not know which files a job reads, or how its rows become prompts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayskip.data.formats.types import plain_column, with_bytes
from rayskip.data.locate import open_input
from rayskip.data.records import BROKEN_ROW
from rayskip.errors import first_line

MARK_ROWS = 1000
"""Rows between two remembered byte offsets of a text file: planning keeps a number per so many rows."""

MAX_LINE = 1 << 24
"""Bytes of the longest line of a text format that is read, 16 MiB: a prompt of some million tokens. While it is
parsed a line may take fifty times as much memory."""

BUFFER = 1 << 20
"""Bytes that are read at once of what is read in small pieces."""

_BOM = b"\xef\xbb\xbf"

NO_FIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
"""What Arrow raises for a value that is not of a column's type, or text that UTF-8 cannot hold."""


UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, OverflowError)
"""What pyarrow raises over a damaged file that `open_input` opened."""


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
    BROKEN_ROW saying why a row could not be read. Raises UNREADABLE when the file changed or is damaged.
    unify(schemas): the job's schema from its files'. indexed: the file has an index of its rows, so that planning
    does not read it whole.
    """

    scan: Callable[[str], Scan]
    read: Callable[[str, tuple[int, ...], int, int, pa.Schema], pa.Table]
    unify: Callable[[Sequence[pa.Schema]], pa.Schema] = unify
    indexed: bool = False


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


@dataclass(frozen=True)
class LongLine:
    """In place of a line of more than MAX_LINE bytes, which is never read as a whole. size: its bytes."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"the line has {self.size:,} bytes; the most that is read is {MAX_LINE:,}"


Line = bytes | LongLine


def read_lines(url: str, offset: int = 0) -> Iterator[Line]:
    """Lines with their line ends, from a byte offset that begins one. Only a newline ends a line."""
    with io.BufferedReader(open_input(url), BUFFER) as source:
        source.seek(offset)
        while line := source.readline(MAX_LINE + 1):
            if len(line) <= MAX_LINE:
                yield line
                continue
            size = len(line)
            while not line.endswith(b"\n") and (line := source.readline(BUFFER)):
                size += len(line)
            yield LongLine(size)


def without_bom(line: bytes) -> bytes:
    """The first line of a file without the mark that some editors put there."""
    return line.removeprefix(_BOM)
