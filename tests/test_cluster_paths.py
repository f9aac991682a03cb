"""A job's paths on a cluster, where replicas work in other directories and submitted files are copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayskip.cluster.paths import absolute, check_output
from rayskip.config import JobConfig
from rayskip.errors import OutputError
from rayskip.job import run


def job(**sections: object) -> JobConfig:
    first = {"name": "j", "input": {"path": "in.jsonl"}, "model": {"path": "m"}, "output": {"path": "out"}}
    return JobConfig.model_validate(first | sections)


def test_local_paths_are_made_absolute_and_names_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "lora", "corpus.txt", "heads", "smollm2-135m-instruct", "in.jsonl"):
        Path(name).touch()
    assert absolute(job()) == job(
        model={"path": f"{tmp_path}/m"},
        input={"path": f"{tmp_path}/in.jsonl"},
        output={"path": f"{tmp_path}/out"},
    )
    free = job(input={"path": "s3://in", "chat_template_kwargs": {"path": 1, "corpus": "corpus.txt"}})
    assert absolute(free).input == free.input
    drafting = job(
        model={"path": "smollm2-135m-instruct", "adapter": "lora"},
        decode={"draft": {"kind": "draft_model", "model": {"path": "owner/name"}}},
        output={"path": "s3://bucket/out"},
    )
    assert absolute(drafting).decode == drafting.decode
    assert absolute(drafting).output == drafting.output
    assert absolute(drafting).model.path == "smollm2-135m-instruct"
    assert absolute(drafting).model.adapter == f"{tmp_path}/lora"
    for kind, key, name in (("retrieval", "corpus", "corpus.txt"), ("medusa", "path", "heads")):
        found = absolute(job(decode={"draft": {"kind": kind, key: name}})).decode.draft
        assert getattr(found, key) == f"{tmp_path}/{name}"


def test_a_submitted_job_may_not_write_where_ray_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(OutputError, match=r"output\.path: out would be among the files that the job brought"):
        run(job())
    assert not list(copy.iterdir())
    check_output(str(tmp_path / "out"))
    check_output("s3://bucket/out")
