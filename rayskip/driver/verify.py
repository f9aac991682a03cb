"""Is the job in an output folder whole: hashes, counts, records, and every row exactly once.

Trusts nothing that a run said: reads every data file. Holds one file in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rayskip.data.output import read_identities
from rayskip.data.storage import Storage, open_storage
from rayskip.driver.commit import read, read_commits
from rayskip.driver.records import MANIFEST, CommitRecord, JobRecord, Manifest, fold
from rayskip.driver.status import read_job
from rayskip.errors import OutputError

MOST_SHOWN = 10


@dataclass(frozen=True)
class VerifyResult:
    """What was verified. rows, rows_failed: output rows."""

    name: str
    files: int
    bytes: int
    rows: int
    rows_failed: int


def verify(out: str) -> VerifyResult:
    """Verify the finished job in folder `out`. Raises OutputError listing what is wrong."""
    storage = open_storage(out)
    job = read_job(storage)
    manifest = read(storage, MANIFEST, Manifest)
    if manifest is None:
        raise OutputError(f"{storage.url}: the job is not finished ({MANIFEST} is not there); run it again")
    problems = list(_problems(storage, job, manifest))
    if problems:
        more = len(problems) - MOST_SHOWN
        shown = problems[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise OutputError(f"{storage.url}: " + "; ".join(shown))
    return VerifyResult(
        name=manifest.name,
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        rows=manifest.rows,
        rows_failed=manifest.rows_failed,
    )


def _problems(storage: Storage, job: JobRecord, manifest: Manifest) -> Iterator[str]:
    commits = read_commits(storage)
    if manifest != fold(job.name, job.fingerprint, manifest.format, manifest.skip, commits):
        yield f"{MANIFEST} does not match the commit records"
    yield from _partition_problems(job, commits)
    for commit in commits:
        yield from _file_problems(storage, manifest.format, commit)


def _partition_problems(job: JobRecord, commits: list[CommitRecord]) -> Iterator[str]:
    """Do the shards' ranges cover every input row once?"""
    if [commit.shard for commit in commits] != list(range(job.shards)):
        yield f"{len(commits)} of {job.shards} shards are committed"
    ends: dict[str, int] = {}
    for commit in sorted(commits, key=lambda commit: (commit.name, commit.start)):
        if commit.fingerprint != job.fingerprint:
            yield f"shard {commit.shard} is of another job"
        expected = ends.get(commit.name, 0)
        if commit.start != expected:
            yield f"shard {commit.shard} begins at row {commit.start} of {commit.name}, not at {expected}"
        ends[commit.name] = commit.stop
    rows = sum(commit.stop - commit.start for commit in commits)
    if rows != job.rows:
        yield f"{rows} input rows are covered, the job has {job.rows}"


def _file_problems(storage: Storage, format: str, commit: CommitRecord) -> Iterator[str]:
    """Is a data file the one that was committed, with each sample of each of its rows once?"""
    data = storage.get(commit.file)
    if data is None:
        yield f"{commit.file} is missing"
        return
    if hashlib.sha256(data).hexdigest() != commit.sha256:
        yield f"{commit.file} has changed since it was committed (sha256 differs)"
        return
    identities = read_identities(data, format)
    if len(identities) != commit.rows:
        yield f"{commit.file} holds {len(identities)} rows, {commit.rows} were committed"
    samples = Counter((name, row) for name, row, _ in identities)
    if samples.keys() != {(commit.name, row) for row in range(commit.start, commit.stop)}:
        yield f"{commit.file} does not hold exactly rows {commit.start} to {commit.stop - 1} of {commit.name}"
    wanted = {(name, row, sample) for (name, row), count in samples.items() for sample in range(count)}
    if set(identities) != wanted:
        yield f"{commit.file} holds a sample twice or lacks one"
