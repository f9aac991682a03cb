"""The run on an in-process pool, with replicas that do no model work but really write output files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pyarrow.dataset as ds
import pytest

from rayskip.cluster.local_pool import LocalPool
from rayskip.config import JobConfig
from rayskip.data.attempt import write_attempt
from rayskip.data.records import RowErrors, Shard, ShardResult
from rayskip.data.sources import Source
from rayskip.data.storage import open_storage
from rayskip.driver.loop import run_plan
from rayskip.driver.plan import Plan
from rayskip.driver.progress import Meter, Progress
from rayskip.driver.records import JobRecord, Manifest
from rayskip.driver.report import Report, error_lines, format_report
from rayskip.driver.status import JobStatus, status
from rayskip.driver.verify import repair, verify
from rayskip.errors import (
    InputError,
    Interrupted,
    JobFailed,
    OutputError,
    ReplicaLost,
    StorageBusy,
    TakenOver,
)
from rayskip.pool import Alive, Event, ReplicaInfo, ReplicaProgress
from rayskip.stats import Stats
from rayskip.view import format_status

ROWS = 10


class TinyReplica:
    """Writes one line per row. `mishap(shard)` runs first and may raise what a real replica raises; `wrote(shard)`
    runs when the file is there."""

    def __init__(
        self,
        out: str,
        mishap: Callable[[Shard], None] = lambda shard: None,
        wrote: Callable[[Shard], None] = lambda shard: None,
    ) -> None:
        self.storage = open_storage(out)
        self.mishap = mishap
        self.wrote = wrote
        self.rows = 0

    def ready(self) -> ReplicaInfo:
        return ReplicaInfo(0.1, {"cpu": "test"}, {"max_batch_rows": 1})

    def progress(self) -> ReplicaProgress:
        return ReplicaProgress(self.rows, self.rows * 7)

    def run(self, shard: Shard) -> ShardResult:
        self.mishap(shard)
        body = lines(shard.name, shard.start, shard.stop)
        try:
            assert shard.probe or write_attempt(self.storage, shard.output, body) == body
        finally:
            self.wrote(shard)
        self.rows += shard.rows
        stats = Stats(rows=shard.rows, rows_failed=2, completion_tokens=shard.rows * 7, steps=1)
        errors = {f"odd_{shard.index % 2}": RowErrors(1, shard.name, shard.start, "it is odd")}
        digest = hashlib.sha256(body).hexdigest()
        return ShardResult(shard.index, shard.output, digest, len(body), shard.rows, 2, stats, errors, 1)


def lines(name: str, start: int, stop: int) -> bytes:
    fine = {"sample_index": 0, "error_type": None}
    rows = [{"row_file": name, "row_index": row, **fine} for row in range(start, stop)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def config(out: Path, **sections: object) -> JobConfig:
    base = {
        "name": "tiny",
        "model": {"path": "m"},
        "input": {"path": "in"},
        "output": {"path": str(out), "format": "jsonl"},
    }
    return JobConfig.model_validate({**base, **sections})


def plan(shards: int, fingerprint: str = "f1") -> Plan:
    cut = [Shard(i, "/in/a", "a", i * ROWS, (i + 1) * ROWS) for i in range(shards)]
    record = JobRecord(
        name="tiny",
        fingerprint=fingerprint,
        parts={"input files": "i", "model": fingerprint},
        shards=shards,
        rows=shards * ROWS,
        shard_rows=ROWS,
        config=config(Path("out")).model_dump(mode="json"),
    )
    return Plan(cast(Source, None), cut, record)


def run(
    job: JobConfig, mishap: Callable[[Shard], None] = lambda shard: None, shards: int = 6, **options: object
) -> Report:
    def pool(job: JobConfig, source: Source) -> LocalPool:
        return LocalPool(lambda: TinyReplica(job.output.path, mishap))

    return run_plan(job, plan(shards), pool, **options)  # type: ignore[arg-type]


def content(out: Path) -> bytes:
    """The finished job's data, in shard order."""
    manifest = Manifest.model_validate_json((out / ".rayskip/manifest.json").read_bytes())
    return b"".join((out / file.path).read_bytes() for file in manifest.files)


def whole(shards: int = 6) -> bytes:
    return lines("a", 0, shards * ROWS)


def rows_read(out: Path) -> int:
    """Rows that a reader of data/ finds who does as the README says."""
    return ds.dataset(out / "data", format="json").count_rows()


