"""The command line in its own process, and what it shows: fast help, exit codes, errors in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import rayskip
from rayskip.cluster.local_pool import LocalPool
from rayskip.cluster.replica import Replica
from rayskip.config import JobConfig
from rayskip.config.file import load_config
from rayskip.config.train import TrainSkipConfig
from rayskip.data.output import OutputRow
from rayskip.driver.loop import run_job
from rayskip.driver.progress import Progress
from rayskip.dry_run import histogram
from rayskip.view import format_rows, live_view

ROOT = Path(__file__).parent.parent
MAIN = "from rayskip.cli import main; main()"
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
ROWS = 40


def cli(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A config with relative paths, beside its data."""
    rows = [{"id": row, "question": f"Name a colour, number {row}. " * (1 + row % 5)} for row in range(ROWS)]
    rows.append({"id": ROWS, "question": None})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "colours",
        "model": {"path": "smollm2-135m-instruct"},
        "input": {"path": "rows.jsonl", "prompt": "question", "chat": True},
        "sampling": {"max_tokens": 4},
        "engine": {"max_batch_rows": 16},
        "output": {"path": "out", "shard_rows": 16},
    }
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_a_drafter_that_is_not_there_is_refused_before_the_output_is_claimed(job: Path) -> None:
    wrong = ("--set", "decode.draft={kind: kangaroo, path: nowhere}")
    for command in ("plan", "run"):
        found = cli(command, str(job), *wrong, cwd=job.parent)
        assert found.returncode == 2
        assert "nowhere has no kangaroo.json" in found.stderr
    assert not (job.parent / "out").exists()


def test_help_answers_in_under_a_second() -> None:
    def seconds() -> float:
        began = time.monotonic()
        found = cli("--help")
        assert found.returncode == 0
        assert "75" in found.stdout
        return time.monotonic() - began

    assert min(seconds() for _ in range(3)) < 1.0


def test_importing_rayskip_and_its_cli_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'datasets', 'pyarrow', 'pydantic'}"
    code = f"import sys, rayskip.cli; print({heavy} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("set()\n", "")


def test_a_config_error_comes_before_anything_loads(job: Path) -> None:
    code = (
        "import sys\n"
        "from rayskip.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'ray', 'pyarrow'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, "run", str(job), "--set", "sampling.max_token=3"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stdout == "set()\n"
    assert found.stderr == f'error: {job}: unknown key "sampling.max_token"; did you mean "max_tokens"?\n'


def test_public_names() -> None:
    configs = {"DecodeConfig", "EngineConfig", "JobConfig", "ModelConfig", "SamplingParams"}
    others = {"Completion", "Engine", "Generation", "Report", "run"}
    assert set(dir(rayskip)) == set(rayskip.__all__) == {"__version__", "errors", *others, *configs}
    assert all(getattr(rayskip, name).__name__ == name for name in others | configs)
    assert issubclass(rayskip.errors.UserError, Exception)
    assert rayskip.JobConfig is JobConfig
    assert rayskip.__version__
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = rayskip.Engin


def test_schema_is_the_configs_json_schema() -> None:
    found = cli("schema")
    assert json.loads(found.stdout) == JobConfig.model_json_schema()
    other = cli("schema", "train skip")
    assert json.loads(other.stdout) == TrainSkipConfig.model_json_schema()
    unknown = cli("schema", "trian")
    assert unknown.returncode == 2
    assert "these do: run, bench, train skip" in unknown.stderr


def test_model_prints_a_folder_of_safetensors(smollm2: Path) -> None:
    found = cli("model", "smollm2-135m-instruct")
    assert found.stdout == f"{smollm2}\n"
    assert list(smollm2.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model", "no/such/folder"], "error: model.path: no folder no/such/folder"),
        (["status", "nowhere"], "error: nowhere: no .rayskip/job.json there"),
        (["verify", "nowhere"], "error: nowhere: no .rayskip/job.json there"),
        (["plan", "job.yaml", "--set", "input.path=row.jsonl"], "error: "),
        (["plan", "job.yaml", "--set", "input.prompt=questoin"], "error: "),
        (["run", "job.yaml", "--set", "model.path=smollm"], "error: model.path: no folder smollm"),
        (["run", "job.yaml", "--set", "output.path=ftp://x"], "error: ftp://x: use a local path"),
        (
            ["run", "job.yaml", "--set", "output.path=job.yaml/x"],
            "error: job.yaml: is a file, not an output folder",
        ),
        (["status", "job.yaml"], "error: job.yaml: is a file, not an output folder"),
    ],
)
def test_a_users_error_is_one_line_and_exit_2(job: Path, args: list[str], said: str) -> None:
    found = cli(*args, cwd=job.parent)
    assert found.returncode == 2
    assert found.stderr.startswith(said)
    assert found.stderr.count("\n") == 1


