"""Output folders over time: written by an earlier version, by a later one, under another name, on another day.

`fixtures/folders_0.1.0` was written by the code of commit a401cbd: a job that finished and one that was killed with
one of its three shards committed, with their model, input and config.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from transformers import AutoTokenizer

from rayskip.cluster.local_pool import LocalPool
from rayskip.cluster.replica import Replica
from rayskip.config import InputConfig, JobConfig
from rayskip.config.file import load_config
from rayskip.data.sources import InputFile, Source, discover
from rayskip.driver.identity import as_begun
from rayskip.driver.loop import run_job
from rayskip.driver.plan import choose_shard_rows
from rayskip.driver.progress import Progress
from rayskip.driver.records import VERSION, CommitRecord, JobRecord
from rayskip.driver.report import Report
from rayskip.driver.show import show
from rayskip.driver.status import finished_job, status
from rayskip.driver.verify import verify
from rayskip.dry_run import dry_run, format_dry_run
from rayskip.engine import Engine
from rayskip.errors import ConfigError, InputError, OutputError, RayskipError
from rayskip.preview import preview
from rayskip.view import format_rows, format_status

FIXTURE = Path(__file__).parent / "fixtures/folders_0.1.0"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture as current directory; git keeps no times, and the input's is part of its identity."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURE, folder)
    os.utime(folder / "rows.jsonl", ns=(1_700_000_000 * 10**9,) * 2)
    monkeypatch.chdir(folder)
    return folder


def _pool(job: JobConfig, source: Source) -> LocalPool:
    return LocalPool(lambda: Replica(job, source))


def _run(config: str, *overrides: str, **options: Any) -> Report:
    return run_job(load_config(config, overrides), _pool, **options)


def _rows(out: Path) -> list[dict[str, Any]]:
    records = out / ".rayskip" if (out / ".rayskip").exists() else out
    manifest = json.loads((records / "manifest.json").read_text())
    files = [(out / file["path"]).read_text() for file in manifest["files"]]
    return [json.loads(line) for text in files for line in text.splitlines()]


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _edit_config(out: Path, section: str, **values: Any) -> None:
    config = json.loads((out / "job.json").read_text())["config"]
    _edit(out / "job.json", config=config | {section: config[section] | values})


def test_a_folder_of_an_earlier_version_is_finished(old: Path) -> None:
    assert status("finished").finished
    assert verify("finished").rows == 6
    report = _run("job.yaml")
    assert (report.completion_tokens, report.rayskip) == (70, None)


def test_a_folder_of_an_earlier_version_is_resumed_with_its_tokens(old: Path) -> None:
    committed = (old / "unfinished/_commits/shard-00001.json").read_bytes()
    now = status("unfinished")
    assert (now.finished, now.shards, now.shards_total, now.completion_tokens) == (False, 1, 3, 24)
    with pytest.raises(OutputError, match="not finished"):
        verify("unfinished")
    report = _run("job.yaml", "output.path=unfinished")
    assert (report.shards_resumed, report.shards, report.rows) == (1, 3, 6)
    assert (old / "unfinished/_commits/shard-00001.json").read_bytes() == committed
    assert verify("unfinished").rows == 6
    assert len(list((old / "unfinished/data").iterdir())) == 3
    assert _rows(old / "unfinished") == _rows(old / "finished")


def test_a_job_keeps_the_shards_it_began_with(old: Path) -> None:
    """Also where it leaves their size open, and another number of replicas would choose another."""
    anew = ("output.shard_rows=null", "output.path=new")
    assert choose_shard_rows(load_config("job.yaml", anew), discover(load_config("job.yaml").input)) == 6
    assert _run("job.yaml", *anew, "cluster.replicas=3").shards == 3
    for gone in ("manifest.json", "commits/shard-00001.json"):
        (old / "new/.rayskip" / gone).unlink()
    assert "6 rows in 3 shards, 2 committed" in format_dry_run(dry_run(load_config("job.yaml", anew)))
    assert _run("job.yaml", *anew).shards_resumed == 2
    assert _rows(old / "new") == _rows(old / "finished")
    for gone in ("job.json", "manifest.json", "commits/shard-00002.json"):
        (old / "new/.rayskip" / gone).unlink()
    assert "6 rows in 3 shards, 2 committed" in format_dry_run(dry_run(load_config("job.yaml", anew)))
    assert _run("job.yaml", *anew).shards_resumed == 2
    assert (verify("new").rows, status("new").shards_total) == (6, 3)
    report = _run("job.yaml", "output.shard_rows=null", "output.path=unfinished")
    assert (report.shards, report.shards_resumed) == (3, 1)
    with pytest.raises(OutputError, match=r"different: output\.shard_rows \(2 there, 3 here\)"):
        _run("job.yaml", "output.shard_rows=3", "output.path=unfinished")


@pytest.mark.parametrize(
    ("rows", "cluster", "shard_rows"),
    [
        (200, {}, 16),
        (800, {"replicas": [1, 2]}, 25),
        (20, {"replicas": 2}, 10),
        (1, {"replicas": 2}, 1),
        (1600, {}, 100),
        (10**6, {"replicas": 8}, 256),
    ],
)
def test_a_small_job_has_small_shards(rows: int, cluster: dict[str, Any], shard_rows: int) -> None:
    config = {"name": "j", "model": {"path": "m"}, "input": {"path": "in"}, "output": {"path": "out"}}
    job = JobConfig.model_validate(config | {"cluster": cluster})
    source = Source("jsonl", [InputFile("in", "in", rows, "", "")], pa.schema([]))
    assert choose_shard_rows(job, source) == shard_rows


def test_a_preview_is_what_the_job_gives_and_writes_nothing(old: Path) -> None:
    before = sorted(old.rglob("*"))
    given = ("output.path=finished", "decode.draft={kind: lookup}")
    assert preview(load_config("job.yaml", given), 3) == show("finished", 3)[0]
    assert len(preview(load_config("job.yaml", ("input.max_rows=1",)), 3)) == 2
    assert sorted(old.rglob("*")) == before


def test_a_jobs_output_is_the_next_jobs_input(old: Path) -> None:
    """Which has our columns' names already: the next job's begin with a prefix, also when it is resumed."""
    given = ("input.path=finished/data/*.jsonl", "output.path=next", "sampling.n=1")
    seen = dry_run(load_config("job.yaml", given))
    assert "the output's columns begin with generated_, as generated_text" in format_dry_run(seen)
    report = _run("job.yaml", *given)
    assert (report.rows, report.generations, report.prefix) == (12, 12, "generated_")
    first = _rows(old / "next")[0]
    assert {"note", "row_index", "text", "generated_row_index", "generated_text"} <= first.keys()
    assert [row["generated_row_index"] for row in _rows(old / "next")] == [0, 1, 2, 3] * 3

    before = (old / "next/.rayskip/manifest.json").read_bytes()
    for gone in ("manifest.json", "commits/shard-00001.json", "commits/shard-00002.json"):
        (old / "next/.rayskip" / gone).unlink()
    next(
        (old / "next/data").glob("shard-00002-*")
    ).unlink()  # the other is found, as of a run that was killed
    assert _run("job.yaml", *given).shards_resumed == 4
    assert verify("next").rows == verify("next").generations == 12
    sums = [
        [file["sha256"] for file in json.loads(text)["files"]]
        for text in (before, (old / "next/.rayskip/manifest.json").read_bytes())
    ]
    assert sums[0] == sums[1]
    with pytest.raises(OutputError, match=r"different: output\.prefix \('generated_' there, 'a_' here\)"):
        _run("job.yaml", *given, "output.prefix=a_")
    with pytest.raises(ConfigError, match=r"output\.path: next/again lies where input\.path next reads"):
        _run("job.yaml", "input.path=next", "output.path=next/again")


def test_a_folder_of_an_earlier_version_keeps_its_names(old: Path) -> None:
    names = sorted(path.name for path in (old / "finished").iterdir())
    assert "_commits" in names
    next((old / "finished/data").glob("shard-00001-*")).unlink()
    assert _run("job.yaml").shards_resumed == 2
    assert _run("job.yaml", fresh=True).shards_resumed == 0
    assert (verify("finished").rows, status("finished").state) == (6, "finished")
    assert len(show("finished", 6)[0]) == 12
    assert sorted(path.name for path in (old / "finished").iterdir()) == names
    assert len(list((old / "finished/_epochs").glob("*-heartbeat.json"))) == 2
    (old / "finished/manifest.json").write_text("{")
    with pytest.raises(OutputError, match=r"finished/manifest\.json is damaged"):
        verify("finished")
    (old / "finished/job.json").write_text("{")
    assert _run("job.yaml", fresh=True).shards_resumed == 0
    assert verify("finished").rows == 6


def test_a_damaged_document_is_refused_in_one_line(old: Path) -> None:
    """Whatever one of its keys holds, or the whole of it."""
    (old / "job.yaml").write_text((old / "job.yaml").read_text().replace("finished", "here"))
    _run("job.yaml")
    job = load_config("job.yaml")
    asks: list[Callable[[], object]] = [
        lambda: format_status(status("here")),
        lambda: format_rows(*show("here", 2)),
        lambda: verify("here"),
        lambda: finished_job("here"),
        lambda: format_dry_run(dry_run(job)),
    ]
    refused: dict[tuple[str, int], str] = {}
    records = old / "here/.rayskip"
    for file in [*sorted(records.glob("*.json")), *sorted(records.glob("*/*1*.json"))]:
        whole = file.read_bytes()
        content = json.loads(whole)
        junk = cycle([None, [], {"x": [None]}, "x", -1])  # each key gets one
        broken = [
            json.dumps(content | {key: value}).encode() for key, value in zip(content, junk, strict=False)
        ]
        for data in [b"", b"{", b"[]", b"\xff", b"[" * 10**5, *broken]:
            file.write_bytes(data)
            for number, ask in enumerate(asks[:4] if data in broken else asks):
                try:
                    ask()
                except RayskipError as error:
                    refused[file.name, number] = str(error)
        file.write_bytes(whole)
    assert not [message for message in refused.values() if "\n" in message]
    assert ("job.json", 0) in refused
    assert ("000001.json", 0) not in refused


def test_input_that_was_copied_anew_is_the_same_and_changed_input_is_not(old: Path) -> None:
    here, rows = "output.path=here", old / "rows.jsonl"
    _run("job.yaml", here)
    os.utime(rows, ns=(0, 0))
    assert _run("job.yaml", here).rows == 6
    with pytest.raises(OutputError, match=r"different: input\.split"):  # it only knows the time of change
        _run("job.yaml")
    rows.write_text(rows.read_text().replace("[", "[ ", 1)[:-1])
    os.utime(rows, ns=(0, 0))
    with pytest.raises(OutputError, match="different: input files"):
        _run("job.yaml", here)


def test_a_finished_folder_reads_as_a_dataset(old: Path, tmp_path: Path) -> None:
    """By common readers, given the folder itself where they take folders, and by the next job."""
    out = str(old / "here")
    _run("job.yaml", f"output.path={out}", "output.format=parquet")
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    loaded = datasets.load_dataset(out)
    tables = {
        "pandas": pa.Table.from_pandas(pd.read_parquet(out)),
        "pyarrow": ds.dataset(out).to_table(),
        "datasets": loaded["train"].data.table,
        "datasets by format": datasets.load_dataset("parquet", data_dir=out)["train"].data.table,
        "polars": pl.read_parquet(f"{out}/**/*.parquet").to_arrow(),
        "polars scan": pl.scan_parquet(f"{out}/data/").collect().to_arrow(),
        "duckdb": duckdb.sql(f"from '{out}/**/*.parquet'").to_arrow_table(),
        "duckdb folder": duckdb.sql(f"from read_parquet('{out}')").to_arrow_table(),
    }
    names = ["row_index", "sample_index", "token_ids", "finish_reason"]
    rows = [{name: row[name] for name in names} for row in _rows(old / "finished")]
    for reader, table in tables.items():
        found = sorted(
            table.select(names).to_pylist(), key=lambda row: (row["row_index"], row["sample_index"])
        )
        assert found == rows, reader
    files = discover(InputConfig(path=out)).files
    assert [file.rows for file in files] == [4, 4, 4]
    (old / "here/.rayskip/manifest.json").unlink()
    for path in (
        out,
        f"{out}/data",
        f"{out}/data/*.parquet",
        f"{out}/**/*.parquet",
        str(files[0].url),
        str(old),
    ):
        with pytest.raises(InputError, match=r"here is the output of a job that is not finished"):
            discover(InputConfig(path=path))
    with pytest.raises(InputError, match=r"unfinished is the output of a job that is not finished"):
        discover(InputConfig(path="unfinished/data"))
    assert discover(InputConfig(path="finished/data")).rows == 12


def test_a_finished_folder_of_json_lines_reads_as_a_dataset(old: Path, tmp_path: Path) -> None:
    out = str(old / "here")
    _run("job.yaml", f"output.path={out}")
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    assert sorted(datasets.load_dataset(out)["train"]["row_index"]) == sorted([*range(6)] * 2)
    assert ds.dataset(out, format="json").count_rows() == 12


def _run_on_a_terminal(answer: str, *options: str) -> tuple[int, str]:
    """`rayskip run job.yaml` with a terminal as its standard streams: its exit code, and what it showed."""
    command = [sys.executable, "-c", "from rayskip.cli import main; main()", "run", "job.yaml", *options]
    ours, its = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        shown = b""
        with suppress(OSError):  # a terminal's way to say that its last writer has gone
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    return process.returncode, shown.decode()


def test_fresh_asks_on_a_terminal_before_a_finished_job_is_lost(old: Path) -> None:
    asked = "holds the finished job 'early': 12 generations in 3 files, 4,457 bytes. --fresh"
    before = sorted(path.read_bytes() for path in old.glob("finished/**/*.json*"))
    code, shown = _run_on_a_terminal("n", "--fresh")
    assert (code, asked in shown) == (2, True)
    assert "error: finished: nothing was deleted" in shown
    code, shown = _run_on_a_terminal("y", "--fresh", "--set", "input.path=gone.jsonl")
    assert (code, asked in shown) == (2, True)
    assert "gone.jsonl does not exist" in shown.replace("\r\n", "")
    code, shown = _run_on_a_terminal(
        "n", "--fresh", "--set", "output.path=unfinished", "--set", "model.path=gone"
    )
    assert (code, "holds" in shown) == (2, False)
    assert sorted(path.read_bytes() for path in old.glob("finished/**/*.json*")) == before
    (old / "finished/manifest.json").write_text("{")
    code, shown = _run_on_a_terminal("n", "--fresh")
    assert (code, "holds a job that was finished, and whose" in shown) == (2, True)


def test_the_quality_audits_of_an_earlier_version_count(old: Path) -> None:
    """It called them receipts: in the config, in commit records and in the report."""
    fallback = {"quality.below_floor": "full_depth", "quality.min_audits": 7, "quality.floor": 0.25}
    _edit_config(old / "unfinished", "quality", below_floor="full_depth", min_receipts=7, floor=0.25)
    commit = old / "unfinished/_commits/shard-00001.json"
    found = {"receipts": 8, "receipt_exact": 4, "receipt_edit_similarity": 6.0, "receipt_rouge_l": 2.0}
    _edit(commit, stats=json.loads(commit.read_text())["stats"] | found)
    agreement = {"exact_match": 0.5, "edit_similarity": 0.75, "rouge_l": 0.25}
    assert CommitRecord.model_validate_json(commit.read_text()).counters.agreement == agreement
    overrides = ["output.path=unfinished", *(f"{key}={value}" for key, value in fallback.items())]
    with pytest.raises(OutputError, match=r"different: quality\.min_audits \(7 there, 20 here\)\. Choose"):
        _run("job.yaml", *overrides, "quality.min_audits=20")
    report = _run("job.yaml", *overrides)
    assert (report.shards_resumed, report.audits >= 8) == (1, True)
    _edit(old / "finished/report.json", receipts=5)
    assert _run("job.yaml").audits == 5


def test_a_job_under_another_name_is_the_same_job(old: Path) -> None:
    assert _run("job.yaml", "output.path=unfinished", "name=later").shards_resumed == 1
    assert verify("unfinished").rows == 6
    assert _rows(old / "unfinished") == _rows(old / "finished")


def test_an_engine_in_python_generates_a_jobs_tokens_for_its_rows(old: Path) -> None:
    job = load_config("job.yaml")
    engine = Engine.load(job.model, job.engine, job.decode)
    prompts = [json.loads(line)["prompt_token_ids"] for line in Path("rows.jsonl").read_text().splitlines()]

    def tokens(**options: Any) -> list[list[int] | None]:
        return [
            one.token_ids for samples in engine.generate(prompts, job.sampling, **options) for one in samples
        ]

    rows = _rows(old / "finished")
    assert tokens(row_file="rows.jsonl") == [row["token_ids"] for row in rows]
    assert tokens() == tokens(row_file="") != tokens(row_file="rows.jsonl")


def test_a_key_that_a_folder_does_not_have_counts_as_its_default(old: Path) -> None:
    config = json.loads((old / "unfinished/job.json").read_text())["config"]
    del config["sampling"]["min_p"], config["decode"]["skip"]["warmup"], config["quality"]
    _edit(old / "unfinished/job.json", config=config)
    with pytest.raises(OutputError, match=r"different: sampling\.min_p \(0\.0 there, 0\.5 here\)\. Choose"):
        _run("job.yaml", "output.path=unfinished", "sampling.min_p=0.5")
    assert _run("job.yaml", "output.path=unfinished").shards_resumed == 1


def test_a_folder_of_an_earlier_version_keeps_its_reading(old: Path) -> None:
    """It read CSV as text, made no columns of folders' names and answered what an assistant said last."""
    there = json.loads((old / "unfinished/job.json").read_text())
    keys = {"text_columns": "all", "partitions": False, "continue_final_message": False}
    assert not keys.keys() & there["config"]["input"].keys()
    config = load_config(load_config("job.yaml", ["output.path=unfinished"]))  # the second time from Python
    begun = as_begun(config, JobRecord.model_validate(there))
    assert {key: getattr(begun.input, key) for key in keys} == keys
    with pytest.raises(OutputError, match=r"input\.partitions \(False there, True here\)"):
        _run("job.yaml", "output.path=unfinished", "input.partitions=true")
    assert as_begun(config, None) == config


