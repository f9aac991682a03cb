"""The package as Python sees it: its names, the README's examples, jobs by `run`, what an engine takes as a prompt.

`make check` types this file too, so the public names are typed as a caller meets them.
"""

from __future__ import annotations

import array
import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import rayskip
from rayskip import Engine, Generation, SamplingParams, errors
from rayskip.config.file import load_config

ROOT = Path(__file__).parent.parent
TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.load(
        smollm2, {"max_batch_rows": 4, "max_model_len": 64}, {"draft": {"kind": "none"}}, "cpu"
    )


def tokens(found: list[list[Generation]]) -> list[list[int] | None]:
    return [sample.token_ids for samples in found for sample in samples]


def test_the_readmes_examples_run_in_a_thread_with_an_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a notebook, where a loop runs, and where Python lets no signal handlers be set."""
    monkeypatch.chdir(tmp_path)
    lighter = {
        "input.path": ROOT / "configs/data/quickstart.jsonl",
        "sampling.max_tokens": 8,
        "engine.max_batch_rows": 8,
        "decode": {},
    }
    quickstart = load_config(ROOT / "configs/quickstart.yaml", lighter)
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text(quickstart.model_dump_json())  # JSON is YAML
    Path("out").mkdir()
    Path("out/quickstart").symlink_to("first")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    blocks.sort(key=lambda block: "rayskip.run(" not in block)  # the others read what it wrote
    names: dict[str, Any] = {}

    async def notebook() -> None:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, notebook()).result()
    shown = capfd.readouterr()
    report = names["report"]
    assert isinstance(report, rayskip.Report)
    assert report.rows == 8
    assert f"8 {report.completion_tok_s}" in shown.out
    assert "8/8" in shown.err
    assert "2/2" in shown.err
    assert rayskip.run(quickstart, ["input.max_rows=8", "output.path=out/first"]) == report


def test_what_is_wrong_with_a_job_is_an_exception(tmp_path: Path) -> None:
    job = {
        "name": "wrong",
        "model": {"path": tmp_path},
        "input": {"path": "no.jsonl"},
        "output": {"path": "o"},
    }
    with pytest.raises(errors.InputError, match=r"no\.jsonl"):
        rayskip.run(job)
    with pytest.raises(errors.ConfigError, match=r'^unknown key "input\.pth"; did you mean "path"'):
        rayskip.run(job, {"input.pth": "x"})
    with pytest.raises(errors.ConfigError, match=r"^no\.yaml: no such file"):
        rayskip.run("no.yaml")
    with pytest.raises(
        TypeError, match="a JobConfig, a dict or a path of a YAML file is wanted, not NoneType"
    ):
        rayskip.run(None)  # type: ignore[arg-type]


def test_sections_of_an_engine_are_checked_before_a_model_is_looked_for() -> None:
    with pytest.raises(errors.ConfigError, match=r'^engine: unknown key "max_batch_row"; did you mean'):
        Engine.load("nowhere", {"max_batch_row": 4})
    with pytest.raises(errors.ConfigError, match=r'^decode: "draft\.kind" is "autp"; did you mean "auto"'):
        Engine.load("nowhere", decode={"draft": {"kind": "autp"}})
    with pytest.raises(errors.ConfigError, match=r'^model: missing key "path"'):
        Engine.load({"dtype": "float32"})
    for device in ("gpu", "cpu:x", "cuda:99"):
        with pytest.raises(errors.ConfigError, match=rf"^device: .*'{device}'"):
            Engine.load("smollm2-135m-instruct", device=device)
    with pytest.raises(TypeError, match="model: a ModelConfig or a dict is wanted, not int"):
        Engine.load(3)  # type: ignore[arg-type]


def test_token_ids_come_in_many_types(engine: Engine) -> None:
    assert engine.tokenizer is not None
    ids: list[int] = engine.tokenizer.encode(TEXT)
    params = SamplingParams(max_tokens=4)
    (expected,) = tokens(engine.generate([TEXT], params))
    same: list[Any] = [
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, dtype=np.uint16),
        torch.tensor(ids),
        array.array("i", ids),
        [np.int64(ids[0]), torch.tensor(ids[1]), *ids[2:]],
        np.str_(TEXT),
    ]
    assert tokens(engine.generate(same, {"max_tokens": np.int64(4)})) == [expected] * len(same)
    assert tokens(engine.generate(np.array([ids, ids]), params)) == [expected] * 2
    engine.add(np.array(ids), MappingProxyType({"max_tokens": 4}))
    assert tokens([done.generations for done in engine.run()]) == [expected]


def test_messages_are_dicts_and_may_have_parts(engine: Engine) -> None:
    whole = [{"role": "user", "content": "Name a river."}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river."}]}
    ]
    read_only: list[Mapping[str, object]] = [MappingProxyType(whole[0])]
    first, *others = tokens(engine.generate([whole, parts, read_only], {"max_tokens": 3}))
    assert others == [first, first]


class Message:
    """As client libraries have them."""

    role, content = "user", "Name a river."


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b"bytes", "prompt 1 is bytes; a prompt is a text, a list of token ids or"),
        (bytearray(b"x"), "prompt 1 is bytearray;"),
        (None, "prompt 1 is NoneType;"),
        (7, "prompt 1 is int;"),
        (np.int64(7), r"prompt 1 is numpy\.int64;"),
        ({"role": "user"}, "prompt 1 is dict;"),
        (["a text", "another"], "prompt 1: item 0 is str, neither a token id nor a message"),
        ([5, None], "prompt 1: item 1 is NoneType"),
        ([True, False], "prompt 1: item 0 is bool"),
        ([1.0], "prompt 1: item 0 is float"),
        (np.array([1.0]), "prompt 1: item 0 is float"),
        (np.array([True]), "prompt 1: item 0 is bool"),
        ([torch.tensor(True)], r"prompt 1: item 0 is torch\.Tensor"),
        (torch.tensor([[1, 2]]), "prompt 1: item 0 is list"),
        ([Message()], r"prompt 1: item 0 is .*\.Message"),
        ([{"role": "system", "content": "Be brief."}, Message()], r"prompt 1: message 1 is .*\.Message"),
    ],
)
def test_what_is_no_prompt_is_a_type_error_before_anything_runs(
    engine: Engine, wrong: Any, said: str
) -> None:
    with pytest.raises(TypeError, match=f"^{said}"):
        engine.generate([TEXT, wrong])
    assert not engine.has_work


def test_one_prompt_is_no_list_of_prompts(engine: Engine) -> None:
    singles: list[Any] = [TEXT, b"bytes", {"role": "user"}, 7]
    for single in singles:
        with pytest.raises(TypeError, match=r"^a list of prompts is wanted, not "):
            engine.generate(single)


def test_a_table_is_no_list_of_prompts(engine: Engine) -> None:
    """Python goes through it by the names of its columns, which would be answered."""
    columns = {"prompt": [TEXT], "n": [1]}
    tables: list[Any] = [
        pd.DataFrame(columns),
        pl.DataFrame(columns),
        pa.table(columns),
        datasets.Dataset.from_dict(columns),
        columns,
    ]
    for table in tables:
        with pytest.raises(TypeError, match=r"^a list of prompts is wanted, not .*rayskip\.run"):
            engine.generate(table)
    for column in (pd.Series([TEXT]), pl.Series([TEXT]), datasets.Dataset.from_dict(columns)["prompt"]):
        ((one,),) = engine.generate(column, {"max_tokens": 1})
        assert one.error_type is None


def test_bad_prompts_are_error_rows_and_cost_the_others_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    bad: dict[str, Any] = {
        "empty_prompt": [],
        "prompt_too_long": [5] * 64,
        "bad_token_id": np.array([5, -1]),
        "bad_messages": [{"role": "user"}],
        "invalid_utf8": "\ud800",
    }
    (expected,) = tokens(engine.generate([TEXT], {"max_tokens": 2}))
    *failed, good = engine.generate([*bad.values(), TEXT], {"max_tokens": 2, "n": 2})
    assert [[row.error_type for row in rows] for rows in failed] == [[kind] * 2 for kind in bad]
    assert [[row.row_index for row in rows] for rows in failed] == [[place] * 2 for place in range(len(bad))]
    assert all(row.error_message and row.finish_reason == "error" for rows in failed for row in rows)
    assert tokens([good]) == [expected] * 2
    (warning,) = caplog.messages
    assert warning.startswith("5 of 6 prompts cannot run; the first is prompt 0: the prompt has no tokens")


def test_parameters_may_differ_from_prompt_to_prompt(engine: Engine) -> None:
    found = engine.generate((TEXT for _ in range(2)), [{"max_tokens": 1}, SamplingParams(max_tokens=3)])
    assert [samples[0].completion_tokens for samples in found] == [1, 3]
    with pytest.raises(errors.ConfigError, match=r'^params\[1\]: unknown key "max_token"; did you mean'):
        engine.generate([TEXT] * 2, [{}, {"max_token": 3}])
    with pytest.raises(errors.ConfigError, match=r'^params: "temperature" should be'):
        engine.generate([TEXT], {"temperature": "hot"})
    with pytest.raises(TypeError, match=r"^params\[0\]: a SamplingParams or a dict is wanted, not NoneType"):
        engine.generate([TEXT], [None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 prompts and 1 sampling params"):
        engine.generate([TEXT] * 2, [{}])
    assert not engine.has_work


def test_a_bar_is_shown_when_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([TEXT, []], {"max_tokens": 1})
    assert capsys.readouterr().err == ""
    engine.generate([TEXT, [], TEXT], {"max_tokens": 1}, progress=True)
    assert "3/3" in capsys.readouterr().err