def test_an_undisturbed_run(tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = run(config(tmp_path), on_progress=seen.append)
    assert content(tmp_path) == whole()
    assert (report.rows, report.generations, report.generations_failed) == (60, 60, 12)
    assert report.shards_resumed == report.retries == 0
    assert report == Report.model_validate_json((tmp_path / ".rayskip/report.json").read_bytes())
    assert report.errors == {f"odd_{kind}": RowErrors(3, "a", kind * ROWS, "it is odd") for kind in (0, 1)}
    assert "odd_1: 3, such as a row 10: it is odd" in format_report(report)
    assert report.failure is None
    odd = {"odd": RowErrors(1, "a", 0, "quotes \x1b[2J\n")}
    assert error_lines(odd) == ["odd: 1, such as a row 0: quotes \\x1b[2J\\n"]
    assert report.completion_tokens == 420
    assert "60, 12 failed" in format_report(report)
    in_vain = report.model_copy(
        update={"drafted": 3, "drafted_by": {"lookup": 3}, "accepted_by": {}, "mean_accepted": 1.0}
    )
    assert "lookup 0 of 3" in format_report(in_vain)
    assert (seen[0].rows, seen[-1].rows, seen[-1].rows_total, seen[-1].phase) == (0, 60, 60, "finished")
    now = status(str(tmp_path))
    assert (now.finished, now.shards, now.rows, now.completion_tokens) == (True, 6, 60, 420)
    assert now.errors == report.errors
    assert "60, 12 failed, 0 cut off" in format_status(now)
    assert {path.name for path in tmp_path.iterdir()} == {".rayskip", "data"}
    records = {"commits", "epochs", "job.json", "manifest.json", "report.json"}
    assert {path.name for path in (tmp_path / ".rayskip").iterdir()} == records


def test_a_run_says_what_a_loading_replica_is_at(tmp_path: Path) -> None:
    seen: list[str] = []
    told = threading.Event()

    class SlowReplica(TinyReplica):
        def ready(self) -> ReplicaInfo:
            told.wait(20)
            return super().ready()

    class TellingPool(LocalPool):
        def wait(self, timeout_s: float) -> list[Event]:
            now = "" if told.is_set() else "model"
            return [Alive(0, ReplicaProgress(0, 0, now)), *super().wait(0 if now else timeout_s)]

    def look(progress: Progress) -> None:
        seen.append(progress.phase)
        if progress.phase == "loading: model":
            told.set()

    job = config(tmp_path)
    run_plan(
        job, plan(6), lambda job, source: TellingPool(lambda: SlowReplica(str(tmp_path))), on_progress=look
    )
    assert told.is_set()
    assert seen[-1] == "finished"


def test_what_replicas_warn_of_is_said_once_and_stays_in_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowReplica(TinyReplica):
        said = iter([["slow attention: no kernel"], ["slow attention: no kernel", "no compiler"]])
        both = threading.Barrier(2)

        def ready(self) -> ReplicaInfo:
            facts = {"warnings": next(self.said)}
            self.both.wait(30)
            return ReplicaInfo(0.1, {"host": "node-7"}, facts)

    job = config(tmp_path, cluster={"replicas": 2})
    report = run_plan(job, plan(6), lambda job, source: LocalPool(lambda: SlowReplica(job.output.path)))
    assert sorted(report.engine["warnings"]) == ["no compiler", "slow attention: no kernel"]
    said = [record.getMessage() for record in caplog.records]
    assert said.count("replica on node-7: slow attention: no kernel") == 1
    assert said.count("replica on node-7: no compiler") == 1


def test_time_to_go_is_told_from_the_first_token_on() -> None:
    meter = Meter(rows_resumed=5, most_tokens=100)
    meter.start(0.0)
    assert meter.eta_s(0.0, 15) is None
    meter.said(0, ReplicaProgress(0, 200))  # of ten rows to go, none is done: they may all come to the most
    assert meter.eta_s(20.0, 15) == (10 * 100 - 200) / 20
    meter.said(0, ReplicaProgress(5, 300))
    assert meter.eta_s(20.0, 15) == (10 * 60 - 300) / 20
    meter.committed(0, 4, 40)
    assert meter.eta_s(20.0, 15) == 0.0  # those committed took ten each
    meter.committed(0, 2, 440)
    assert meter.eta_s(20.0, 15) == (10 * 80 - 480) / 20


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    def never(shard: Shard) -> None:
        raise AssertionError("ran again")

    assert run(config(tmp_path)) == run(config(tmp_path), never)


@pytest.mark.parametrize("error", [ReplicaLost("signal 9"), StorageBusy("503")])
def test_passing_faults_are_retried(tmp_path: Path, error: Exception) -> None:
    left = [3, 1, 3]

    def mishap(shard: Shard) -> None:
        if shard.index in left:
            left.remove(shard.index)
            raise error

    report = run(config(tmp_path, cluster={"replicas": 2}), mishap)
    assert content(tmp_path) == whole()
    assert report.retries >= 3


def test_a_shard_that_never_succeeds_fails_the_job_and_the_rest_stays(tmp_path: Path) -> None:
    def mishap(shard: Shard) -> None:
        if shard.index == 2:
            raise ReplicaLost("signal 9")

    with pytest.raises(JobFailed, match=r"shard 2 \(rows 20 to 29 of a\) ends every replica") as failed:
        run(config(tmp_path, retry={"max_shard_attempts": 2}), mishap)
    committed = status(str(tmp_path)).shards
    assert (status(str(tmp_path)).state, status(str(tmp_path)).reason) == ("failed", str(failed.value))
    assert committed >= 4  # all but the shard and its neighbour on the first replica
    assert not (tmp_path / ".rayskip/manifest.json").exists()
    assert run(config(tmp_path)).shards_resumed == committed
    assert content(tmp_path) == whole()


def test_a_row_that_ends_replicas_is_left_out_of_its_shard(tmp_path: Path) -> None:
    """The shard still is one attempt file and one record over all of its rows."""
    left_out: list[tuple[tuple[int, str], ...]] = []

    def mishap(shard: Shard) -> None:
        if 23 in set(range(shard.start, shard.stop)) - {row for row, _ in shard.lost}:
            raise ReplicaLost("signal 11")
        if shard.lost and not shard.probe:
            left_out.append(shard.lost)

    report = run(config(tmp_path, retry={"max_shard_attempts": 2}), mishap)
    assert left_out == [((23, "signal 11"),)]
    assert content(tmp_path) == whole()
    assert (report.rows, report.completion_tokens) == (60, 420)


def test_status_tells_a_running_job_from_one_that_lost_its_driver(tmp_path: Path) -> None:
    seen: list[JobStatus] = []

    def look(progress: Progress) -> None:
        if progress.phase == "generating" and not seen:
            seen.append(status(str(tmp_path)))

    run(config(tmp_path), on_progress=look)
    (running,) = seen
    assert (running.state, running.finished, running.reason) == ("running", False, None)
    assert running.driver
    assert (running.driver.pid, running.driver.host) == (os.getpid(), socket.gethostname())
    assert "running (" in format_status(running)
    assert "ETA" in format_status(running)
    assert status(str(tmp_path)).state == "finished"

    records = tmp_path / ".rayskip"
    (records / "manifest.json").unlink()
    heartbeat, epoch = records / "epochs/000001-heartbeat.json", records / "epochs/000001.json"
    said = json.loads(heartbeat.read_text()) | {"ended": None}

    def state(seen: datetime, **claim: object) -> str:
        heartbeat.write_text(json.dumps(said | {"seen": seen.isoformat()}))
        epoch.write_text(json.dumps(json.loads(epoch.read_text()) | claim))
        return status(str(tmp_path)).state

    now = datetime.now(UTC)
    assert state(now) == "running"
    assert state(now - timedelta(minutes=5)) == "stale"
    assert "said nothing for 0:05:0" in format_status(status(str(tmp_path)))
    assert state(now, pid=2**22) == "stale"  # no process has the number
    assert state(now, host="elsewhere") == "running"
    heartbeat.unlink()
    assert status(str(tmp_path)).state == "unfinished"  # as of an earlier version


def test_an_error_of_the_user_is_not_retried(tmp_path: Path) -> None:
    def mishap(shard: Shard) -> None:
        raise InputError("a: gone")

    with pytest.raises(InputError, match="a: gone"):
        run(config(tmp_path), mishap)


@pytest.mark.parametrize(("limit", "fails"), [(3, True), (6, False), (0.05, True), (0.1, False)])
def test_max_failed_rows(tmp_path: Path, limit: float, fails: bool) -> None:
    job = config(tmp_path, retry={"max_failed_rows": limit})
    if fails:
        with pytest.raises(JobFailed, match=r"rows failed, .*max_failed_rows.*: odd_\d: \d, such as a row"):
            run(job)
    else:
        assert run(job).generations_failed == 12


def test_another_fingerprint_is_refused_and_fresh_starts_over(tmp_path: Path) -> None:
    run(config(tmp_path))
    pool = lambda job, source: LocalPool(lambda: TinyReplica(job.output.path))  # noqa: E731
    with pytest.raises(OutputError, match="different: model"):
        run_plan(config(tmp_path), plan(3, "f2"), pool)
    assert run_plan(config(tmp_path), plan(3, "f2"), pool, fresh=True).shards_resumed == 0
    assert content(tmp_path) == whole(3)


def test_a_later_driver_takes_over(tmp_path: Path) -> None:
    """The first driver's replica waits until the second driver has finished the job."""
    held, finished = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def mishap(shard: Shard) -> None:
        held.set()
        finished.wait(30)

    def first() -> None:
        try:
            run(config(tmp_path), mishap)
        except TakenOver as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(30)
    run(config(tmp_path))
    finished.set()
    thread.join(30)
    assert "took this job over" in str(errors[0])
    assert content(tmp_path) == whole()


@pytest.mark.parametrize("moment", ["before its write", "after its write"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_replica_that_outlives_its_driver_leaves_no_second_file(
    tmp_path: Path, moment: str, fresh: bool
) -> None:
    """It stops at a shard, with its driver, and wakes when another driver has finished the job, or another job."""
    stopped, woken = threading.Event(), threading.Event()
    begun: list[int] = []
    ended: list[int] = []

    def stop(shard: Shard) -> None:
        if shard.index == 2:
            stopped.set()
            assert woken.wait(30)

    def begins(shard: Shard) -> None:
        begun.append(shard.index)
        if moment == "before its write":
            stop(shard)

    def ends(shard: Shard) -> None:
        if moment == "after its write":
            stop(shard)
        ended.append(shard.index)

    def first() -> None:
        def pool(job: JobConfig, source: Source) -> LocalPool:
            return LocalPool(lambda: TinyReplica(job.output.path, begins, ends))

        with suppress(TakenOver):
            run_plan(config(tmp_path), plan(6), pool)

    thread = threading.Thread(target=first)
    thread.start()
    assert stopped.wait(30)
    while len(list(tmp_path.glob(".rayskip/commits/shard-*.json"))) < 5:  # its driver has nothing else to do
        time.sleep(0.01)
    second = plan(6, "f2" if fresh else "f1")
    run_plan(
        config(tmp_path),
        second,
        lambda job, source: LocalPool(lambda: TinyReplica(job.output.path)),
        fresh=fresh,
    )
    woken.set()
    thread.join(30)
    while sorted(begun) != sorted(ended):
        time.sleep(0.01)
    assert 2 in ended
    assert rows_read(tmp_path) == verify(str(tmp_path)).rows == 60
    assert len(list((tmp_path / "data").iterdir())) == 6


def test_strays_are_named_and_a_finished_run_sweeps_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as an earlier version's replica could leave; what is not ours by name is named and stays."""
    run(config(tmp_path))
    stray, foreign = "data/shard-00002-" + 32 * "a" + ".jsonl", "data/mine.jsonl"
    for path in (stray, foreign):
        (tmp_path / path).write_bytes(lines("a", 20, 30))
    (tmp_path / "data/.DS_Store").write_bytes(b"\0")
    with pytest.raises(OutputError) as refused:
        verify(str(tmp_path))
    assert f"no record names {stray}" in str(refused.value)
    assert f"no record names {foreign}" in str(refused.value)
    assert ".DS_Store" not in str(refused.value)
    assert status(str(tmp_path)).strays == [stray]
    run(config(tmp_path))
    assert f"deleted {stray}" in caplog.text
    assert sorted(path.name for path in (tmp_path / "data").iterdir())[:2] == [".DS_Store", "mine.jsonl"]
    (tmp_path / foreign).unlink()
    assert rows_read(tmp_path) == verify(str(tmp_path)).rows


def test_files_of_a_desktop_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(JobFailed):
        run(config(tmp_path, retry={"max_shard_attempts": 1}), fail_at(4))
    for folder in (".rayskip/commits", ".rayskip/epochs", "data"):
        (tmp_path / folder / ".DS_Store").write_bytes(b"\0")
        (tmp_path / folder / "notes.txt").write_text("mine")
    assert status(str(tmp_path)).driver
    run(config(tmp_path))
    assert content(tmp_path) == whole()
    run(config(tmp_path), fresh=True)
    assert (tmp_path / ".rayskip/commits/notes.txt").read_text() == "mine"


def fail_at(index: int) -> Callable[[Shard], None]:
    def mishap(shard: Shard) -> None:
        if shard.index == index:
            raise ReplicaLost("signal 9")

    return mishap


def only(*shards: int) -> Callable[[Shard], None]:
    """A mishap for a run that must redo these shards and no other."""

    def mishap(shard: Shard) -> None:
        assert shard.index in shards

    return mishap


@pytest.mark.parametrize("finished", [True, False])
def test_a_deleted_data_file_is_found_at_the_start_and_its_shard_redone(
    tmp_path: Path, finished: bool
) -> None:
    run(config(tmp_path)) if finished else interrupted(tmp_path)
    gone = next((tmp_path / "data").glob("shard-00001-*"))
    gone.unlink()
    assert status(str(tmp_path)).lost == [f"data/{gone.name}"]
    run(config(tmp_path), only(1) if finished else only(1, 4, 5))
    assert content(tmp_path) == whole()
    assert verify(str(tmp_path)).rows == 60


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_data_file_stays_until_repair_takes_its_shard_back(tmp_path: Path, finished: bool) -> None:
    run(config(tmp_path)) if finished else interrupted(tmp_path)
    changed, cut = (next((tmp_path / "data").glob(f"shard-0000{shard}-*")) for shard in (1, 3))
    changed.write_bytes(changed.read_bytes().replace(b'"a"', b'"b"'))  # of the same size
    cut.write_bytes(b"cut")
    with pytest.raises(
        OutputError, match=rf"data/{cut.name} has 3 bytes, .* committed; .*verify OUT --repair"
    ):
        run(config(tmp_path), only())
    assert cut.read_bytes() == b"cut"
    assert len(repair(str(tmp_path))) == 2
    assert not (tmp_path / ".rayskip/manifest.json").exists()
    run(config(tmp_path), only(1, 3) if finished else only(1, 3, 4, 5))
    assert content(tmp_path) == whole()
    assert repair(str(tmp_path)) == []
    assert verify(str(tmp_path)).rows == 60


def test_repair_takes_a_damaged_record_back_with_its_file(tmp_path: Path) -> None:
    """The file could be damaged too, and a replica would take it for an attempt before its own."""
    run(config(tmp_path))
    (tmp_path / ".rayskip/commits/shard-00004.json").write_bytes(b"{")
    (tmp_path / ".rayskip/manifest.json").write_bytes(b"[]")
    with pytest.raises(OutputError, match=r"manifest\.json is damaged"):
        verify(str(tmp_path))
    assert "shard-00004.json is damaged" in repair(str(tmp_path))[0]
    assert not list((tmp_path / "data").glob("shard-00004-*"))
    run(config(tmp_path), only(4))
    assert content(tmp_path) == whole()


def interrupted(out: Path) -> None:
    """A job with shards 0 to 3 committed."""
    run(config(out))
    (out / ".rayskip/manifest.json").unlink()
    for shard in (4, 5):
        (out / f".rayskip/commits/shard-0000{shard}.json").unlink()
        next((out / "data").glob(f"shard-0000{shard}-*")).unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_commits_what_is_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    def mishap(shard: Shard) -> None:
        if shard.index == 1:
            os.kill(os.getpid(), number)
            time.sleep(0.8)

    before = signal.signal(number, signal.default_int_handler)  # ignored where the tests run under nohup
    try:
        with pytest.raises(Interrupted, match="the same command resumes") as caught:
            run(config(tmp_path), mishap)
        assert caught.value.exit_code == 75
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    committed = status(str(tmp_path)).shards
    assert status(str(tmp_path)).state == "interrupted"
    assert "interrupted: stopped by a signal" in format_status(status(str(tmp_path)))
    assert 2 <= committed < 6
    assert run(config(tmp_path)).shards_resumed == committed
    assert content(tmp_path) == whole()


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(config(tmp_path), lambda shard: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert content(tmp_path) == whole()


def test_a_folder_that_vanishes_stops_the_job(tmp_path: Path) -> None:
    """Nothing that is written afterwards could be told whose it is."""
    out = tmp_path / "out"

    def mishap(shard: Shard) -> None:
        if shard.index == 2:
            out.rename(tmp_path / "moved")

    with pytest.raises((OutputError, TakenOver), match=r"job\.json is gone or another job's|No such file"):
        run(config(out), mishap)
    assert not (out / ".rayskip/job.json").exists()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def mishap(shard: Shard) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(Interrupted, match="at once"):
        run(config(tmp_path), mishap, shards=1)
    assert time.monotonic() - began < 5


def test_an_empty_input_is_a_finished_job(tmp_path: Path) -> None:
    assert run(config(tmp_path), shards=0).rows == 0
    assert content(tmp_path) == b""


def test_a_job_past_its_limit_fails_again_when_run_again(tmp_path: Path) -> None:
    """Also when its last shard is what took it past: every shard is committed, and no manifest may follow."""
    job = config(tmp_path / "out", retry={"max_failed_rows": 1})
    for _ in range(2):
        with pytest.raises(JobFailed, match="max_failed_rows = 1"):
            run(job, shards=2)
    assert not (tmp_path / "out/.rayskip/manifest.json").exists()
