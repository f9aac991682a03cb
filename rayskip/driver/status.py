"""How far the job in an output folder is, read from its records. Does not know whether a driver runs."""

from __future__ import annotations

from dataclasses import dataclass

from rayskip.data.folder import JOB, MANIFEST, open_folder
from rayskip.data.storage import Storage
from rayskip.driver.commit import data_files, epoch_keys, read, read_commits, sizes
from rayskip.driver.records import EpochRecord, JobRecord, Manifest
from rayskip.driver.report import total
from rayskip.errors import OutputError


@dataclass(frozen=True)
class JobStatus:
    """rows: input rows; rows_failed: output rows. driver: the last to claim the job, alive or not.

    lost: committed files that are missing or have another size. strays: files of a finished job's data/ that no
    record names, though they have a name of ours.
    """

    name: str
    finished: bool
    shards: int
    shards_total: int
    rows: int
    rows_total: int
    rows_failed: int
    completion_tokens: int
    driver: EpochRecord | None
    lost: list[str]
    strays: list[str]


def status(out: str) -> JobStatus:
    """The state of the job in folder `out`. Raises OutputError when there is none."""
    storage = open_folder(out)
    job = read_job(storage)
    commits = read_commits(storage, job.since)
    finished = read(storage, MANIFEST, Manifest) is not None
    committed, there = sizes(commits), data_files(storage)
    last = max(epoch_keys(storage), default=None)
    return JobStatus(
        name=job.name,
        finished=finished,
        shards=len(commits),
        shards_total=job.shards,
        rows=sum(commit.stop - commit.start for commit in commits),
        rows_total=job.rows,
        rows_failed=sum(commit.rows_failed for commit in commits),
        completion_tokens=total(commits).completion_tokens,
        driver=read(storage, last, EpochRecord) if last else None,
        lost=sorted(path for path, size in committed.items() if there.get(path) != size),
        strays=sorted(there.keys() - committed.keys()) if finished else [],
    )


def finished_job(out: str) -> str | None:
    """What `--fresh` would delete of a finished job in folder `out`, in words; None when there is none."""
    manifest = read(open_folder(out), MANIFEST, Manifest)
    if manifest is None:
        return None
    size = sum(file.bytes for file in manifest.files)
    written = f", written {manifest.written}" if manifest.written else ""
    return (
        f"the finished job {manifest.name!r}: {manifest.rows:,} rows in {len(manifest.files):,} files, "
        f"{size:,} bytes{written}"
    )


def read_job(storage: Storage) -> JobRecord:
    """The folder's job.json. Raises OutputError when there is none."""
    job = read(storage, JOB, JobRecord)
    if job is None:
        raise OutputError(f"{storage.url}: no {JOB} there, so it is not the output folder of a job")
    return job
