"""Real jobs on a local Ray cluster, killed and stopped: every row once, the same bytes as undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from s3_server import s3_server

from rayskip.data.storage import open_storage
from rayskip.driver.records import Manifest
from rayskip.driver.report import Report
from rayskip.driver.status import status
from rayskip.driver.verify import verify

pytestmark = pytest.mark.timeout(240)

SUBJECTS = (
    "a lighthouse",
    "two old friends",
    "the last train",
    "a broken clock",
    "rain in June",
    "a lost dog",
)
T = TypeVar("T")

ROWS, SHARD_ROWS = 60, 5
COMMAND = "from rayskip.cli import main; main()"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of unequal lengths, and one row that cannot run."""
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    prompts = [f"Story {i}: write about {SUBJECTS[i % 6]}. " * (1 + i % 4) for i in range(ROWS - 1)]
    lines = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate([*prompts, None])]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(data: Path | str, folder: Path, out: str, replicas: int = 1) -> Path:
    job = {
        "name": "faults",
        "model": {"path": "smollm2-135m-instruct"},
        "input": {"path": str(data), "prompt": "prompt"},
        "sampling": {"max_tokens": 28, "temperature": 0.8, "seed": 7, "ignore_eos": True},
        "engine": {"max_batch_rows": 8},
        "cluster": {"replicas": replicas, "cpus_per_replica": 1},
        "output": {"path": out, "shard_rows": SHARD_ROWS, "token_ids": True},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


@contextmanager
def driver(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver process in a process group of its own, dead with all its children at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in descendants(process.pid):
            child.kill()
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """What Ray calls a process after what it does, as in ray::Replica.run."""
    with suppress(psutil.NoSuchProcess, IndexError):
        return process.cmdline()[0]
    return ""


def is_replica(process: psutil.Process) -> bool:
    return title(process).startswith("ray::Replica")


def replicas_of(process: subprocess.Popen[str]) -> set[psutil.Process]:
    return {child for child in descendants(process.pid) if is_replica(child)}


def wait_for_work(process: subprocess.Popen[str], count: int) -> psutil.Process:
    """A replica that runs a shard at this moment, once `count` of them have been seen to.

    Ray's title of one that also answers a question is another: it is passed over then, never taken wrongly.
    """
    seen: set[psutil.Process] = set()

    def at_work() -> psutil.Process | None:
        running = [child for child in descendants(process.pid) if title(child) == "ray::Replica.run"]
        seen.update(running)
        return running[0] if running and len(seen) >= count else None

    return wait_until(process, at_work)


def finish(config: Path) -> None:
    """Run the same command to its end."""
    with driver(config) as process:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output


def wait_for_commits(process: subprocess.Popen[str], out: Path, count: int = 1) -> None:
    wait_until(process, lambda: len(list(out.glob(".rayskip/commits/*.json"))) >= count)


def wait_until(process: subprocess.Popen[str], found: Callable[[], T | None]) -> T:
    """What `found` returns once that is true, while the process lives."""
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def hashes(out: str) -> list[str]:
    """sha256 of the finished job's files, in row order; the job passes `verify`."""
    assert verify(out).rows == ROWS
    data = open_storage(out).get(".rayskip/manifest.json")
    assert data is not None
    return [file.sha256 for file in Manifest.model_validate_json(data).files]


def report(out: Path) -> Report:
    return Report.model_validate_json((out / ".rayskip/report.json").read_bytes())


@pytest.fixture(scope="module")
def undisturbed(data: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(write_config(data, folder, str(folder / "out")))
    facts = report(folder / "out")
    assert (facts.rows, facts.generations_failed, facts.retries) == (ROWS, 1, 0)
    assert facts.completion_tokens == (ROWS - 1) * 28
    assert facts.completion_tok_s > 0
    assert 0 < facts.load_s < facts.wall_s
    assert 0 < facts.generate_s < facts.wall_s
    return hashes(str(folder / "out"))


def test_a_killed_replica_is_replaced(data: Path, undisturbed: list[str], tmp_path: Path) -> None:
    """One of two is killed; that two give the same bytes as one is shown on the way."""
    out = tmp_path / "out"
    with driver(write_config(data, tmp_path, str(out), replicas=2)) as process:
        killed = wait_for_work(process, 2)  # one that still loads would take no shard with it
        before = replicas_of(process)
        killed.kill()
        wait_until(process, lambda: replicas_of(process) - before)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert hashes(str(out)) == undisturbed
    assert report(out).retries >= 1
    assert report(out).replicas == 2


def test_a_row_that_kills_its_replica_becomes_an_error_row(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model, since it is loaded again after each death."""
    poison, rows = 6, 8
    monkeypatch.setenv("RAYSKIP_FAILPOINTS", f"replica.row:kill@{poison}")
    data, out = tmp_path / "ids.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"ids": [row + 1, 2, 3]}) + "\n" for row in range(rows)))
    config = write_config(data, tmp_path, str(out))
    job = json.loads(config.read_text()) | {
        "model": {"path": str(tiny_llama("tiny", 0))},
        "input": {"path": str(data), "prompt_token_ids": "ids"},
        "retry": {"max_shard_attempts": 1},
        "output": {"path": str(out), "shard_rows": 4, "format": "jsonl"},
    }
    config.write_text(json.dumps(job))
    finish(config)
    assert verify(str(out)).rows == rows
    found = [
        json.loads(line) for file in sorted(out.glob("data/*")) for line in file.read_text().splitlines()
    ]
    assert [row["row_index"] for row in found] == list(range(rows))
    expected = ["replica_lost" if row == poison else None for row in range(rows)]
    assert [row["error_type"] for row in found] == expected
    assert all(row["completion_tokens"] == 28 for row in found if row["row_index"] != poison)
    assert report(out).generations_failed == 1


def test_a_stopped_and_a_killed_driver_resume(data: Path, undisturbed: list[str], tmp_path: Path) -> None:
    """SIGTERM to all processes, as schedulers send it; Ctrl-C twice; SIGKILL; then to the end, with one command."""
    out = tmp_path / "out"
    config = write_config(data, tmp_path, str(out))
    with driver(config) as process:
        wait_for_work(process, 1)
        wait_for_commits(process, out)
        children = descendants(process.pid)
        at_signal = status(str(out)).shards
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert time.monotonic() - began < 20
        assert "Traceback" not in output
        assert not psutil.wait_procs(children, timeout=5)[1]
    stopped = status(str(out))
    assert at_signal < stopped.shards < stopped.shards_total

    with driver(config) as process:
        wait_for_commits(process, out, stopped.shards + 1)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert "a second signal stops at once" in output
        assert "Traceback" not in output
    stopped = status(str(out))
    assert stopped.shards < stopped.shards_total

    with driver(config) as process:
        wait_for_commits(process, out, stopped.shards + 1)
        children = descendants(process.pid)
        process.kill()
        _, alive = psutil.wait_procs([child for child in children if is_replica(child)], timeout=30)
        assert not alive
        for child in children:  # Ray's own agents take a minute to see that they are alone
            with suppress(psutil.NoSuchProcess):
                child.kill()
    killed = status(str(out))
    assert stopped.shards < killed.shards < killed.shards_total

    finish(config)
    assert hashes(str(out)) == undisturbed
    assert report(out).shards_resumed == killed.shards


def test_the_same_job_from_and_to_s3(data: Path, undisturbed: list[str], tmp_path: Path) -> None:
    with s3_server() as bucket:
        open_storage(f"{bucket}/in").put(data.name, data.read_bytes())
        finish(write_config(f"{bucket}/in/{data.name}", tmp_path, f"{bucket}/out"))
        assert hashes(f"{bucket}/out") == undisturbed
