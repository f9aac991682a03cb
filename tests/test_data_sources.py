"""Input files: found, counted, cut into shards and read back, in every format, local and on S3."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs
from pydantic import ValidationError
from s3_server import s3_server

from rayskip.config import InputConfig
from rayskip.data.formats import FORMATS
from rayskip.data.formats.base import BUFFER
from rayskip.data.formats.text import MARK_ROWS, MAX_LINE
from rayskip.data.locate import covers
from rayskip.data.records import BROKEN_ROW
from rayskip.data.sources import InputFile, Source, discover, plan_shards, read_shard
from rayskip.data.splits import splits_of
from rayskip.errors import InputError

Rows = list[dict[str, Any]]
Write = Callable[[Path, Rows], None]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: Path, rows: Rows, **how: Any) -> None:
    with path.open("w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **how)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-16")


def packed(write: Write, pack: Callable[[bytes], bytes]) -> Write:
    """Compressed in two pieces, as tools write that append."""

    def written(path: Path, rows: Rows) -> None:
        write(path, rows)
        data = path.read_bytes()
        path.write_bytes(pack(data[:1000]) + pack(data[1000:]))

    return written


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)


def write_arrow_file(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


def write_arrow_stream(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


WRITERS: dict[str, Write] = {
    "a.jsonl": write_jsonl,
    "a.csv": write_csv,
    "a.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "a.json": write_json,
    "a.jsonl.gz": packed(write_jsonl, gzip.compress),
    "a.csv.zst": packed(write_csv, lambda data: pa.Codec("zstd").compress(data, asbytes=True)),
    "a.parquet": write_parquet,
    "a.feather": write_arrow_file,
    "a.arrow": write_arrow_stream,
}


def rows_of(path: object, shard_rows: int = 700, **config: Any) -> Rows:
    """All rows of an input, read shard by shard under one schema."""
    source = discover(InputConfig(path=str(path), **config))
    tables = [read_shard(shard, source) for shard in plan_shards(source, shard_rows)]
    assert all(table.schema == tables[0].schema for table in tables)
    return pa.concat_tables(tables).to_pylist()


def refused(path: object, **config: Any) -> str:
    with pytest.raises(InputError) as caught:
        discover(InputConfig(path=str(path), **config))
    return str(caught.value)


def texts(count: int) -> Rows:
    return [
        {"id": f"é{i}", "prompt": f'line\nbreak, "quote" and \r {i}' if i % 3 else ""} for i in range(count)
    ]


def as_read(name: str, rows: Rows) -> Rows:
    """Rows as a file of that name has them: in CSV what is empty is null."""
    is_csv = name.split(".")[1] in ("csv", "tsv")
    return [row | {"prompt": row["prompt"] or (None if is_csv else ""), BROKEN_ROW: None} for row in rows]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("count", [1, MARK_ROWS, 2 * MARK_ROWS + 7])
def test_every_row_is_read_once_and_in_order(tmp_path: Path, name: str, count: int) -> None:
    """Also over the remembered offsets, row groups and batches, which the shards do not line up with."""
    rows = texts(count)
    WRITERS[name](tmp_path / name, rows)
    assert rows_of(tmp_path / name) == as_read(name, rows)


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    shard_rows=st.integers(1, 20),
    max_rows=st.none() | st.integers(1, 200),
)
def test_plan_is_a_partition(counts: list[int], shard_rows: int, max_rows: int | None) -> None:
    files = [InputFile(f"/in/{i}", str(i), count, "", "") for i, count in enumerate(counts)]
    shards = list(plan_shards(Source("jsonl", files, pa.schema([])), shard_rows, max_rows))
    planned = [(shard.name, row) for shard in shards for row in range(shard.start, shard.stop)]
    assert planned == [(file.name, row) for file in files for row in range(file.rows)][:max_rows]
    assert all(1 <= shard.rows <= shard_rows for shard in shards)
    assert [shard.index for shard in shards] == list(range(len(shards)))


def test_source_is_picklable(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    source = discover(InputConfig(path=str(tmp_path / "a.jsonl")))
    assert pickle.loads(pickle.dumps(source)) == source


class TestFiles:
    def test_folder_and_glob_in_order_of_name(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl", "_SUCCESS.jsonl"):
            write_jsonl(tmp_path / name, [{"prompt": name}])

        def names(path: str) -> list[str]:
            return [file.name for file in discover(InputConfig(path=f"{tmp_path}{path}")).files]

        assert names("") == names("/") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
        assert names("/*.jsonl") == ["a.jsonl", "b.jsonl"]
        assert names("/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
        assert names("/s*/[ac].jsonl") == ["sub/c.jsonl"]
        assert names("/b.jsonl") == ["b.jsonl"]

    def test_relative_paths_become_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_jsonl(tmp_path / "a.jsonl", texts(1))
        monkeypatch.chdir(tmp_path)
        for path in ("a.jsonl", "./a.jsonl", "./*.jsonl", "."):
            (file,) = discover(InputConfig(path=path)).files
            assert (file.url, file.name) == (str(tmp_path / "a.jsonl"), "a.jsonl")

    def test_columns_of_files_are_unified(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"prompt": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"n": pa.array([2], pa.int64()), "extra": ["x"]}), tmp_path / "b.parquet")
        assert rows_of(tmp_path) == [
            {"prompt": "a", "n": 1, "extra": None, BROKEN_ROW: None},
            {"prompt": None, "n": 2, "extra": "x", BROKEN_ROW: None},
        ]

    def test_fingerprint_changes_with_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        write_jsonl(path, texts(2))
        before = discover(InputConfig(path=str(path))).files
        assert discover(InputConfig(path=str(path))).files == before
        write_jsonl(path, texts(3)[1:])
        assert discover(InputConfig(path=str(path))).files[0].fingerprint != before[0].fingerprint

    @pytest.mark.parametrize("name", WRITERS)
    def test_a_file_that_changed_is_noticed(self, tmp_path: Path, name: str) -> None:
        """Also one with as many rows and bytes as before."""
        path = tmp_path / name
        WRITERS[name](path, [{"prompt": "old"}] * 5)
        source = discover(InputConfig(path=str(path)))
        (shard,) = plan_shards(source, 5)
        kept = read_shard(shard, source)
        for rows in ([{"prompt": "new"}] * 5, [{"prompt": "new"}] * 4):
            data = path.stat()
            with path.open("r+b") as file:  # in place: what was read may not be a view of the file
                WRITERS[name](tmp_path / f"other-{name}", rows)
                file.truncate()
                file.write((tmp_path / f"other-{name}").read_bytes())
            os.utime(path, ns=(data.st_atime_ns, data.st_mtime_ns + 1))
            with pytest.raises(InputError, match="changed"):
                read_shard(shard, source)
        assert kept["prompt"].to_pylist() == ["old"] * 5
        path.unlink()
        with pytest.raises(InputError, match="changed"):
            read_shard(shard, source)

    def test_a_file_that_changes_while_it_is_read_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        write_jsonl(path, texts(5))
        source = discover(InputConfig(path=str(path)))
        (shard,) = plan_shards(source, 5)

        jsonl = FORMATS["jsonl"]

        def read(*args: Any) -> pa.Table:
            table = jsonl.read(*args)
            os.utime(path, ns=(0, 0))
            return table

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FORMATS, "jsonl", replace(jsonl, read=read))
            with pytest.raises(InputError, match="changed"):
                read_shard(shard, source)

    def test_links_add_no_rows(self, tmp_path: Path) -> None:
        """Links to the folder, one above and a file beside; what only a link leads to is read."""
        data = tmp_path / "data"
        (data / "sub").mkdir(parents=True)
        (tmp_path / "outside").mkdir()
        above = tmp_path / "above.jsonl"
        for path in (data / "a.jsonl", data / "sub/b.jsonl", tmp_path / "outside/c.jsonl", above):
            write_jsonl(path, [{"prompt": path.name}])
        (data / "loop").symlink_to(data)
        (data / "sub/up").symlink_to(tmp_path)
        (data / "0.jsonl").symlink_to(data / "a.jsonl")
        (data / "more").symlink_to(tmp_path / "outside")
        (data / "more too").symlink_to(tmp_path / "outside")
        names = [file.name for file in discover(InputConfig(path=str(data))).files]
        assert names == ["a.jsonl", "more/c.jsonl", "sub/b.jsonl"]
        (data / "gone.jsonl").symlink_to(tmp_path / "nothing")
        assert "gone.jsonl is a link that leads nowhere" in refused(data)


class TestRefused:
    def test_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", texts(1))
        assert "did you mean train.jsonl?" in refused(tmp_path / "trian.jsonl")

    def test_empty_glob_and_folder(self, tmp_path: Path) -> None:
        assert "has no files" in refused(tmp_path / "*.jsonl")
        assert "has no files" in refused(tmp_path)

    def test_unknown_suffix_and_mixed_formats(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        assert ".parquet" in refused(tmp_path / "a.txt")
        write_jsonl(tmp_path / "b.jsonl", texts(1))
        assert "a.txt" in refused(tmp_path)
        write_csv(tmp_path / "c.csv", texts(1))
        assert "several formats" in refused(tmp_path / "[bc].*")

    def test_names_that_no_file_system_takes(self, tmp_path: Path) -> None:
        for path in ("", "  ", "a\0b.jsonl", os.fsdecode(b"a\xff.jsonl")):
            with pytest.raises(ValidationError, match="path"):
                InputConfig(path=path)
        assert "cannot be read" in refused(f"{tmp_path}/{'x' * 300}.jsonl")
        assert "cannot be" in refused(f"{tmp_path}/{'x' * 300}/*.jsonl")
        write_jsonl(tmp_path / "a.jsonl", texts(1))
        os.mkfifo(tmp_path / "pipe.jsonl")
        assert "no file and no folder" in refused(tmp_path / "pipe.jsonl")
        with open(os.fsencode(tmp_path) + b"/b\xff.jsonl", "wb") as file:
            file.write(b"{}")
        assert "is not valid UTF-8" in refused(tmp_path)
        assert "is not valid UTF-8" in refused(tmp_path / "b*")
        assert [file.name for file in discover(InputConfig(path=f"{tmp_path}/a*")).files] == ["a.jsonl"]

    def test_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("\n \n")
        assert "no rows" in refused(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
    def test_corrupt_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"ARROW1\0\0 not really")
        assert f"{name}: not a readable" in refused(tmp_path / name)
        WRITERS[name](tmp_path / name, texts(50))
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert name in refused(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
    def test_ray_extension_types(self, tmp_path: Path, name: str) -> None:
        """What a file looks like that makes Ray unpickle code."""
        metadata = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
        schema = pa.schema([pa.field("prompt", pa.large_binary(), metadata=metadata)])
        table = pa.Table.from_arrays([pa.array([b"x"], pa.large_binary())], schema=schema)
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        else:
            make = pa.ipc.new_file if name == "a.feather" else pa.ipc.new_stream
            with make(tmp_path / name, schema) as writer:
                writer.write_table(table)
        assert "ray.data" in refused(tmp_path / name)

    def test_columns_without_a_common_type(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"prompt": [[1]]}), tmp_path / "b.parquet")
        assert "do not agree" in refused(tmp_path)

    def test_objects_without_keys(self, tmp_path: Path) -> None:
        write_arrow_stream(tmp_path / "a.arrow", [{"prompt": "a", "meta": {"x": {}}}])
        assert "column meta" in refused(tmp_path / "a.arrow")

    def test_column_names(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("id,id\n1,2\n")
        assert "every column once" in refused(tmp_path / "a.csv")
        (tmp_path / "a.csv").write_bytes(b"id\xff,prompt\n1,2\n")
        assert "UTF-8" in refused(tmp_path / "a.csv")
        write_jsonl(tmp_path / "a.jsonl", [{BROKEN_ROW: "x"}])
        assert BROKEN_ROW in refused(tmp_path / "a.jsonl")

    def test_scheme_and_hub_name_that_lead_nowhere(self) -> None:
        assert "s3://" in refused("https://example.org/a.jsonl")
        assert "hub" in refused("nobody/no-such-dataset")


class TestBrokenRows:
    def test_broken_lines_are_rows(self, tmp_path: Path) -> None:
        lines = [b'{"prompt": "a"}', b"{", b"\xff", b"[1]", b'{"prompt": "\\uD800"}', b'{"prompt": "b"}']
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        rows = rows_of(tmp_path / "a.jsonl", shard_rows=2)
        assert [row["prompt"] for row in rows] == ["a", None, None, None, "?", "b"]
        reasons = [row[BROKEN_ROW] or "" for row in rows]
        for reason, part in zip(reasons, ["", "JSON", "UTF-8", "list", "surrogates", ""], strict=True):
            assert part in reason
            assert bool(part) == bool(reason)

    def test_half_a_surrogate_pair_breaks_its_row_alone(self, tmp_path: Path) -> None:
        lines = [
            '{"id": 1, "\\ud800": 2}',
            '{"id": 2, "x": {"\\ud800": 3}}',
            '{"id": 3, "x": {"y": "\\ud83d\\ude00"}}',
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        rows = rows_of(tmp_path / "a.jsonl")
        assert [row["id"] for row in rows] == [1, 2, 3]
        assert [bool(row[BROKEN_ROW]) for row in rows] == [True, True, False]
        assert rows[2]["x"]["y"] == "\U0001f600"

    def test_blank_lines_are_no_rows_and_a_bom_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}\n\n')
        assert [row["prompt"] for row in rows_of(tmp_path / "a.jsonl", shard_rows=1)] == ["a", "b"]
        (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"prompt"\r\na\r\n\r\nb\r\n')
        assert [row["prompt"] for row in rows_of(tmp_path / "a.csv", shard_rows=1)] == ["a", "b"]

    @pytest.mark.parametrize("format", ["jsonl", "openai"])
    def test_lines_too_long_or_too_deep_or_with_too_many_digits(self, tmp_path: Path, format: str) -> None:
        deep = '{"url": ' + "[" * 70 + "]" * 70 + "}"
        deeper = '{"url": ' + '{"a":' * 100_000 + "1" + "}" * 100_001
        long = '{"url": "' + "x" * MAX_LINE + '"}'
        digits = '{"url": ' + "9" * 5000 + "}"
        brackets = '{"url": "' + "[" * 1000 + '"}'
        (tmp_path / "a.jsonl").write_text("\n".join([deep, deeper, long, digits, brackets]))
        tracemalloc.start()
        rows = rows_of(tmp_path / "a.jsonl", shard_rows=2, format=format)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_LINE
        tracemalloc.stop()
        reasons = [row[BROKEN_ROW] or "" for row in rows]
        for reason, part in zip(
            reasons, ["64 deep", "JSON", f"{len(long) + 1:,} bytes", "JSON"], strict=False
        ):
            assert part in reason
        assert rows[4]["url"] == "[" * 1000

    def test_csv_lines_that_are_too_long_and_open_quotes(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("id,prompt\n1,a\n2," + "x" * MAX_LINE + "\n")
        assert "line 3" in refused(tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text('id,prompt\n1,a\n2,"b\n3,c\n4,d\n')
        assert "line 3" in refused(tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text('id,prompt\n1,a\n2,"b\n3,"c\n4,d\n')
        assert "line 3" in refused(tmp_path / "a.csv")

    def test_csv_rows_with_too_few_fields_or_wrong_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(b"id,prompt\n1,a\n2\n3,\xff\n4,d\n")
        assert "line 4 is not UTF-8" in refused(tmp_path / "a.csv")
        rows = rows_of(tmp_path / "a.csv", encoding="utf-8")
        assert [bool(row[BROKEN_ROW]) for row in rows] == [False, True, True, False]
        assert [row["id"] for row in rows] == [1, None, 3, 4]
        assert rows_of(tmp_path / "a.csv", encoding="latin-1")[2] == {
            "id": 3,
            "prompt": "ÿ",
            BROKEN_ROW: None,
        }

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_invalid_utf8_in_a_string_column(self, tmp_path: Path, name: str) -> None:
        offsets = pa.array([0, 2, 4, 6], pa.int32()).buffers()[1]
        bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ok\xff\xfeok")])
        nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), bad)
        table = pa.table({"prompt": bad, "tags": nested})
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        else:
            with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
                writer.write_table(table)
        rows = rows_of(tmp_path / name)
        assert [row["prompt"] for row in rows] == ["ok", "\ufffd\ufffd", "ok"]
        assert [row["tags"] for row in rows] == [["ok"], None, ["ok"]]
        assert "UTF-8" in rows[1][BROKEN_ROW]
        assert rows[0][BROKEN_ROW] is rows[2][BROKEN_ROW] is None


class TestJsonTypes:
    def test_types_are_learnt_over_all_rows(self, tmp_path: Path) -> None:
        """What appears late, in another shard or file, counts for all."""
        late = MARK_ROWS + 100
        rows = [
            {"id": i, "score": 1 if i < late else 0.5, "tag": None if i < late else "t"}
            for i in range(late + 1)
        ]
        write_jsonl(tmp_path / "a.jsonl", rows)
        write_jsonl(tmp_path / "b.jsonl", [{"id": 0, "new": {"a": [1]}}])
        read = rows_of(tmp_path)
        assert read[0] == {"id": 0, "score": 1.0, "tag": None, "new": None, BROKEN_ROW: None}
        assert read[-1]["new"] == {"a": [1]}

    def test_values_without_a_common_type_are_json_text(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"x": "é"}, {"x": {"k": "é"}}, {}])
        write_jsonl(tmp_path / "b.jsonl", [{"x": [True]}])
        assert [row["x"] for row in rows_of(tmp_path)] == ["1", "é", '{"k": "é"}', None, "[true]"]

    def test_objects_with_ever_new_keys_are_json_text(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"x": {f"k{i}": i}} for i in range(1000)])
        assert rows_of(tmp_path)[7]["x"] == '{"k7": 7}'

    def test_objects_that_never_have_a_key_are_json_text(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"x": {}, "y": [{}], "z": {}}])
        write_jsonl(tmp_path / "b.jsonl", [{"z": {"k": 1}}])
        (row, _) = rows_of(tmp_path)
        assert (row["x"], row["y"], row["z"]) == ("{}", "[{}]", {"k": None})

    def test_numbers_too_large_are_kept_as_text(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [{"x": 2**70}, {"x": 1}])
        assert [row["x"] for row in rows_of(tmp_path)] == [str(2**70), "1"]


REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}


class TestOpenai:
    def rows(self, tmp_path: Path, *bodies: Any) -> Rows:
        write_jsonl(tmp_path / "a.jsonl", [REQUEST | {"body": body} for body in bodies])
        return rows_of(tmp_path / "a.jsonl", format="openai")

    def test_messages_and_parameters(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        params = {"max_completion_tokens": 5, "top_p": 0.5, "stop": ["x"], "n": None}
        (row,) = self.rows(
            tmp_path, {"model": "m", "messages": messages, "logprobs": True, "top_logprobs": 2} | params
        )
        assert (row["custom_id"], row[BROKEN_ROW]) == ("a", None)
        assert json.loads(row["messages"]) == messages
        assert json.loads(row["sampling_params"]) == {
            "max_tokens": 5,
            "top_p": 0.5,
            "stop": ["x"],
            "logprobs": 2,
        }

    def test_an_effort_is_for_the_chat_template(self, tmp_path: Path) -> None:
        effort = {"messages": [], "reasoning_effort": "low"}
        given: list[Any] = [{"think": True}, {"reasoning_effort": "high"}, "x"]
        rows = self.rows(tmp_path, effort, *(effort | {"chat_template_kwargs": own} for own in given))
        assert [json.loads(row["sampling_params"])["chat_template_kwargs"] for row in rows] == [
            {"reasoning_effort": "low"},
            {"reasoning_effort": "low", "think": True},
            {"reasoning_effort": "high"},
            "x",
        ]

    def test_what_is_not_done_is_not_ignored(self, tmp_path: Path) -> None:
        body = {"messages": []}
        strange = {"response_format": {"type": "xml"}}
        nothing = {
            **{"presence_penalty": 0, "stop": None, "logit_bias": {}, "stream": False, "n": 1, "tools": []},
            **{"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True},
        }
        rows = self.rows(tmp_path, body | nothing, body | strange, {"prompt": "x"}, "x", {"messages": [1]})
        assert rows[0][BROKEN_ROW] is None
        assert "messages must be a list of objects" in rows[4][BROKEN_ROW]
        assert "response_format" in rows[1][BROKEN_ROW]
        assert "messages" in rows[2][BROKEN_ROW]
        assert "messages" in rows[3][BROKEN_ROW]
        write_jsonl(tmp_path / "a.jsonl", [REQUEST | {"url": "/v1/embeddings", "body": body}])
        assert "/v1/embeddings" in rows_of(tmp_path / "a.jsonl", format="openai")[0][BROKEN_ROW]

    def test_completions_without_chat(self, tmp_path: Path) -> None:
        bodies = [
            {"prompt": "a", "logprobs": 0},
            {"prompt": ["[1]"]},
            {"prompt": [5, 6]},
            {"prompt": ["a", "b"]},
            {},
        ]
        write_jsonl(
            tmp_path / "a.jsonl", [REQUEST | {"url": "/v1/completions", "body": body} for body in bodies]
        )
        rows = rows_of(tmp_path / "a.jsonl", format="openai")
        assert [row["messages"] for row in rows] == ['"a"', '"[1]"', "[5, 6]", None, None]
        assert json.loads(rows[0]["sampling_params"]) == {"logprobs": 0}
        assert ["prompt" in (row[BROKEN_ROW] or "") for row in rows] == [False, False, False, True, True]

    def test_a_custom_id_that_is_there_twice_is_noticed(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [REQUEST | {"custom_id": name, "body": {}} for name in "abcb"])
        (file,) = discover(InputConfig(path=str(tmp_path), format="openai")).files
        assert file.warnings == ('rows 1 and 3 have the same custom_id, "b"',)
        write_jsonl(tmp_path / "a.jsonl", [{"custom_id": name} for name in "abc"] + [{}, {}])
        (file,) = discover(InputConfig(path=str(tmp_path), format="openai")).files
        assert file.warnings == ()

    def test_are_pointed_out_when_read_as_plain_lines(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", [REQUEST | {"body": {"messages": []}}])
        assert "input.format" in refused(tmp_path / "a.jsonl")
        assert rows_of(tmp_path / "a.jsonl", format="jsonl")[0]["custom_id"] == "a"


class TestSplits:
    def write(self, folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / name, [{"prompt": name}])
        return folder

    def read(self, folder: Path, split: str | None = None) -> list[str]:
        return [row["prompt"] for row in rows_of(folder, split=split)]

    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train/a.jsonl", "test/a.jsonl"),
            ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
            ("questions_training.jsonl", "questions_eval.jsonl"),
        ],
    )
    def test_one_of_several_is_read_and_never_a_mixture(self, tmp_path: Path, train: str, test: str) -> None:
        self.write(tmp_path, train, test)
        assert self.read(tmp_path, "train") == [train]
        assert self.read(tmp_path, "test") == [test]
        assert self.read(tmp_path, "all") == sorted([train, test])
        assert "input.split may be" in refused(tmp_path)
        assert "has no split 'validation'" in refused(tmp_path, split="validation")

    def test_where_there_is_one_nothing_need_be_said(self, tmp_path: Path) -> None:
        plain = self.write(tmp_path / "plain", "a.jsonl", "b.jsonl")
        assert (
            self.read(plain) == self.read(plain, "train") == self.read(plain, "all") == ["a.jsonl", "b.jsonl"]
        )
        assert "has no split 'test'" in refused(plain, split="test")
        held_out = self.write(tmp_path / "held-out", "test.jsonl")
        assert self.read(held_out) == self.read(held_out, "test") == ["test.jsonl"]
        assert "has no split 'train'" in refused(held_out, split="train")
        both = self.write(tmp_path / "both", "train_test.jsonl")
        assert self.read(both) == self.read(both, "train") == self.read(both, "test")

    def test_slices_are_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"input.max_rows"):
            InputConfig(path="a", split="train[:3]")
        with pytest.raises(ValidationError, match="one split"):
            InputConfig(path="a", split="train+test")

    def test_names_mean_what_they_mean_to_datasets(self, tmp_path: Path) -> None:
        from datasets.data_files import DataFilesDict, get_data_patterns

        trees = [
            ["train.jsonl", "b.jsonl"],
            ["contest.jsonl", "trainer.jsonl"],
            ["test_dev-1.jsonl", "x.val.jsonl", "training data.jsonl"],
            [
                "data/en.train_sft-00000-of-00002.jsonl",
                "data/en.test-00000-of-00001-abc.jsonl",
                "train.jsonl",
            ],
            ["my-validation-set/x/train.jsonl", "eval/train.jsonl", "rest.jsonl"],
            ["a/data/train-00000-of-00001.jsonl", "a/data/other-00000-of-00001.jsonl"],
            ["Train.jsonl", "a/b.jsonl"],
        ]
        for index, names in enumerate(trees):
            folder = self.write(tmp_path / f"{index}", *names)
            patterns = get_data_patterns(str(folder))
            found = DataFilesDict.from_patterns(patterns, base_path=str(folder))
            theirs = {str(k): {os.path.relpath(path, folder) for path in v} for k, v in found.items()}
            ours = splits_of(names) or {"train": names}
            assert {split: set(files) for split, files in ours.items()} == theirs


class TestSavedDatasets:
    def test_folder_with_and_without_splits(self, tmp_path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        data = datasets.Dataset.from_list(texts(2500))
        data.save_to_disk(str(tmp_path / "one"), num_shards=2)
        assert [row["id"] for row in rows_of(tmp_path / "one")] == data["id"]
        datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(
            str(tmp_path / "two")
        )
        assert len(rows_of(tmp_path / "two", split="test")) == 3
        assert "train, test" in refused(tmp_path / "two", split="tset")

    def test_all_splits_and_the_one_that_is_meant(self, tmp_path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        data = datasets.Dataset.from_list(texts(3))
        folder = tmp_path / "two"
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(folder))
        assert "train, test or all" in refused(folder)
        source = discover(InputConfig(path=str(folder), split="all"))
        names = ["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"]
        assert [file.name for file in source.files] == names
        assert len(rows_of(folder, split="all")) == 6
        assert "has no split 'test'" in refused(folder / "train", split="test")
        datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "one"))
        assert len(rows_of(tmp_path / "one")) == 3

    @pytest.mark.parametrize(
        ("file", "content", "said"),
        [
            ("state.json", "{", "state.json: Invalid JSON"),
            ("state.json", "[" * 100_000, "state.json: Invalid JSON"),
            ("state.json", "\xff", "state.json"),
            ("state.json", {}, "state.json: _data_files: Field required"),
            ("state.json", {"_data_files": []}, "_data_files"),
            ("state.json", {"_data_files": "a.arrow"}, "_data_files"),
            ("state.json", {"_data_files": [{"file": "a.arrow"}]}, "_data_files.0.filename"),
            ("state.json", {"_data_files": [{"filename": 7}]}, "_data_files.0.filename"),
            ("state.json", {"_data_files": [{"filename": "a.arrow"}] * 2}, "more than once"),
            ("state.json", {"_data_files": [{"filename": "none.arrow"}]}, "none.arrow does not exist"),
            ("state.json", {"_data_files": [{"filename": "sub"}]}, "is no file"),
            *(
                ("state.json", {"_data_files": [{"filename": name}]}, f"_data_files has {name!r}")
                for name in ("../secret.arrow", "/etc/passwd", "sub/a.arrow", "..", "", "a\0", "link.arrow")
            ),
            ("dataset_dict.json", {}, "dataset_dict.json: splits: Field required"),
            ("dataset_dict.json", {"splits": {"train": 1}}, "dataset_dict.json: splits"),
            ("dataset_dict.json", {"splits": ["train"]}, "no state.json"),
            *(
                ("dataset_dict.json", {"splits": [name]}, f"splits has {name!r}")
                for name in ("../other", "/", "linked", "a\0")
            ),
        ],
    )
    def test_a_damaged_or_hostile_folder(self, tmp_path: Path, file: str, content: Any, said: str) -> None:
        """Names lead nowhere but into the folder, and what is not as `datasets` writes it is named."""
        folder = tmp_path / "saved"
        (folder / "sub").mkdir(parents=True)
        (tmp_path / "other").mkdir()
        for path in (folder / "a.arrow", folder / "sub/a.arrow", tmp_path / "secret.arrow"):
            write_arrow_stream(path, texts(1))
        (tmp_path / "other/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
        (folder / "link.arrow").symlink_to(tmp_path / "secret.arrow")
        (folder / "linked").symlink_to(tmp_path / "other")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_bytes(text.encode("latin-1"))
        told = refused(folder)
        assert said in told
        assert "\n" not in told

    def test_other_folder_is_refused(self, tmp_path: Path) -> None:
        assert "save_to_disk" in refused(tmp_path, format="datasets")


def test_a_million_rows_are_planned_from_the_footer(tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array([f"row {i}" for i in range(1_000_000)])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_000_000)
    tracemalloc.start()
    began = time.monotonic()
    source = discover(InputConfig(path=str(tmp_path / "a.parquet")))
    shards = list(plan_shards(source, 256))
    assert time.monotonic() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    before = pa.total_allocated_bytes()
    last = read_shard(shards[-1], source)
    assert last["prompt"][-1].as_py() == "row 999999"
    # A range of a large row group is streamed: what is kept is the range, not the group.
    assert pa.total_allocated_bytes() - before < 4 << 20


def test_every_configurable_format_has_a_reader() -> None:
    choices = InputConfig.model_json_schema()["properties"]["format"]["anyOf"][0]["enum"]
    assert set(choices) == set(FORMATS)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


LATE = 2 * MARK_ROWS + 500
"""A row whose value settles what its column is, after others that were looked at without it."""


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("12", "12"),
        ("12", "1.5"),
        ("12", "x"),
        ("1", "true"),
        ("5", "true"),
        ("", "7"),
        ("NA", "7"),
        ("2024-02-29", "2024-02-28"),
        ("2024-02-29", "2024-02-29 10:00:00"),
        ("2024-02-29 10:00:00", "2024-02-29 10:00:00.25"),
        ("2024-02-29T10:00:00Z", "2024-02-29T10:00:00+01:00"),
        ("10:30", "x"),
        ("", ""),
    ],
)
def test_csv_columns_are_what_pyarrow_takes_the_whole_file_for(tmp_path: Path, early: str, late: str) -> None:
    values = [early] * LATE + [late]
    write_csv(tmp_path / "a.csv", [{"prompt": "x", "value": value} for value in values])
    whole = pa_csv.read_csv(
        tmp_path / "a.csv", convert_options=pa_csv.ConvertOptions(strings_can_be_null=False)
    )
    expected = whole["value"]
    if pa.types.is_timestamp(expected.type):  # which Parquet holds no seconds of
        expected = expected.cast(pa.timestamp("us" if "." in late else "ms", expected.type.tz))
    elif not early and pa.types.is_string(expected.type):
        expected = pa.chunked_array([[value or None for value in values]])
    assert columns_of(tmp_path / "a.csv")["value"] == expected


def columns_of(path: Path, **config: Any) -> pa.Table:
    """An input as a table, read in shards that line up with nothing."""
    source = discover(InputConfig(path=str(path), **config))
    return pa.concat_tables([read_shard(shard, source) for shard in plan_shards(source, 700)])


@pytest.mark.parametrize(
    "values", [["007", "12"], ["12345678901234567890", "1"], ["0x1f", "1"], ["NA", "NA"]]
)
def test_csv_keeps_what_only_looks_like_a_number(tmp_path: Path, values: list[str]) -> None:
    write_csv(tmp_path / "a.csv", [{"prompt": "1", "value": value} for value in values])
    assert columns_of(tmp_path / "a.csv").drop_columns([BROKEN_ROW]).to_pydict() == {
        "prompt": ["1", "1"],  # and a prompt is text
        "value": values,
    }


def test_csv_files_that_differ_in_a_column_and_columns_that_stay_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"q": "1", "a": "1", "b": "1", "c": ""}])
    write_csv(tmp_path / "b.csv", [{"q": "2", "a": "x", "b": "1.5", "c": "3"}])
    table = columns_of(tmp_path, rename={"q": "ask"}, text_columns=["ask"]).drop_columns([BROKEN_ROW])
    assert table.to_pydict() == {"ask": ["1", "2"], "a": ["1", "x"], "b": [1.0, 1.5], "c": [None, 3]}
    table = columns_of(tmp_path, text_columns="all").drop_columns([BROKEN_ROW])
    assert table.to_pydict() == {"q": ["1", "2"], "a": ["1", "x"], "b": ["1", "1.5"], "c": ["", "3"]}
    assert "'nosuch'" in refused(tmp_path, text_columns=["nosuch"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_csv_delimiter_and_encoding_are_found_or_named(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [{"id": i, "prompt": f"Größe {i}; a, b|c", "no": 'a "quote"\nand a line'} for i in range(5)]
    write_csv(tmp_path / "a.csv", rows, delimiter=delimiter, encoding=encoding)
    if encoding == "latin-1":
        assert "line 2 is not UTF-8; name the encoding" in refused(tmp_path / "a.csv")
    named = {"encoding": encoding} if encoding == "latin-1" else {}
    read = [row | {BROKEN_ROW: None} for row in rows]
    assert rows_of(tmp_path / "a.csv", shard_rows=2, **named) == read
    assert rows_of(tmp_path / "a.csv", shard_rows=2, encoding=encoding, delimiter=delimiter) == read


def test_keys_of_text_are_refused_elsewhere(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", texts(1))
    assert "input.encoding" in refused(tmp_path / "a.parquet", encoding="latin-1")
    assert "input.delimiter" in refused(tmp_path / "a.parquet", delimiter=";")
    write_csv(tmp_path / "a.csv", texts(1), encoding="utf-16-le")
    assert "begins with a NUL" in refused(tmp_path / "a.csv")
    for wrong in ({"encoding": "nosuch"}, {"encoding": "base64"}, {"delimiter": ";;"}, {"delimiter": '"'}):
        with pytest.raises(ValidationError):
            InputConfig(path="a.csv", **wrong)


class TestJson:
    def test_elements_over_many_reads_and_shards(self, tmp_path: Path) -> None:
        """Strings that hold brackets, quotes and commas, and are longer than what is read at once."""
        rows: Rows = [{"id": i, "prompt": f'"]}},\\ {i} ' + "[{é" * (i * 4000 % 9001)} for i in range(1010)]
        (tmp_path / "a.json").write_text(f" \n{json.dumps(rows, ensure_ascii=False)}\n")
        assert (tmp_path / "a.json").stat().st_size > 8 * BUFFER
        assert rows_of(tmp_path / "a.json") == [row | {BROKEN_ROW: None} for row in rows]

    def test_lines(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.json", texts(3))
        assert rows_of(tmp_path / "a.json") == [row | {BROKEN_ROW: None} for row in texts(3)]

    def test_bad_elements_are_bad_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(b'[{"a": "x"}, 7, {"a": "\xff"}, {"a": tru}, {"a": "y"}]')
        assert [bool(row[BROKEN_ROW]) for row in rows_of(tmp_path / "a.json")] == [
            False,
            True,
            True,
            True,
            False,
        ]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('[{"a": 1}, {"a": 2}', "cut off"),
            ('[{"a": 1}] [{"a": 2}]', "goes on"),
            ('[{"a": "' + "x" * MAX_LINE + '"}]', "has more than"),
            ('{\n "data": [{"a": 1}]\n}', "neither a list of objects nor one object a line"),
            ("[]", "no rows"),
        ],
    )
    def test_what_is_no_list_is_refused(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "a.json").write_text(text)
        assert said in refused(tmp_path / "a.json")


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.csv.zst"):
        WRITERS[name](tmp_path / name, texts(MARK_ROWS))
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-40])
        assert name in refused(tmp_path / name)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b""))
    assert "cannot tell the format of a.parquet.gz" in refused(tmp_path / "a.parquet.gz")


def test_folders_named_for_a_value_are_columns(tmp_path: Path) -> None:
    for language, year in (("de", 2024), ("a%2Fb", 2025), ("__HIVE_DEFAULT_PARTITION__", 2025)):
        folder = tmp_path / f"lang={language}" / f"year={year}"
        folder.mkdir(parents=True)
        write_parquet(folder / "part.parquet", [{"prompt": language}])
    found = [(row["lang"], row["year"]) for row in rows_of(tmp_path)]
    assert found == [(None, 2025), ("a/b", 2025), ("de", 2024)]  # by the names' order
    assert rows_of(f"{tmp_path}/lang=d*/**", rename={"lang": "language"})[0]["language"] == "de"
    assert set(rows_of(tmp_path, partitions=False)[0]) == {"prompt", BROKEN_ROW}
    write_parquet(folder / "part.parquet", [{"prompt": "x", "lang": "its own"}])
    assert rows_of(folder.parent.parent)[0]["lang"] == "its own"


def test_names_with_brackets_are_names(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    write_jsonl(folder / "a[1].jsonl", [{"prompt": "brackets"}])
    write_jsonl(folder / "a1.jsonl", [{"prompt": "one"}])
    assert [row["prompt"] for row in rows_of(folder / "a[1].jsonl")] == ["brackets"]
    assert [row["prompt"] for row in rows_of(folder / "a[12].jsonl")] == ["one"]
    assert len(rows_of(folder)) == len(rows_of(f"{folder}/a*.jsonl")) == 2


@pytest.mark.parametrize(
    ("path", "file", "covered"),
    [
        ("in", "in/out/data/a.jsonl", True),
        ("./in/", "in/../in/a.jsonl", True),
        (".", "out/data/a.jsonl", True),
        ("in", "in2/a.jsonl", False),
        ("in", "in/.out/a.jsonl", False),
        ("in/*.jsonl", "in/out/a.jsonl", False),
        ("in/**/*.jsonl", "in/out/a.jsonl", True),
        ("in/**/*.jsonl", "in/out/a.parquet", False),
    ],
)
def test_a_path_covers_what_will_lie_there(path: str, file: str, covered: bool) -> None:
    assert covers(path, file) == covered


@pytest.mark.parametrize("name", WRITERS)
def test_s3(tmp_path: Path, bucket: str, name: str) -> None:
    rows = texts(MARK_ROWS + 10)
    WRITERS[name](tmp_path / name, rows)
    root = f"{bucket}/{name}-folder"
    fs.copy_files(str(tmp_path), f"{bucket.removeprefix('s3://')}/{name}-folder", destination_filesystem=s3())
    expected = as_read(name, rows)
    for path in (f"{root}/{name}", f"{root}/*.{name[2:]}", root, f"{root}/"):
        assert [file.name for file in discover(InputConfig(path=path)).files] == [name]
    assert rows_of(f"{root}/{name}") == expected
    assert covers(root, f"{root}/out/{name}")
    assert not covers(root, f"{root}2/{name}")
    assert not covers(root, str(tmp_path / name))
    assert f"did you mean {name}?" in refused(f"{root}/{name}x")


def s3() -> fs.FileSystem:
    from rayskip.data.locate import filesystem

    return filesystem("s3://any")[0]


def test_s3_bucket_that_does_not_exist(bucket: str) -> None:
    assert "no-such-bucket" in refused("s3://no-such-bucket/a.jsonl")


def test_columns_are_renamed_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n')
    source = discover(InputConfig(path=str(tmp_path / "a.jsonl"), rename={"text": "source"}))
    assert source.columns == ["source", "id"]
    (shard,) = plan_shards(source, 8)
    assert read_shard(shard, source).drop_columns([BROKEN_ROW]).to_pylist() == [{"source": "x", "id": 1}]


@pytest.mark.parametrize(("rename", "said"), [({"txt": "a"}, "'txt'"), ({"text": "id"}, "two columns")])
def test_a_rename_that_cannot_be_is_refused(rename: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n')
    with pytest.raises(InputError, match=said):
        discover(InputConfig(path=str(tmp_path / "a.jsonl"), rename=rename))
