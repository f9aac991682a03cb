"""Parquet: rows counted from the footer, only the row groups of a range are read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from rayskip.data.formats.arrow import readable
from rayskip.data.formats.base import Format, Scan, open_file
from rayskip.errors import InputError


def scan(url: str) -> Scan:
    try:
        with open_file(url) as source:
            footer = pq.read_metadata(source)
            # Ray's own extension types carry pickled code; look before anything interprets the schema.
            if any(b"ray.data." in value for value in (footer.metadata or {}).values()):
                raise InputError(f"{url}: has Ray extension types (ray.data.*), which are not read; save plain columns")
            return Scan(footer.num_rows, footer.schema.to_arrow_schema().remove_metadata())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not a readable Parquet file ({error})") from error


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    with open_file(url) as source:
        file = pq.ParquetFile(source)
        first, groups, before = 0, [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before < stop and before + rows > start:
                first = before if not groups else first
                groups.append(group)
            before += rows
        table = file.read_row_groups(groups, columns=[name for name in schema.names if name in file.schema_arrow.names])
    return readable(table.slice(start - first, stop - start), schema)


FORMAT = Format(scan, read)
