"""Output rows: one schema, every input row kept, the same bytes each time, and readable in every format."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayskip.config import JobConfig
from rayskip.data.output import (
    SUFFIXES,
    choose_prefix,
    count_rows,
    encode,
    output_columns,
    output_table,
    read_outcomes,
    read_output,
    read_rows,
)
from rayskip.data.records import BROKEN_ROW, Generation, Shard, TokenLogprob
from rayskip.errors import InputError


def job(**sections: Any) -> JobConfig:
    base: dict[str, Any] = {"input": {"path": "in"}, "output": {"path": "out"}, "sampling": {}}
    merged = {name: base[name] | sections.get(name, {}) for name in base}
    return JobConfig.model_validate({"name": "j", "model": {"path": "m"}} | merged)


def good(row: int, sample: int = 0, **fields: Any) -> Generation:
    return Generation(row, sample, "stop", "text", [1, 2], prompt_tokens=3, completion_tokens=2, **fields)


def bad(row: int, sample: int = 0) -> Generation:
    return Generation(row, sample, "error", error_type="null_prompt", error_message="column 'q' is null")


def shard(start: int, stop: int) -> Shard:
    return Shard(4, "/data/in/a.jsonl", "a.jsonl", start, stop)


TABLE = pa.table({"id": ["x", "y"], "q": ["hi", None]})
ROWS = [good(10, 0), good(10, 1), bad(11, 0), bad(11, 1)]


def table(config: JobConfig | None = None, rows: list[Generation] = ROWS, data: pa.Table = TABLE) -> pa.Table:
    return output_table(data, rows, shard(10, 12), config or job())


def test_every_row_keeps_its_columns_per_sample() -> None:
    made = table()
    assert made.column_names == ["id", "q", *output_columns(job())]
    assert made["id"].to_pylist() == ["x", "x", "y", "y"]
    assert made.select(["row_file", "row_index", "sample_index", "error_type"]).to_pylist()[3] == {
        "row_file": "a.jsonl",
        "row_index": 11,
        "sample_index": 1,
        "error_type": "null_prompt",
    }


def test_schema_does_not_depend_on_the_rows() -> None:
    config = job(output={"token_ids": True}, sampling={"logprobs": 1})
    logprobs = [TokenLogprob(1, -0.5, [(1, -0.5)]), TokenLogprob(2, -1.0)]
    full = table(config, [good(10, logprobs=logprobs), good(11, logprobs=[])])
    empty = table(config, [bad(10), bad(11)])
    assert full.schema.equals(empty.schema, check_metadata=True)
    assert all(field.nullable for field in full.schema)
    assert full["logprobs"][0].as_py()[0] == {
        "token_id": 1,
        "logprob": -0.5,
        "top": [{"token_id": 1, "logprob": -0.5}],
    }


def test_optional_columns_are_there_when_a_row_may_ask() -> None:
    assert not {"token_ids", "logprobs"} & set(output_columns(job()))
    assert "token_ids" in output_columns(job(output={"token_ids": True}))
    assert "logprobs" in output_columns(job(input={"sampling_params": "s"}))


def test_reason_of_a_broken_row_is_no_column() -> None:
    data = TABLE.append_column(BROKEN_ROW, pa.array([None, "not JSON"]))
    assert table(data=data).equals(table())


def test_error_message_may_quote_what_is_no_utf8() -> None:
    failed = Generation(10, 0, "error", error_type="invalid_sampling_params", error_message="\ud800: no key")
    assert table(rows=[failed, bad(11)])["error_message"][0].as_py() == "\\ud800: no key"


def test_a_lost_row_is_a_defect() -> None:
    with pytest.raises(ValueError, match="rows 10 to 12"):
        table(rows=[good(10)])


def test_names_that_the_input_has_are_given_a_prefix_all_together() -> None:
    assert choose_prefix(job(), ["id", "token_ids"]) == ""
    assert choose_prefix(job(), ["id", "text"]) == "generated_"
    assert choose_prefix(job(), ["text", "generated_row_file"]) == "generated2_"
    assert choose_prefix(job(output={"format": "openai"}), ["text"]) == ""
    assert choose_prefix(job(output={"prefix": "a_"}), ["text"]) == "a_"
    with pytest.raises(InputError, match=r"a column 'a_text', and output\.prefix 'a_'"):
        choose_prefix(job(output={"prefix": "a_"}), ["a_text"])
    with pytest.raises(InputError, match=r"a column 'text', and output\.prefix ''"):
        choose_prefix(job(output={"prefix": ""}), ["text"])


@pytest.mark.parametrize("wrong", [{"prefix": "a b"}, {"prefix": "a_", "format": "openai"}])
def test_a_prefix_that_cannot_be_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="prefix"):
        job(output=wrong)


@pytest.mark.parametrize("format", SUFFIXES)
def test_same_rows_give_the_same_bytes_however_chunked(format: str) -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    assert encode(format, table()) == encode(format, table(data=chunked))


@pytest.mark.parametrize("format", SUFFIXES)
@given(samples=st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=6), text=st.text())
def test_identities_are_read_back(format: str, samples: list[tuple[int, bool]], text: str) -> None:
    """Also when the data holds line separators, quotes and NULs."""
    rows = [
        good(row, sample) if fine else bad(row, sample)
        for row, (count, fine) in enumerate(samples)
        for sample in range(count)
    ]
    texts = pa.array([text] * len(samples), pa.string())
    data = pa.table({"q": texts, "text": texts, "row_index": texts, "error_type": texts})
    prefix = "" if format == "openai" else "a_"
    made = output_table(data, rows, shard(0, len(samples)), job(output={"format": format, "prefix": prefix}))
    encoded = encode(format, made)
    identities = [("a.jsonl", row.row_index, row.sample_index) for row in rows]
    failures = [row.error_type is not None for row in rows]
    told = [(*identity, fails) for identity, fails in zip(identities, failures, strict=True)]
    assert read_outcomes(encoded, format, prefix) == told
    shown = list(read_rows(encoded, format, prefix))
    assert [(row.row_file, row.row_index, row.sample_index) for row in shown] == identities
    if format != "openai":  # which fails a row as a whole
        assert [(row.text, row.finish_reason, row.error_type, row.error_message) for row in shown] == [
            (row.text, row.finish_reason, row.error_type, row.error_message) for row in rows
        ]
        assert all(
            row.columns == dict.fromkeys(["q", "text", "row_index", "error_type"], text) for row in shown
        )
    counts = (len(rows), sum(failures), sum(not fine for _, fine in samples))
    if rows:
        assert count_rows(encoded, format, prefix, shard(0, len(samples))) == counts
    if rows and format != "openai":
        assert read_output(format, [encoded])["q"].to_pylist() == [text] * len(rows)


def test_parquet_is_read_back_whole() -> None:
    assert read_output("parquet", [encode("parquet", table())] * 2).equals(pa.concat_tables([table()] * 2))


def test_jsonl_writes_values_json_cannot_hold() -> None:
    day = datetime.date(2026, 1, 2)
    data = pa.table({"f": [float("nan"), 1.5], "b": [b"\xff", None], "d": [day, None]})
    first, second = map(json.loads, encode("jsonl", table(rows=[good(10), bad(11)], data=data)).splitlines())
    assert (first["f"], first["b"], first["d"]) == (None, "/w==", "2026-01-02")
    assert second["text"] is None
    assert first.keys() == second.keys()


def test_openai_lines() -> None:
    data = pa.table({"custom_id": ["one", "two"]})
    config = job(sampling={"logprobs": 1})
    rows = [good(10, 0, logprobs=[TokenLogprob(7, -0.5, [(8, -1.0)])]), good(10, 1), bad(11)]
    first, second = map(json.loads, encode("openai", table(config, rows, data)).splitlines())
    assert (first["custom_id"], first["error"], first["response"]["status_code"]) == ("one", None, 200)
    body = first["response"]["body"]
    assert body["model"] == "m"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "text"}
    assert body["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:7"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    shown = list(read_rows(encode("openai", table(config, rows, data)), "openai", ""))
    assert [(row.columns["custom_id"], row.row_index, row.sample_index, row.text) for row in shown] == [
        ("one", 10, 0, "text"),
        ("one", 10, 1, "text"),
        ("two", 11, 0, None),
    ]
    assert [(row.finish_reason, row.error_type) for row in shown[1:]] == [
        ("stop", None),
        ("error", "null_prompt"),
    ]
    assert second["response"] is None
    assert second["custom_id"] == "two"
    assert second["error"] == {"code": "null_prompt", "message": "column 'q' is null"}


def test_openai_lines_have_tokens_as_text_and_the_jobs_time() -> None:
    """And a completion without chat is a text completion."""
    pieces = {7: b"Gr", 8: "ü".encode()[:1], 9: b"\xbc\xc3\x9f"}
    logprobs = [TokenLogprob(7, -0.5, [(7, -0.5), (8, -1.0)]), TokenLogprob(9, -2.0, [(9, -2.0)])]
    config = job(sampling={"logprobs": 1}, output={"format": "openai"})
    rows = [good(10, logprobs=logprobs), good(11, logprobs=logprobs)]
    data = pa.table({"custom_id": ["a", "b"], "url": ["/v1/chat/completions", "/v1/completions"]})
    made = output_table(data, rows, replace(shard(10, 12), begun=1_700_000_000), config)
    written = encode("openai", made, pieces.__getitem__)
    assert [row.text for row in read_rows(written, "openai", "")] == ["text", "text"]
    lines = [json.loads(line) for line in written.splitlines()]
    chat, text = (line["response"]["body"] for line in lines)
    assert chat["created"] == text["created"] == 1_700_000_000
    assert (chat["object"], text["object"]) == ("chat.completion", "text_completion")
    assert chat["choices"][0]["logprobs"]["content"][0] == {
        "token": "Gr",
        "bytes": [71, 114],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "Gr", "bytes": [71, 114], "logprob": -0.5},
            {"token": "\ufffd", "bytes": [195], "logprob": -1.0},
        ],
    }
    assert text["choices"][0]["text"] == "text"
    assert text["choices"][0]["logprobs"] == {
        "tokens": ["Gr", "\ufffdß"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"Gr": -0.5, "\ufffd": -1.0}, {"\ufffdß": -2.0}],
        "text_offset": [0, 2],
    }


def test_openai_lines_without_custom_id_are_named_by_row() -> None:
    assert json.loads(encode("openai", table()).splitlines()[0])["custom_id"] == "a.jsonl:10"
