"""Arrow IPC, file form and stream form (what `datasets` saves): batches are walked, never all loaded."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from rayskip.data.formats.base import (
    BUFFER,
    UNREADABLE,
    Format,
    Scan,
    conform,
    rows_between,
    vet,
)
from rayskip.data.formats.types import plain_schema, refuse_ray_types
from rayskip.data.locate import filesystem, open_input
from rayskip.errors import InputError, StorageBusy, first_line

_MAGIC = b"ARROW1\0\0"

_VETTED = 1 << 23
"""Bytes of a file whose values are checked before a job starts; a shard's always are, when it is read."""


def scan(url: str) -> Scan:
    try:
        with _open(url) as source:
            schema, batches = _batches(source, url)
            rows, vetted = 0, 0
            for batch in batches:
                rows += batch.num_rows
                vetted += batch.get_total_buffer_size()
                if vetted <= _VETTED:
                    for column in batch.columns:
                        vet(column)
            return Scan(rows, plain_schema(schema, url))
    except UNREADABLE as error:
        raise InputError(f"{url}: not a readable Arrow file ({first_line(error)})") from error


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    with _open(url) as source:
        own, batches = _batches(source, url)
        return _copy(conform(rows_between(batches, start, stop, own), schema))


def _copy(table: pa.Table) -> pa.Table:
    """The table in memory of its own: a mapped file may be rewritten while its rows generate."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _open(url: str) -> pa.NativeFile:
    """Mapped when it is local, so that walking over a batch does not read it."""
    store, path = filesystem(url)
    if not isinstance(store, fs.LocalFileSystem):
        return pa.PythonFile(io.BufferedReader(open_input(url), BUFFER), mode="r")
    try:
        return pa.memory_map(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageBusy(f"{url}: cannot be read ({first_line(error)})") from error


def _batches(source: pa.NativeFile, url: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of the file form or, failing its magic number, of the stream form."""
    is_file = source.read(len(_MAGIC)) == _MAGIC
    source.seek(len(_MAGIC) if is_file else 0)
    refuse_ray_types(pa.ipc.read_message(source).metadata.to_pybytes(), url)
    source.seek(0)
    if not is_file:
        stream = pa.ipc.open_stream(source)
        return stream.schema, _to_its_end(stream, source)
    file = pa.ipc.open_file(source)
    return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))


def _to_its_end(stream: pa.RecordBatchReader, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The batches of a stream. Raises ArrowInvalid when its end, which is marked, is not the file's."""
    end = source.tell()
    for batch in stream:
        yield batch
        end = source.tell()
    if source.tell() == end:
        raise pa.ArrowInvalid("the stream is cut off: it has no end mark")
    if source.tell() != source.size():
        raise pa.ArrowInvalid("the file goes on after the stream's end")


FORMAT = Format(scan, read, indexed=True)
