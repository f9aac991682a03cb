"""Arrow IPC, file and stream (what `datasets` saves): record batches are walked, not loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from rayskip.data.formats.base import Format, Scan, open_file, with_broken
from rayskip.errors import InputError


def scan(url: str) -> Scan:
    try:
        with open_file(url) as source:
            schema, batches = _open(source)
            return Scan(sum(batch.num_rows for batch in batches), schema.remove_metadata())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not a readable Arrow file ({error})") from error


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    with open_file(url) as source:
        kept, before = [], 0
        own, batches = _open(source)
        for batch in batches:
            low, high = max(start, before), min(stop, before + batch.num_rows)
            if low < high:
                kept.append(batch.slice(low - before, high - low))
            before += batch.num_rows
            if before >= stop:
                break
        return readable(pa.Table.from_batches(kept, own), schema)


def _open(source: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of the file format or, failing its magic number, of the stream format."""
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, iter(stream)


def readable(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table under the job's schema; rows whose text is not UTF-8 are marked broken, their text repaired."""
    reasons: list[str | None] = [None] * table.num_rows
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column = _repaired(field, column, reasons)
        columns.append(column.cast(field.type))
    return with_broken(pa.Table.from_arrays(columns, schema=schema), reasons)


def _repaired(field: pa.Field, column: pa.ChunkedArray, reasons: list[str | None]) -> pa.Array:
    """A string column with bad bytes replaced by U+FFFD; a nested value that holds some becomes null."""
    flat = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    values = []
    for index, scalar in enumerate(column):
        try:
            values.append(scalar.as_py())
        except UnicodeDecodeError:
            reasons[index] = f"column {field.name!r} is not valid UTF-8"
            values.append(scalar.as_buffer().to_pybytes().decode("utf-8", "replace") if flat else None)
    return pa.array(values, column.type)


FORMAT = Format(scan, read)