def test_a_folder_of_a_later_version_is_read_where_its_format_is_the_same(old: Path) -> None:
    out = old / "finished"
    for file in [*out.glob("*.json"), *out.glob("_commits/*"), *out.glob("_epochs/*")]:
        _edit(file, mood="sunny", rayskip="9.1.0")
    for file in out.glob("_commits/*"):
        _edit(file, stats=json.loads(file.read_text())["stats"] | {"smiles": 3})
    _edit_config(out, "cluster", smiles=3)
    _edit_config(out, "sampling", smiles=None)
    assert status("finished").completion_tokens == 70
    assert _run("job.yaml").rayskip == "9.1.0"
    _edit_config(out, "sampling", smiles=3)
    with pytest.raises(OutputError, match=r"different: sampling\.smiles \(3 there, null here\)"):
        _run("job.yaml")
    _edit_config(out, "decode", skip={"kind": "moody", "depth": 3})
    with pytest.raises(
        OutputError, match=r"different: decode\.skip \(.*there, which this rayskip does not know"
    ):
        _run("job.yaml")


def test_a_folder_of_a_newer_format_is_refused_as_such(old: Path) -> None:
    (old / "finished/job.json").write_text(
        json.dumps({"version": VERSION + 1, "rayskip": "9.1.0", "jobs": []})
    )
    for command in (lambda: status("finished"), lambda: verify("finished"), lambda: _run("job.yaml")):
        with pytest.raises(OutputError, match=r"job\.json was written by a newer rayskip, 9\.1\.0"):
            command()


