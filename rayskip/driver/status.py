"""How far the job in an output folder is, read from its records and from what its last driver said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayskip.data.folder import JOB, MANIFEST, open_folder
from rayskip.data.records import RowErrors
from rayskip.data.storage import Storage
from rayskip.driver.heartbeat import Heartbeat, is_alive, last_driver, silent_s
from rayskip.driver.record_store import Damaged, data_files, read, read_commits, sizes
from rayskip.driver.records import EpochRecord, JobRecord, Manifest
from rayskip.driver.report import failure, total, total_errors
from rayskip.errors import OutputError, counted

State = Literal["running", "finished", "failed", "interrupted", "stale", "unfinished"]
"""stale: its driver is gone without a word, or silent for two minutes. unfinished: no driver ever said anything."""


@dataclass(frozen=True)
class Driver:
    """The last to claim a job, alive or not. since: UTC, ISO 8601. silent_s: seconds since it said something; None
    where it never did, as those of earlier versions. phase: what it was at."""

    host: str
    pid: int
    since: str
    silent_s: float | None
    phase: str | None


@dataclass(frozen=True)
class JobStatus:
    """state: see State; finished: all of the job is there, also of one that failed since no row succeeded.

    reason: why it failed, or what stopped it. rows: of the input, those committed; rows_done: with those that a
    running driver has done beyond. generations: committed, and of them those without an answer and those cut off at
    max_tokens. errors: those that failed, by error_type. tok_s, eta_s: of a running driver, tokens per second and
    seconds to go. lost: committed files that are missing or have another size. strays: files of a finished job's
    data/ that no record names, though they have a name of ours.
    """

    name: str
    state: State
    finished: bool
    reason: str | None
    shards: int
    shards_total: int
    rows: int
    rows_done: int
    rows_total: int
    generations: int
    generations_failed: int
    generations_cut: int
    errors: dict[str, RowErrors]
    completion_tokens: int
    tok_s: float | None
    eta_s: float | None
    driver: Driver | None
    lost: list[str]
    strays: list[str]


def status(out: str) -> JobStatus:
    """The state of the job in folder `out`. Raises OutputError when there is none."""
    storage = open_folder(out)
    job = read_job(storage)
    driver, heartbeat = last_driver(storage)  # before the records: one that ends now has written them all
    commits = read_commits(storage, job.since)
    finished = read(storage, MANIFEST, Manifest) is not None
    committed, there = sizes(commits), data_files(storage)
    whole, errors = total(commits), total_errors(commits)
    rows = sum(commit.stop - commit.start for commit in commits)
    generations = sum(commit.rows for commit in commits)
    failed = sum(commit.rows_failed for commit in commits)
    state = _state(driver, heartbeat)
    reason = heartbeat.reason if heartbeat else None
    if finished:
        reason = failure(generations, failed, errors)
        state = "failed" if reason else "finished"
    running = heartbeat if state == "running" else None
    return JobStatus(
        name=job.name,
        state=state,
        finished=finished,
        reason=reason,
        shards=len(commits),
        shards_total=job.shards,
        rows=rows,
        rows_done=max(rows, running.rows if running else 0),
        rows_total=job.rows,
        generations=generations,
        generations_failed=failed,
        generations_cut=whole.rows_cut,
        errors=errors,
        completion_tokens=whole.completion_tokens,
        tok_s=running.tok_s if running else None,
        eta_s=None if not running or running.eta_s is None else max(0.0, running.eta_s - silent_s(running)),
        driver=_driver(driver, heartbeat) if driver else None,
        lost=sorted(path for path, size in committed.items() if there.get(path) != size),
        strays=sorted(there.keys() - committed.keys()) if finished else [],
    )


def _state(driver: EpochRecord | None, heartbeat: Heartbeat | None) -> State:
    """Of a job that is not finished."""
    if driver is None or heartbeat is None:
        return "unfinished"
    if heartbeat.ended:  # "finished" of a job whose manifest has been taken back since
        return "unfinished" if heartbeat.ended == "finished" else heartbeat.ended
    return "running" if is_alive(driver, heartbeat) else "stale"


def _driver(driver: EpochRecord, heartbeat: Heartbeat | None) -> Driver:
    silent = silent_s(heartbeat) if heartbeat else None
    return Driver(driver.host, driver.pid, driver.started, silent, heartbeat.phase if heartbeat else None)


def finished_job(out: str) -> str | None:
    """What `--fresh` would delete of a finished job in folder `out`, in words; None when there is none."""
    try:
        manifest = read(open_folder(out), MANIFEST, Manifest)
    except Damaged:
        return f"a job that was finished, and whose {MANIFEST} is damaged"
    if manifest is None:
        return None
    size = sum(file.bytes for file in manifest.files)
    written = f", written {manifest.written}" if manifest.written else ""
    return (
        f"the finished job {manifest.name!r}: {counted(manifest.rows, 'generation')} in "
        f"{counted(len(manifest.files), 'file')}, {size:,} bytes{written}"
    )


def read_job(storage: Storage) -> JobRecord:
    """The folder's job.json. Raises OutputError when there is none."""
    job = read(storage, JOB, JobRecord)
    if job is None:
        raise OutputError(f"{storage.url}: no {JOB} there, so it is not the output folder of a job")
    return job
