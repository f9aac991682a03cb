"""Arrow types: which a job carries from its input to its output, and how a column becomes one of those.

Does not know files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayskip.errors import InputError, first_line


def plain_schema(schema: pa.Schema, url: str) -> pa.Schema:
    """The schema without metadata, and of types that every output and every process can hold: no extension types,
    dictionaries, views and runs. Raises InputError for a column that cannot be had as such a type."""
    twice = {name for name in schema.names if schema.names.count(name) > 1}
    if twice:
        raise InputError(f"{url}: has several columns named {', '.join(sorted(twice))}")
    plain = pa.schema([(field.name, plain_type(field.type)) for field in schema])
    if again := [field.name for field in plain if _names_twice(field.type)]:
        raise InputError(f"{url}: the objects in column {again[0]} have several fields of one name; drop it")
    empty = [field.name for field in plain if keyless(field.type)]
    if empty:
        raise InputError(
            f"{url}: the objects in column {empty[0]} have no keys, which Parquet cannot hold; drop it"
        )
    refuse_uncarried(schema, plain, url)
    return plain


def _names_twice(kind: pa.DataType) -> bool:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    return len({field.name for field in fields}) < len(fields) or any(
        _names_twice(field.type) for field in fields
    )


def keyless(kind: pa.DataType) -> bool:
    """Whether a type holds, somewhere, objects that never have a key. Parquet has no such type."""
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return any(map(keyless, children)) if children else bool(pa.types.is_struct(kind))


def refuse_uncarried(own: pa.Schema, schema: pa.Schema, url: str) -> None:
    """Raises InputError for a column of a file's schema that cannot be carried through a job to an output under the
    job's schema: by trying, so that there is no list of types to keep."""
    try:
        _carry([(own.field(name), schema.field(name)) for name in own.names])
    except _UNCARRIED:
        for name in own.names:
            try:
                _carry([(own.field(name), schema.field(name))])
            except _UNCARRIED as error:
                raise InputError(
                    f"{url}: column {name!r} is of type {own.field(name).type}, which no output can hold; drop or "
                    f"convert it ({first_line(error)})"
                ) from error
        raise


_UNCARRIED = (pa.ArrowException, OSError, ValueError)


def _carry(fields: Sequence[tuple[pa.Field, pa.Field]]) -> None:
    """Do with a null of each type what a job does with a column."""
    if any(_holds_view(own.type) for own, _ in fields):
        raise pa.ArrowNotImplementedError("pyarrow cannot cast a list view inside of another type")
    columns = [plain_column(pa.chunked_array([pa.nulls(1, own.type)]), new.type) for own, new in fields]
    table = pa.Table.from_arrays(columns, [f"{index}" for index in range(len(fields))])
    pq.write_table(table.take(pa.array([0, 0])), io.BytesIO())


def _holds_view(kind: pa.DataType) -> bool:
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return any(_is_view(child) or _holds_view(child) for child in children)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that holds the same values and that an output keeps as it is: Parquet has no views, no runs and no
    times in seconds. A type that is plain already is returned as it is."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if same := _SAME.get(kind):
        return same
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    if not pa.types.is_nested(kind) or pa.types.is_union(kind):
        return kind
    fields = [kind.field(index) for index in range(kind.num_fields)]
    plain = [field.with_type(plain_type(field.type)) for field in fields]
    return kind if plain == fields and not _is_view(kind) else _with_fields(kind, plain)


_SAME = {
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
    pa.time32("s"): pa.time32("ms"),
}


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _with_fields(kind: pa.DataType, fields: Sequence[pa.Field]) -> pa.DataType:
    """A nested type with other fields; a list instead of a list view."""
    if pa.types.is_struct(kind):
        return pa.struct(fields)
    if pa.types.is_map(kind):
        return pa.map_(fields[0].type.field(0), fields[0].type.field(1), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    return pa.large_list(fields[0]) if large else pa.list_(fields[0])


def plain_column(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A valid column as `kind`, the plain type of its own or one that holds it.

    Raises ArrowInvalid where a value does not fit, ArrowNotImplementedError where none can.
    """
    if column.type == kind:
        return column
    return pa.chunked_array([_decoded(chunk).cast(kind) for chunk in column.chunks], kind)


def _decoded(array: pa.Array) -> pa.Array:
    """Without the encodings that Arrow casts for simple types only."""
    if isinstance(array, pa.ExtensionArray):
        return _decoded(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return _decoded(pc.run_end_decode(array))
    if pa.types.is_dictionary(array.type):
        return _decoded(array.dictionary.take(array.indices))
    if _is_view(array.type):
        return _without_view(array)
    return array


def _without_view(array: pa.Array) -> pa.Array:
    """A list view as a list, which pyarrow's own cast makes with too few offsets."""
    large = pa.types.is_large_list_view(array.type)
    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())
    ends = pc.cumulative_sum(lengths)
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(pa.int64() if large else pa.int32())
    make = pa.LargeListArray if large else pa.ListArray
    return make.from_arrays(offsets, array.flatten(), mask=array.is_null())


def with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text, which need not be UTF-8; list views are lists."""
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if not pa.types.is_nested(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return kind
    fields = [kind.field(index) for index in range(kind.num_fields)]
    return _with_fields(kind, [field.with_type(with_bytes(field.type)) for field in fields])


def refuse_ray_types(metadata: bytes, url: str) -> None:
    """Ray's extension types carry pickled code: look at the raw schema, before anything interprets it."""
    if b"ray.data." in metadata:
        raise InputError(
            f"{url}: has Ray extension types (ray.data.*), which are not read; save plain columns"
        )
