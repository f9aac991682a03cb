"""The JSON documents of an output folder, and the one fold from commit records to a manifest.

Does not know storage. Layout, relative to OUT:

    job.json                       what the job is; created once
    _epochs/000001.json            one per driver that ever ran; the highest is the one that may commit
    data/shard-00042-<hex>.parquet attempt files; only those named by a commit record count
    _commits/shard-00042.json      created once per shard: the first creator wins
    report.json                    throughput of the run that finished the job
    manifest.json                  created last; a reader that finds it sees the whole job

Names that start with "_" are skipped by the usual dataset readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rayskip.data.records import Shard, ShardResult

JOB = "job.json"
MANIFEST = "manifest.json"
REPORT = "report.json"
DATA = "data"
COMMITS = "_commits"
EPOCHS = "_epochs"

# The only file names a record may hold, so that no record can point outside its folder.
DataFile = Field(pattern=r"^data/shard-[0-9]+-[0-9a-f]+\.[a-z]+$")


class Document(BaseModel):
    """A JSON document: strict, immutable, indented for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class JobRecord(Document):
    """What the job is. parts: hash per part of what decides the output; fingerprint: hash of them all.

    rows: input rows. config: the job's config as given, for people; only `parts` decides a resume.
    """

    version: int = 1
    name: str
    fingerprint: str
    parts: dict[str, str]
    shards: int
    rows: int
    config: dict[str, Any]


class EpochRecord(Document):
    """A driver's claim on the job. Wall-clock time is for people: no decision reads it."""

    epoch: int
    nonce: str
    host: str
    pid: int
    started: str


class CommitRecord(Document):
    """A shard is done: this attempt file is its output.

    name, start, stop: the input rows (see Shard). rows, rows_failed: output rows. bytes, sha256: of the file.
    """

    shard: int
    name: str
    start: int
    stop: int
    file: str = DataFile
    sha256: str
    bytes: int
    rows: int
    rows_failed: int
    stats: dict[str, Any]
    fingerprint: str
    epoch: int
    nonce: str


class ManifestFile(Document):
    """One data file, relative to the output folder."""

    path: str = DataFile
    shard: int
    rows: int
    rows_failed: int
    bytes: int
    sha256: str


class Manifest(Document):
    """A finished job: every data file, in shard order. skip: the policy its layers were skipped by."""

    version: int = 1
    name: str
    fingerprint: str
    format: str
    skip: dict[str, Any]
    rows: int
    rows_failed: int
    files: list[ManifestFile]


def commit_key(shard: int) -> str:
    return f"{COMMITS}/shard-{shard:05d}.json"


def epoch_key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.json"


def to_commit(shard: Shard, result: ShardResult, fingerprint: str, epoch: int, nonce: str) -> CommitRecord:
    """The commit record of a shard's attempt."""
    return CommitRecord(
        shard=shard.index,
        name=shard.name,
        start=shard.start,
        stop=shard.stop,
        file=result.path,
        sha256=result.sha256,
        bytes=result.bytes,
        rows=result.rows,
        rows_failed=result.rows_failed,
        stats=vars(result.stats),
        fingerprint=fingerprint,
        epoch=epoch,
        nonce=nonce,
    )


def fold(
    name: str, fingerprint: str, format: str, skip: dict[str, Any], commits: Iterable[CommitRecord]
) -> Manifest:
    """The manifest of a set of commit records, whatever their order and however often one is given."""
    by_shard: Mapping[int, CommitRecord] = {commit.shard: commit for commit in commits}
    files = [
        ManifestFile(
            path=commit.file,
            shard=commit.shard,
            rows=commit.rows,
            rows_failed=commit.rows_failed,
            bytes=commit.bytes,
            sha256=commit.sha256,
        )
        for _, commit in sorted(by_shard.items())
    ]
    return Manifest(
        name=name,
        fingerprint=fingerprint,
        format=format,
        skip=skip,
        rows=sum(file.rows for file in files),
        rows_failed=sum(file.rows_failed for file in files),
        files=files,
    )
