"""Every Arrow type, in every format that holds it, and damaged files: carried through, or refused by name."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayskip.config import InputConfig, JobConfig
from rayskip.data.output import encode, output_table
from rayskip.data.prompts import PromptBuilder, prompt_columns
from rayskip.data.records import BROKEN_ROW, Generation
from rayskip.data.sources import Source, discover, plan_shards, read_shard
from rayskip.data.values import python_rows
from rayskip.errors import InputError, RowError

UNITS = ("s", "ms", "us", "ns")
ZONES = (None, "UTC", "Europe/Berlin", "W. Europe Standard Time", "+01:00")
FLAT: list[pa.DataType] = [
    *(pa.null(), pa.bool_(), pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()),
    *(pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")),
    *(pa.timestamp(unit, zone) for unit in UNITS for zone in ZONES),
    *(pa.duration(unit) for unit in UNITS),
    *(
        pa.decimal32(9, 2),
        pa.decimal64(18, 2),
        pa.decimal128(38, 2),
        pa.decimal256(76, 2),
        pa.decimal128(5, -2),
    ),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.binary(4), pa.binary(0), pa.month_day_nano_interval(), pa.uuid(), pa.json_(), pa.bool8()),
    *(pa.dictionary(pa.int8(), kind) for kind in (pa.string(), pa.int64(), pa.list_(pa.int8()))),
    pa.run_end_encoded(pa.int32(), pa.string()),
    pa.opaque(pa.int32(), "kind", "vendor"),
    pa.dense_union([pa.field("a", pa.int8()), pa.field("b", pa.string())]),
    pa.sparse_union([pa.field("a", pa.int8())]),
]
INNER = [
    *(
        pa.null(),
        pa.int8(),
        pa.string_view(),
        pa.timestamp("s"),
        pa.timestamp("us", "No/Where"),
        pa.duration("ns"),
    ),
    *(pa.dictionary(pa.int8(), pa.string()), pa.uuid(), pa.list_view(pa.string_view()), pa.float16()),
    *(
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.month_day_nano_interval(),
        pa.struct([("x", pa.date32())]),
    ),
]
NESTED: list[pa.DataType] = [
    make(kind)
    for kind in INNER
    for make in (
        pa.list_,
        pa.large_list,
        pa.list_view,
        pa.large_list_view,
        lambda kind: pa.list_(kind, 2),
        lambda kind: pa.struct([("a", kind), pa.field("b", pa.int8())]),
        lambda kind: pa.map_(pa.string(), kind),
    )
]
REFUSED = ("union", "interval", "decimal128(5, -2)", "fixed_size_binary[0]")
"""What no output can hold, with the nesting that pyarrow cannot undo (see `may_be_refused`)."""


def values(kind: pa.DataType) -> pa.Array:
    """Three values: an extreme, a null and another."""
    is_ = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, values(kind.storage_type))
    if is_.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array([0, None, 2], pa.int8()), values(kind.value_type))
    if is_.is_run_end_encoded(kind):
        return pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), values(kind.value_type))
    if is_.is_null(kind) or is_.is_union(kind) or kind == pa.binary(0):
        return pa.nulls(3, kind)
    if is_.is_boolean(kind):
        return pa.array([True, None, False])
    if is_.is_interval(kind):
        return pa.array([(1, 2, 3), None, (0, 0, 0)], kind)
    if is_.is_decimal(kind):
        return pa.array([Decimal((1, (9,) * kind.precision, -kind.scale)), None, Decimal(0)], kind)
    if is_.is_floating(kind):
        return pa.array([float("-inf"), None, 1.5], kind)
    if is_.is_integer(kind) or is_.is_temporal(kind):
        return whole(kind)
    if is_.is_nested(kind):
        return nested(kind)
    text = is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)
    return pa.array(["é" * 30, None, ""] if text else [b"\xffabc", None, b"\0" * 4], kind)


def whole(kind: pa.DataType) -> pa.Array:
    width = kind.bit_width
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    if pa.types.is_unsigned_integer(kind):
        low, high = 0, 2**width - 1
    if pa.types.is_time(kind):
        low, high = 0, 86_400 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit] - 1
        high -= high % 1000 if kind.unit == "ns" else 0  # JSON's times are of microseconds
    if kind == pa.date64():
        low, high = -86_400_000 * 10**6, 86_400_000 * 10**6
    if pa.types.is_timestamp(kind) and kind.unit == "s":  # what milliseconds can hold; others: the test below
        low, high = -(10**15), 10**15
    if pa.types.is_temporal(kind) and kind in (
        pa.duration("ns"),
        *(pa.timestamp("ns", zone) for zone in ZONES),
    ):
        low += 1  # the least is pandas' "not a time"
    plain = kind if pa.types.is_integer(kind) else pa.int32() if width == 32 else pa.int64()
    return pa.array([low, None, high], plain).view(kind)


def nested(kind: pa.DataType) -> pa.Array:
    is_ = pa.types
    absent = pa.array([False, True, False])
    if is_.is_struct(kind):
        return pa.StructArray.from_arrays([values(f.type) for f in kind], fields=list(kind), mask=absent)
    if is_.is_map(kind):
        keys = pa.array(["k", "l", "m"])
        made = pa.MapArray.from_arrays(pa.array([0, 1, None, 3], pa.int32()), keys, values(kind.item_type))
        return made.cast(kind)
    inner = values(kind.value_type)
    if is_.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.concat_arrays([inner, inner]), type=kind, mask=absent)
    offsets, sizes = [0, 1, 1], [1, 0, 2]
    if is_.is_list_view(kind) or is_.is_large_list_view(kind):
        large = is_.is_large_list_view(kind)
        number = pa.int64() if large else pa.int32()
        made = pa.LargeListViewArray if large else pa.ListViewArray
        starts, lengths = pa.array(offsets, number), pa.array(sizes, number)
        return made.from_arrays(starts, lengths, inner, type=kind, mask=absent)
    large = is_.is_large_list(kind)
    made = pa.LargeListArray if large else pa.ListArray
    return made.from_arrays(pa.array([0, 1, None, 3], pa.int64() if large else pa.int32()), inner, type=kind)


def write(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    make = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table)


def may_be_refused(kind: pa.DataType) -> bool:
    inside = str(kind).split("<", 1)[-1] if pa.types.is_nested(kind) else ""
    encoded = "run_end" in inside or "list_view" in inside
    return encoded or any(word in str(kind) for word in REFUSED)


def leaves(value: Any) -> Any:
    """A Python value without what storage changes: tuples, and identifiers as what they are made of."""
    if isinstance(value, list | tuple):
        return [leaves(item) for item in value]
    if isinstance(value, dict):
        return {key: leaves(item) for key, item in value.items()}
    return getattr(value, "bytes", value)


def same(read: pa.ChunkedArray, written: pa.Array) -> bool:
    """Whether both hold the same values, as far as Python can say; else whether as many are null."""
    written = written.storage if isinstance(written, pa.ExtensionArray) else written
    try:
        return bool(leaves(read.to_pylist()) == leaves(written.to_pylist()))
    except (ValueError, OverflowError):
        return read.null_count == written.null_count and len(read) == len(written)


def job(format: str) -> JobConfig:
    return JobConfig(
        name="x", model={"path": "m"}, input={"path": "in"}, output={"path": "out", "format": format}
    )


def source_or_refusal(path: Path) -> Source | str:
    try:
        return discover(InputConfig(path=str(path)))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
def test_every_type_is_carried_or_refused(tmp_path: Path, suffix: str) -> None:
    carried = refused = 0
    path = tmp_path / f"a.{suffix}"
    for kind in [*FLAT, *NESTED]:
        try:
            column = values(kind)
            write(path, pa.table({"prompt": ["a", "b", "c"], "odd": column}))
        except (pa.ArrowException, OSError):
            continue  # the format or pyarrow does not hold it
        source = source_or_refusal(path)
        if isinstance(source, str):
            assert "column 'odd' is of type" in source
            assert may_be_refused(kind), source
            refused += 1
            continue
        (shard,) = plan_shards(source, 3)
        table = read_shard(shard, source)
        assert table[BROKEN_ROW].null_count == 3, kind
        assert same(table["odd"], column), kind
        rows = [Generation(index, 0, "stop", "x") for index in range(3)]
        back = pq.read_table(io.BytesIO(encode("parquet", output_table(table, rows, shard, job("parquet")))))
        assert back["odd"].type == table["odd"].type, kind
        assert str(back["odd"].combine_chunks()) == str(table["odd"].combine_chunks()), kind
        lines = encode("jsonl", output_table(table, rows, shard, job("jsonl"))).splitlines()
        nulls = [json.loads(line)["odd"] is None for line in lines]
        assert nulls == table["odd"].is_null(nan_is_null=True).to_pylist() or pa.types.is_floating(kind), kind
        carried += 1
    assert carried > 90
    assert refused > (0 if suffix == "parquet" else 5)


def test_values_that_do_not_fit_or_that_python_cannot_hold(tmp_path: Path) -> None:
    """Far dates and unknown zones pass through where no prompt needs them, and are error rows where one does."""
    far = pa.array([253402300800, 1, None], pa.timestamp("s"))
    zone = pa.array([1, None, 3], pa.timestamp("us", "W. Europe Standard Time"))
    inside = pa.StructArray.from_arrays([pa.array([2**62, 1, 2], pa.timestamp("s"))], ["at"])
    write(
        tmp_path / "a.arrow",
        pa.table({"prompt": ["a", "b", "c"], "far": far, "zone": zone, "inside": inside}),
    )
    source = discover(InputConfig(path=str(tmp_path / "a.arrow")))
    (shard,) = plan_shards(source, 3)
    table = read_shard(shard, source)
    reasons = table[BROKEN_ROW].to_pylist()
    assert "column 'inside' does not fit" in reasons[0]
    assert reasons[1:] == [None, None]
    rows = list(python_rows(table, {"prompt", "far", BROKEN_ROW}))
    assert [row.keys() for row in rows] == [{"prompt", "far", BROKEN_ROW}] * 3
    assert "'inside'" in rows[0][BROKEN_ROW]
    rows = list(python_rows(table, {"zone"}))
    assert "column 'zone'" in rows[2][BROKEN_ROW]
    lines = encode(
        "jsonl",
        output_table(table, [Generation(i, 0, "stop", "x") for i in range(3)], shard, job("jsonl")),
    ).splitlines()
    first, second, third = map(json.loads, lines)
    assert first["far"] == "10000-01-01T00:00:00"
    assert first["zone"] == "1970-01-01T00:00:00.000001Z"
    assert (second["zone"], third["far"]) == (None, None)
    assert second["inside"] == {"at": "1970-01-01T00:00:01"}


@pytest.mark.parametrize(
    ("config", "said"),
    [({"prompt": "prompt"}, None), ({"template": "{{ prompt }} {{ far }}", "chat": True}, "column 'far'")],
)
def test_only_the_prompts_columns_become_python(
    tmp_path: Path, config: dict[str, Any], said: str | None
) -> None:
    far = pa.array([253402300800], pa.timestamp("s"))
    write(tmp_path / "a.parquet", pa.table({"prompt": [[1, 2]], "far": far, "prompt_token_ids": [[3, 4]]}))
    known = InputConfig(path=str(tmp_path / "a.parquet"), **(config if said else {}))
    source = discover(known)
    (shard,) = plan_shards(source, 3)
    (row,) = python_rows(read_shard(shard, source), prompt_columns(known))
    if said is None:
        assert "far" not in row
        return
    builder = PromptBuilder(known, job("jsonl").sampling, None, 100)
    with pytest.raises(RowError, match=said):
        builder.build(row, 0, shard.name)


def damaged(data: bytes, parquet: bool) -> Iterator[bytes]:
    """Cut off, and with bytes of what describes the data turned over: Arrow's message heads, Parquet's footer."""
    import random

    draw = random.Random(7)
    if parquet:
        heads = [(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data))]
    else:
        starts = [at for at in range(0, len(data) - 8, 8) if data[at : at + 4] == b"\xff\xff\xff\xff"]
        heads = [(at, at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")) for at in starts]
    for case in range(120):
        broken = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 4])):
            low, high = draw.choice(heads) if draw.random() < 0.8 else (0, len(data))
            at = draw.randrange(low, min(high, len(data)))
            broken[at] = draw.choice([broken[at] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255])
        yield bytes(broken[: draw.randrange(len(data))] if case % 10 == 0 else broken)


def damage(path: Path) -> None:
    """What the test below runs in a process of its own: any way but InputError and all the rows ends it."""
    told = 0
    for data in damaged(path.read_bytes(), path.suffix == ".parquet"):
        (path.parent / f"damaged{path.suffix}").write_bytes(data)
        try:
            source = discover(InputConfig(path=str(path.parent / f"damaged{path.suffix}")))
            tables = [read_shard(shard, source) for shard in plan_shards(source, 64)]
        except InputError:
            told += 1
            continue
        rows = sum(table.num_rows for table in tables)
        assert rows == 300, rows
        for table in tables:
            list(python_rows(table, table.column_names))
    assert 20 < told < 120, told


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
def test_damaged_files_are_told_and_end_no_process(tmp_path: Path, suffix: str) -> None:
    table = pa.table(
        {
            "prompt": [f"row {index}" for index in range(300)],
            "tags": [["a", str(index)] for index in range(300)],
            "kind": pa.array(["x", "y", "z"] * 100).dictionary_encode(),
            "kinds": pa.array([["x"]] * 300, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
            "view": pa.array([f"a rather long text {index}" for index in range(300)], pa.string_view()),
            "map": pa.array([[("k", index)] for index in range(300)], pa.map_(pa.string(), pa.int32())),
            "good": [True, None, False] * 100,
        }
    )
    table = table.drop_columns(["kinds"]) if suffix == "parquet" else table
    path = tmp_path / f"a.{suffix}"
    write(path, table)
    code = f"from pathlib import Path; from test_data_types import damage; damage(Path({str(path)!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr[-2000:]}"


def read_unsafe(folder: str) -> None:
    """What the test below runs in a process of its own. What is cast before it is checked ends that."""
    from rayskip.data.formats import arrow

    arrow._VETTED = 0  # as in a large file, the values are first seen when a shard is read
    source = discover(InputConfig(path=f"{folder}/a.arrow"))
    with pytest.raises(InputError, match="damaged, rows 0 to 2 cannot be read"):
        read_shard(next(plan_shards(source, 3)), source)


def test_values_are_checked_before_anything_touches_them(tmp_path: Path) -> None:
    kinds = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array(["aaa", "bbb"]))
    write(tmp_path / "a.arrow", pa.table({"prompt": kinds}))
    good, wild = (pa.array(ends, pa.int32()).buffers()[1].to_pybytes() for ends in ([0, 3, 6], [0, 2**30, 6]))
    data = (tmp_path / "a.arrow").read_bytes()
    assert data.count(good) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(good, wild))
    code = f"from test_data_types import read_unsafe; read_unsafe({str(tmp_path)!r})"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr[-2000:]}"
    assert "not a readable Arrow file" in str(source_or_refusal(tmp_path / "a.arrow"))


def test_a_stream_that_is_cut_between_batches_or_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, pa.table({"prompt": ["a", "b"]}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="cut off"):
        discover(InputConfig(path=str(path)))
    path.write_bytes(whole + whole)
    with pytest.raises(InputError, match="goes on"):
        discover(InputConfig(path=str(path)))
