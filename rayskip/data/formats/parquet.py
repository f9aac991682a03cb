"""Parquet: rows are counted from the footer; a row group is read no further than the range's end."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from rayskip.data.formats.base import (
    UNREADABLE,
    Format,
    Scan,
    conform,
    rows_between,
)
from rayskip.data.formats.types import plain_schema, refuse_ray_types
from rayskip.data.locate import open_input
from rayskip.errors import InputError, first_line

_BATCH = 4096


def scan(url: str) -> Scan:
    try:
        with open_input(url) as source:
            footer = pq.read_metadata(source)
            refuse_ray_types(base64.b64decode((footer.metadata or {}).get(b"ARROW:schema", b"")), url)
            if footer.num_rows != sum(_group_rows(footer)) or min(_group_rows(footer), default=0) < 0:
                raise pa.ArrowInvalid("its row groups do not have the rows that it says")
            return Scan(footer.num_rows, plain_schema(footer.schema.to_arrow_schema(), url))
    except (*UNREADABLE, binascii.Error) as error:
        raise InputError(f"{url}: not a readable Parquet file ({first_line(error)})") from error


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    # Buffered: a row group is streamed, so one with a million rows costs no more memory than a batch.
    with open_input(url) as source, pq.ParquetFile(source, buffer_size=1 << 20) as file:
        first, groups = _groups(file.metadata, start, stop)
        names = [name for name in schema.names if name in file.schema_arrow.names]
        own = pa.schema([file.schema_arrow.field(name) for name in names])
        # One thread: pyarrow 26's pool aborts one in four processes that end soon after a threaded read.
        batches: Iterator[pa.RecordBatch] = file.iter_batches(_BATCH, groups, names, use_threads=False)
        return conform(rows_between(batches, start - first, stop - first, own), schema)


def _groups(footer: pq.FileMetaData, start: int, stop: int) -> tuple[int, list[int]]:
    """The row groups that hold rows [start, stop), and the file's rows before the first of them."""
    first, groups, before = 0, list[int](), 0
    for group, rows in enumerate(_group_rows(footer)):
        if before < stop and before + rows > start:
            first = first if groups else before
            groups.append(group)
        before += rows
    return first, groups


def _group_rows(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


FORMAT = Format(scan, read, indexed=True)