TEMPLATE = (
    "{%- macro today() %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endmacro -%}"
    "{% for _ in range(strftime_now('%d') | int) %} day{% endfor %}, {{ today() }}"
    "{% for message in messages %}: {{ message.content }}{% endfor %}"
)
"""A prompt has as many tokens more as the month has days."""


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], smollm2: Path) -> Path:
    """A folder with a config whose model's chat template tells the date."""
    root = tmp_path_factory.mktemp("dated")
    model = tiny_llama("dated", 1, vocab_size=49152, max_position_embeddings=64, initializer_range=0.5)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    (root / "rows.jsonl").write_text("".join(f'{{"prompt": "row {row}"}}\n' for row in range(6)))
    (root / "job.yaml").write_text(
        f"name: dated\nmodel: {{path: {model}, dtype: float32}}\ninput: {{path: {root}/rows.jsonl, chat: true}}\n"
        f"sampling: {{max_tokens: 4}}\noutput: {{path: {root}/out, format: jsonl, token_ids: true, shard_rows: 1}}"
    )
    return root


class _Killed(Exception):
    pass


def _until_a_commit(out: Path) -> Callable[[Progress], None]:
    def look(progress: Progress) -> None:
        if list(out.glob(".rayskip/commits/*")):
            raise _Killed

    return look


