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
from typing import Any, TypeVar

import psutil
import pytest
from s3_server import s3_server

from rayskip.data.storage import open_storage
from rayskip.driver.records import Manifest
from rayskip.driver.report import Report
from rayskip.driver.status import status
from rayskip.driver.verify import verify

pytestmark = pytest.mark.timeout(480)

T = TypeVar("T")

ROWS, SHARD_ROWS, TOKENS = 96, 4, 64
COMMAND = "from rayskip.cli import main; main()"


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    """A small one, since it is loaded again and again."""
    return tiny_llama("faults", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of unequal lengths, and one row that cannot run."""
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    prompts = [[5 + i, *range(7, 20)] * (1 + i % 4) for i in range(ROWS - 1)]
    lines = [json.dumps({"id": i, "ids": prompt}) for i, prompt in enumerate([*prompts, None])]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(model: Path, data: Path | str, folder: Path, out: str, **sections: Any) -> Path:
    job = {
        "name": "faults",
        "model": {"path": str(model)},
        "input": {"path": str(data), "prompt_token_ids": "ids"},
        "sampling": {"max_tokens": TOKENS, "temperature": 0.8, "seed": 7, "ignore_eos": True},
        "engine": {"max_batch_rows": 8},
        "cluster": {"replicas": 1, "cpus_per_replica": 1},
        "output": {"path": out, "shard_rows": SHARD_ROWS, "token_ids": True},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job | sections))  # JSON is YAML
    return path


@contextmanager
def driver(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver process in a process group of its own, dead with all its children at the end; see `said`."""
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for child in descendants(process.pid):
            child.kill()
        process.kill()
        process.wait()


def said(config: Path) -> str:
    """What the newest driver of this config has said so far."""
    return config.with_suffix(".log").read_text()


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


def replicas_of(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    return {child for child in descendants(process.pid) if is_replica(child)}


def stopped_at_work(config: Path, process: subprocess.Popen[bytes], but: psutil.Process | None = None) -> Any:
    """A replica, another one than `but`, that is stopped in the middle of a shard, so that this is not over sooner
    than the test has done what it does about it.

    Ray's title of one that also answers a question is another: it is passed over then, never taken wrongly.
    """

    def stopped() -> psutil.Process | None:
        for child in replicas_of(process) - {but}:
            if title(child) == "ray::Replica.run":
                child.suspend()
                if title(child) == "ray::Replica.run":  # still, now that it cannot end any more
                    return child
                child.resume()
        return None

    return wait_until(config, process, stopped)


def finish(config: Path) -> None:
    """Run the same command to its end."""
    with driver(config) as process:
        assert process.wait(timeout=200) == 0, said(config)


def wait_for_commits(config: Path, process: subprocess.Popen[bytes], out: Path, count: int = 1) -> None:
    wait_until(config, process, lambda: len(list(out.glob(".rayskip/commits/*.json"))) >= count)


def wait_until(config: Path, process: subprocess.Popen[bytes], found: Callable[[], T | None]) -> T:
    """What `found` returns once that is true, while the process lives."""
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert process.poll() is None, said(config)
        assert time.monotonic() < deadline, said(config)
        time.sleep(0.02)
    return value


def hashes(out: str) -> list[str]:
    """sha256 of the finished job's files, in row order; the job passes `verify`."""
    assert verify(out).rows == ROWS
    data = open_storage(out).get(".rayskip/manifest.json")
    assert data is not None
    return [file.sha256 for file in Manifest.model_validate_json(data).files]


def report(out: str) -> Report:
    data = open_storage(out).get(".rayskip/report.json")
    assert data is not None
    return Report.model_validate_json(data)


@pytest.fixture(scope="module")
def undisturbed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a job from and to S3: that it gives the same bytes as from and to a disk is shown on the way."""
    with s3_server() as bucket:
        open_storage(f"{bucket}/in").put(data.name, data.read_bytes())
        out = f"{bucket}/out"
        finish(write_config(model, f"{bucket}/in/{data.name}", tmp_path_factory.mktemp("undisturbed"), out))
        facts = report(out)
        assert (facts.rows, facts.generations_failed, facts.retries) == (ROWS, 1, 0)
        assert facts.completion_tokens == (ROWS - 1) * TOKENS
        assert facts.completion_tok_s > 0
        assert 0 < facts.load_s < facts.wall_s
        assert 0 < facts.generate_s < facts.wall_s
        return hashes(out)


def test_a_row_that_kills_its_replica_becomes_an_error_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, rows = 6, 8
    monkeypatch.setenv("RAYSKIP_FAILPOINTS", f"replica.row:kill@{poison}")
    data, out = tmp_path / "ids.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"ids": [row + 1, 2, 3]}) + "\n" for row in range(rows)))
    output = {"path": str(out), "shard_rows": 4, "format": "jsonl"}
    finish(write_config(model, data, tmp_path, str(out), retry={"max_shard_attempts": 1}, output=output))
    assert verify(str(out)).rows == rows
    found = [
        json.loads(line) for file in sorted(out.glob("data/*")) for line in file.read_text().splitlines()
    ]
    assert [row["row_index"] for row in found] == list(range(rows))
    expected = ["replica_lost" if row == poison else None for row in range(rows)]
    assert [row["error_type"] for row in found] == expected
    assert all(row["completion_tokens"] == TOKENS for row in found if row["row_index"] != poison)
    assert report(str(out)).generations_failed == 1


def test_a_disturbed_job_has_the_bytes_of_an_undisturbed_one(
    model: Path, data: Path, undisturbed: list[str], tmp_path: Path
) -> None:
    """SIGTERM to all processes, as schedulers send it; Ctrl-C twice; SIGKILL; then to the end, where one of two
    replicas is killed. That two give the same bytes as one is shown on the way."""
    out = tmp_path / "out"
    config = write_config(model, data, tmp_path, str(out))
    with driver(config) as process:
        wait_for_commits(config, process, out)
        children = descendants(process.pid)
        assert any(map(is_replica, children))
        at_signal = status(str(out)).shards
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 75, said(config)
        assert "Traceback" not in said(config)
        assert not psutil.wait_procs(children, timeout=5)[1]
    stopped = status(str(out))
    assert at_signal < stopped.shards < stopped.shards_total

    with driver(config) as process:
        wait_for_commits(config, process, out, stopped.shards + 1)
        stopped_at_work(config, process)
        process.send_signal(signal.SIGINT)
        wait_until(config, process, lambda: "a second signal stops at once" in said(config))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 75, said(config)
        assert "stopped at once" in said(config)
        assert "Traceback" not in said(config)
    stopped = status(str(out))
    assert stopped.shards < stopped.shards_total

    with driver(config) as process:
        wait_for_commits(config, process, out, stopped.shards + 1)
        children = descendants(process.pid)
        process.kill()
        _, alive = psutil.wait_procs([child for child in children if is_replica(child)], timeout=30)
        assert not alive
        for child in children:  # Ray's own agents take a minute to see that they are alone
            with suppress(psutil.NoSuchProcess):
                child.kill()
    killed = status(str(out))
    assert stopped.shards < killed.shards < killed.shards_total

    config = write_config(model, data, tmp_path, str(out), cluster={"replicas": 2, "cpus_per_replica": 1})
    with driver(config) as process:
        first = stopped_at_work(config, process)  # one that still loads would take no shard with it
        second = stopped_at_work(config, process, first)
        before = replicas_of(process)
        first.kill()
        wait_until(config, process, lambda: replicas_of(process) - before)
        second.resume()
        assert process.wait(timeout=200) == 0, said(config)
    assert hashes(str(out)) == undisturbed
    facts = report(str(out))
    assert (facts.shards_resumed, facts.replicas) == (killed.shards, 2)
    assert facts.retries >= 1
