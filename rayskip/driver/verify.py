"""Is the job in an output folder whole: hashes, counts, records, every row exactly once; and what is to be redone.

Trusts nothing that a run said: reads every data file. Holds one file in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from rayskip.data.folder import DATA, MANIFEST, open_folder
from rayskip.data.output import identity_problems, read_outcomes
from rayskip.data.storage import Storage
from rayskip.driver.commit import sweep, take_back
from rayskip.driver.lease import Lease
from rayskip.driver.record_store import REPAIR, Damaged, data_files, read, scan_commits, sizes
from rayskip.driver.records import CommitRecord, JobRecord, Manifest, commit_key, fold
from rayskip.driver.status import read_job
from rayskip.errors import OutputError, counted

MOST_SHOWN = 10


@dataclass(frozen=True)
class VerifyResult:
    """What was verified. rows: of the input."""

    name: str
    files: int
    bytes: int
    rows: int
    generations: int
    generations_failed: int


def verify(out: str) -> VerifyResult:
    """Verify the finished job in folder `out`. Raises OutputError listing what is wrong."""
    storage = open_folder(out)
    job = read_job(storage)
    manifest = read(storage, MANIFEST, Manifest)
    if manifest is None:
        raise OutputError(f"{storage.url}: the job is not finished (it has no manifest.json); run it again")
    problems = list(_problems(storage, job, manifest))
    found = problems + list(_strays(storage, manifest))
    if found:
        more = len(found) - MOST_SHOWN
        shown = found[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise OutputError(f"{storage.url}: " + "; ".join(shown) + (f". {REPAIR}" if problems else ""))
    return VerifyResult(
        name=manifest.name,
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        rows=job.rows,
        generations=manifest.rows,
        generations_failed=manifest.rows_failed,
    )


def repair(out: str) -> list[str]:
    """Take back what is damaged in folder `out`, finished or not, so that the next run redoes those shards alone.

    Claims the folder first: a driver that still runs stops. Returns what was wrong, nothing for a job that is whole
    as far as it is committed. Raises OutputError when there is no job.
    """
    storage = open_folder(out)
    job = read_job(storage)
    Lease(storage)
    commits, damaged = scan_commits(storage)
    problems = list(damaged.values())
    bad = set(damaged)
    for commit in commits:
        found = list(_file_problems(storage, job, commit))
        if commit.fingerprint != job.fingerprint:
            found.append(f"shard {commit.shard} is of another job")
        if found:
            bad.add(commit_key(commit.shard))
            problems += found
    good = [commit for commit in commits if commit_key(commit.shard) not in bad]
    if bad:
        kept = {commit.file for commit in good}
        shards = {PurePosixPath(key).stem for key in bad}
        files = [path for path in data_files(storage) if _shard_of(path) in shards and path not in kept]
        take_back(storage, files, bad)
        return problems
    try:
        manifest = read(storage, MANIFEST, Manifest)
    except Damaged as error:
        storage.delete([MANIFEST])
        return [str(error)]
    if manifest and manifest != fold(job.name, job.fingerprint, manifest.format, manifest.skip, good):
        storage.delete([MANIFEST])
        return ["manifest.json does not match the commit records"]
    if manifest:
        sweep(storage, manifest)
    return []


def _shard_of(path: str) -> str:
    """The part of a data file's name that names its shard, as in the commit record's."""
    return PurePosixPath(path).stem.rsplit("-", 1)[0]


def _problems(storage: Storage, job: JobRecord, manifest: Manifest) -> Iterator[str]:
    commits, damaged = scan_commits(storage)
    yield from damaged.values()
    if manifest != fold(job.name, job.fingerprint, manifest.format, manifest.skip, commits):
        yield "manifest.json does not match the commit records"
    yield from _partition_problems(job, commits)
    for commit in commits:
        yield from _file_problems(storage, job, commit)


def _strays(storage: Storage, manifest: Manifest) -> Iterator[str]:
    """Files in data/ that dataset readers would take for the job's; they pass over names with "." or "_" first."""
    ours = data_files(storage)
    for path in sorted(storage.list(DATA).keys() - sizes(manifest).keys()):
        if not any(part.startswith((".", "_")) for part in PurePosixPath(path).parts):
            way_out = "the run command deletes it" if path in ours else "move it away"
            yield f"no record names {path}, and readers of {DATA}/ would read it too: {way_out}"


def _partition_problems(job: JobRecord, commits: list[CommitRecord]) -> Iterator[str]:
    """Do the shards' ranges cover every input row once?"""
    found = [commit.shard for commit in commits]
    if len(found) != job.shards or found != list(range(len(found))):
        yield f"{len(commits):,} of {counted(job.shards, 'shard')} committed"
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
        yield f"{counted(rows, 'input row')} covered, the job has {job.rows:,}"


def _file_problems(storage: Storage, job: JobRecord, commit: CommitRecord) -> Iterator[str]:
    """Is a data file the one that was committed, with each sample of each of its rows once?"""
    data = storage.get(commit.file)
    if data is None:
        yield f"{commit.file} is missing"
        return
    if hashlib.sha256(data).hexdigest() != commit.sha256:
        yield f"{commit.file} has changed since it was committed (sha256 differs)"
        return
    outcomes = read_outcomes(data, job.format, job.prefix)
    if len(outcomes) != commit.rows:
        yield f"{commit.file} holds {counted(len(outcomes), 'generation')}, {commit.rows:,} were committed"
    for problem in identity_problems(outcomes, commit.name, commit.start, commit.stop):
        yield f"{commit.file} {problem}"
