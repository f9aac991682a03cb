"""Arrow IPC, file form and stream form (what `datasets` saves): batches are walked, never all loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from rayskip.data.formats.base import Format, Scan, conform, plain_schema, refuse_ray_types, rows_between
from rayskip.data.locate import filesystem, first_line
from rayskip.errors import InputError

_MAGIC = b"ARROW1\0\0"


def scan(url: str) -> Scan:
    try:
        with _open(url) as source:
            schema, batches = _batches(source, url)
            return Scan(sum(batch.num_rows for batch in batches), plain_schema(schema, url))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{url}: not a readable Arrow file ({first_line(error)})") from error


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    with _open(url) as source:
        own, batches = _batches(source, url)
        return conform(rows_between(batches, start, stop, own), schema)


def _open(url: str) -> pa.NativeFile:
    """Mapped when it is local, so that walking over a batch does not read it."""
    store, path = filesystem(url)
    return pa.memory_map(path) if isinstance(store, fs.LocalFileSystem) else store.open_input_file(path)


def _batches(source: pa.NativeFile, url: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of the file form or, failing its magic number, of the stream form."""
    is_file = source.read(len(_MAGIC)) == _MAGIC
    source.seek(len(_MAGIC) if is_file else 0)
    refuse_ray_types(pa.ipc.read_message(source).metadata.to_pybytes(), url)
    source.seek(0)
    if not is_file:
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)
    file = pa.ipc.open_file(source)
    return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))


FORMAT = Format(scan, read)