def test_a_job_keeps_the_date_of_its_first_run(dated: Path) -> None:
    config, out = str(dated / "job.yaml"), dated / "out"
    earlier = "input.date=2020-02-03"
    with pytest.raises(_Killed):
        _run(config, earlier, on_progress=_until_a_commit(out))
    shown = format_dry_run(dry_run(load_config(config)))
    assert "the chat template tells the date: 2020-02-03\n" in shown
    lengths = dry_run(load_config(config, [earlier, f"output.path={dated}/new"])).lengths
    assert (
        lengths != dry_run(load_config(config, [f"output.path={dated}/new", "input.date=2020-02-04"])).lengths
    )
    assert "03 Feb 2020, 00:00: row 0" in shown
    with pytest.raises(
        OutputError, match=r"different: input\.date \('2020-02-03' there, '2020-02-04' here\)"
    ):
        _run(config, "input.date=2020-02-04")
    assert 1 <= _run(config).shards_resumed < 6
    assert [row["prompt_tokens"] for row in _rows(out)] == lengths
    assert _run(config, earlier).shards_resumed >= 1
    answers, said = show(str(out), 3)
    assert all(row.text for row in answers)
    assert preview(load_config(config), 3) == answers
    (out / ".rayskip/job.json").unlink()
    assert _run(config).shards_resumed < 6  # it is finished
    assert verify(str(out)).rows == 6
    for gone in ("job.json", "manifest.json"):
        (out / ".rayskip" / gone).unlink()
    with pytest.raises(OutputError, match=r"another output\.shard_rows or input\.date"):
        _run(config, "input.date=2020-02-04")
    assert _run(config).shards_resumed == 6
    assert format_rows(answers, said).startswith("rows.jsonl row 0: length\n  prompt row 0\n  =>")


def test_the_date_is_todays_where_none_is_given_and_none_where_no_template_asks(dated: Path) -> None:
    before = date.today()
    config, elsewhere = str(dated / "job.yaml"), f"output.path={dated}/new"
    seen = dry_run(load_config(config, [elsewhere]))
    assert before <= seen.plan.record.date <= date.today()
    assert f"{seen.plan.record.date:%d %b %Y}, 00:00: row 0" in seen.prompts[0]
    deleted_later = f"output.path={dated}/runtime_resources/working_dir_files/out"
    plain = dry_run(load_config(config, [elsewhere, "input.chat=false"]))
    brought = dry_run(load_config(config, [deleted_later, "input.chat=false"])).refused
    assert "among the files that the job brought along" in str(brought)
    assert plain.plan.record.date is None
    assert "tells the date" not in format_dry_run(plain)