def test_an_unknown_option_is_exit_2() -> None:
    found = cli("run", "job.yaml", "--frehs")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


def test_plan_shows_prompts_lengths_and_bad_rows(job: Path) -> None:
    found = cli("plan", job.name, cwd=job.parent)
    assert found.stderr == ""
    assert f"{ROWS + 1} rows in 3 shards" in found.stdout
    assert found.stdout.count("Name a colour, number 0.") == 1
    assert "prompt 3:" in found.stdout
    assert "null_prompt: 1, such as rows.jsonl row 40" in found.stdout
    assert f"at most {ROWS * 4} completion tokens" in found.stdout
    assert not (job.parent / "out").exists()


def test_a_job_of_which_nothing_succeeds_is_exit_1(
    tiny_llama: Callable[..., Path], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan says so before, and so does the same command after."""
    monkeypatch.chdir(job.parent)
    rows = [{"prompt_token_ids": ids} for ids in ([-1], [], [-2])]
    (job.parent / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["input={path: bad.jsonl}", f"model.path={tiny_llama('bad', 1)}"]
    args = [job.name, *(part for each in given for part in ("--set", each))]
    commonest = "the commonest error is bad_token_id: 2, such as bad.jsonl row 0: column"
    planned = cli("plan", *args)
    assert planned.returncode == 1
    assert f"error: none of the 3 rows looked at can run; {commonest}" in planned.stderr
    ran = cli("run", *args)
    assert ran.returncode == 1
    assert f"error: none of the 3 rows looked at can run; {commonest}" in ran.stderr
    assert "loading" not in ran.stderr
    assert json.loads(cli("status", "out", "--json").stdout)["state"] == "failed"
    config = load_config(job, given)
    run_job(config, lambda job, source: LocalPool(lambda: Replica(job, source)))
    ran = cli("run", *args)
    assert ran.returncode == 1
    assert "empty_prompt: 1, such as bad.jsonl row 1: the prompt is empty" in ran.stdout
    assert f"error: no row succeeded; {commonest}" in ran.stderr
    told = json.loads(cli("status", "out", "--json").stdout)
    assert (told["state"], told["rows"], told["errors"]["bad_token_id"]["row_index"]) == ("failed", 3, 0)
    assert told["reason"].startswith(f"no row succeeded; {commonest}")
    checked = json.loads(cli("verify", "out", "--json").stdout)
    assert (checked["rows"], checked["generations_failed"]) == (3, 3)
    expected = json.loads(cli("plan", *args, "--json").stdout)
    assert (expected["rows_looked_at"], expected["rows_failed"]) == (3, 3)
    readme = (ROOT / "README.md").read_text()
    assert [key for key in told | checked | expected if f"`{key}`" not in readme] == []


@pytest.mark.timeout(240)
def test_a_job_from_run_to_verify_and_again(job: Path) -> None:
    ran = cli("run", job.name, cwd=job.parent)
    assert ran.returncode == 0, ran.stderr
    assert "committed to out" in ran.stdout
    assert "colours: finished: rows 41/41" in ran.stderr
    assert "finished" in cli("status", "out", cwd=job.parent).stdout
    verified = cli("verify", "out", cwd=job.parent)
    assert verified.returncode == 0, verified.stderr
    assert "41 rows exactly once in 3 files, 41 generations (1 failed)" in verified.stdout

    other = cli("plan", job.name, "--set", "sampling.max_tokens=5", cwd=job.parent)
    assert other.returncode == 2
    assert f"at most {ROWS * 5} completion tokens" in other.stdout
    assert "3 of 3 shards committed; different: sampling.max_tokens (4 there, 5 here)." in other.stderr

    again = [sys.executable, str(ROOT / "jobs" / "generate.py"), job.name]
    found = subprocess.run(again, cwd=job.parent, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ran.stdout), found.stderr


def progress(phase: str, rows: int, tokens: int = 5000, replicas: int = 1) -> Progress:
    return Progress(phase, 61.0, rows, 200, tokens, 400.0, 350.0, None, replicas, 2, 3, 4)


def test_plain_lines_are_few_when_not_on_a_terminal() -> None:
    shown = io.StringIO()
    with live_view("bench", Console(file=shown)) as on_progress:
        on_progress(progress("loading", 0, tokens=0, replicas=0))
        on_progress(replace(progress("starting", 0, tokens=0, replicas=0), retries=0, failed=0))
        for rows in range(100):
            on_progress(progress("generating", rows))
        on_progress(progress("finished", 200))
    assert shown.getvalue().splitlines() == [
        "bench: loading: rows 0/200, elapsed 0:01:01, replicas 0/2, retries 3, failed 4",
        "bench: starting: rows 0/200, elapsed 0:01:01, replicas 0/2",
        "bench: generating: rows 0/200, tokens 5,000, tok/s 400 now 350 overall, elapsed 0:01:01, ETA -, "
        "replicas 1/2, retries 3, failed 4",
        "bench: finished: rows 200/200, tokens 5,000, tok/s 400 now 350 overall, elapsed 0:01:01, ETA -, "
        "replicas 1/2, retries 3, failed 4",
    ]


def test_a_terminal_gets_a_live_view() -> None:
    shown = io.StringIO()
    with live_view("bench", Console(file=shown, force_terminal=True, width=100)) as on_progress:
        on_progress(progress("generating", 150))
    assert "150/200" in shown.getvalue()
    assert "400 now 350 overall" in shown.getvalue()


def test_text_from_the_data_does_not_command_the_terminal() -> None:
    messages = [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "b"}]
    row = OutputRow("f", 3, 1, "stop", "a\nb\ud800" + "c" * 2000, None, None, {"m": messages, "id": 7})
    assert format_rows([row], {"m"}) == (
        f"f row 3, sample 1: stop\n  m user: \\x1b[2J\n    assistant: b\n  => a\n    b\\ud800{'c' * 996} ... "
        "and 1,004 characters more"
    )
    bad = OutputRow("f", 4, 0, "error", None, "null_prompt", "it is null", {"m": None})
    assert format_rows([bad], {"m"}) == "f row 4: error\n  null_prompt it is null"


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    shown = io.StringIO()
    with live_view("run [/bold] [red]", Console(file=shown, force_terminal=True, width=100)) as on_progress:
        on_progress(progress("generating", 150))
    assert "run [/bold] [red]" in shown.getvalue()


@pytest.mark.parametrize(
    ("streams", "code"),
    [("2>&-", 2), (">&- 2>&-", 2), ("2>/dev/full", 2), ("2> >(true)", 2), ("<&- >/dev/full", 2)],
)
def test_closed_streams_change_no_exit_code(tmp_path: Path, streams: str, code: int) -> None:
    command = f"{sys.executable} -c '{MAIN}' status nowhere {streams}"
    found = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=BUFFERED, capture_output=True, text=True
    )
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stdout", "code"), [(">&-", 0), ("| true", 0), ("> /dev/full", 1)])
def test_a_result_that_nobody_reads(stdout: str, code: int) -> None:
    command = f"set -o pipefail; {sys.executable} -c '{MAIN}' schema {stdout}"
    found = subprocess.run(["bash", "-c", command], env=BUFFERED, capture_output=True, text=True)
    assert found.returncode == code
    assert found.stderr.count("\n") == code, found.stderr


def test_histogram_counts_every_length_once() -> None:
    assert histogram([1, 2, 3, 9]) == [
        f"        1 to       1        1  {'#' * 20}",
        f"        2 to       3        2  {'#' * 40}",
        "        4 to       7        0  ",
        f"        8 to      15        1  {'#' * 20}",
    ]
    assert histogram([]) == ["  no prompt can run"]
