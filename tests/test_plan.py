"""What a plan says of how the input is read, and warns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayskip.config.file import load_config
from rayskip.driver.plan import make_plan
from rayskip.dry_run import dry_run, format_dry_run

RENDERED = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text("{name: j, model: {path: smollm2-135m-instruct}, input: {path: in}, output: {path: out}}")
    return file


def rows(path: Path, *found: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def said(job: Path, *overrides: str) -> str:
    return format_dry_run(dry_run(load_config(job, overrides)))


def warnings(job: Path, *overrides: str) -> tuple[str, ...]:
    return make_plan(load_config(job, overrides)).warnings


def test_how_csv_is_read_is_told(job: Path) -> None:
    (job.parent / "in").mkdir()
    (job.parent / "in/a.csv").write_text(
        "id;prompt;zip;when\n1;a;007;2024-02-29\n2;b;12;\n", encoding="utf-16"
    )
    text = said(job)
    assert "columns: id (int64), prompt (string), zip (string), when (date32[day])" in text
    assert "a.csv: fields between ';'" in text
    assert "a.csv: text in utf-16" in text


def test_prompts_that_were_rendered_before_are_warned_of(job: Path) -> None:
    rows(job.parent / "in/a.jsonl", {"prompt": "plain"}, {"prompt": RENDERED}, {"prompt": None})
    (warning,) = warnings(job)
    assert "1 of the first 3 prompts" in warning
    assert "input.special_tokens: true" in warning
    assert f"warning: {warning}" in said(job)
    assert warnings(job, "input.special_tokens=true") == ()
    (warning,) = warnings(job, "input.chat=true")
    assert "without input.chat" in warning
    rows(job.parent / "in/a.jsonl", {"prompt": "a < b"})
    assert warnings(job) == ()


def test_what_a_text_ends_before_is_shown_and_an_escape_that_is_none_warned_of(job: Path) -> None:
    rows(job.parent / "in/a.jsonl", {"prompt": "a"})
    (warning,) = warnings(job, r"sampling.stop=\n")
    assert r"""--set 'sampling.stop="\n"'""" in warning
    assert warnings(job, r'sampling.stop="\n"') == ()
    text = said(job, r'sampling={stop: ["\n", "<|im_end|>"], stop_token_ids: [7]}')
    assert r"a text ends before '\n', '<|im_end|>', token 7" in text


def test_messages_that_are_continued_are_counted(job: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The label is:"}]
    rows(job.parent / "in/a.jsonl", {"messages": chat}, {"messages": chat[:1]})
    text = said(job)
    assert "<|im_start|>assistant\nThe label is:\n" in text
    assert "1 row with the assistant's message last, which is continued" in text
    assert "is continued" not in said(job, "input.continue_final_message=false")


def test_paths_may_begin_at_home(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(job.parent))
    config = load_config(job, ["input.path=~/in", "output.path=~/out", "model.path=~/model"])
    paths = (config.input.path, config.output.path, config.model.path)
    assert paths == tuple(f"{job.parent}/{name}" for name in ("in", "out", "model"))
