"""The JSON documents of an output folder, and the one fold from commit records to a manifest.

Does not know storage; `data/folder.py` has the layout. job.json is created once. The driver of the highest epoch is
the one that may commit; how far a driver is, it writes beside its epoch again and again, for people. A shard's
data file is created once, named by the job's nonce, and counts once it is committed. A commit record is created
once: the first creator wins. manifest.json is created last.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

import rayskip
from rayskip.data.folder import COMMITS, EPOCHS
from rayskip.data.output import SUFFIXES
from rayskip.data.records import RowErrors, Shard, ShardResult
from rayskip.errors import shown
from rayskip.stats import Stats

VERSION = 1
"""Of the folder's format. It grows only when an older rayskip would misread a folder: a field that is added has a
default, so that documents without it load, an unknown field is passed over, and a field with a new name is found
under its old one too (_RENAMED)."""

_RENAMED = {
    "min_receipts": "min_audits",
    "receipts": "audits",
    "receipt_exact": "audit_exact",
    "receipt_edit_similarity": "audit_edit_similarity",
    "receipt_rouge_l": "audit_rouge_l",
}
"""Names in folders of before there was another word, and today's."""

_COUNTERS = frozenset(field.name for field in fields(Stats))

# The only file names a record may hold, so that no record can point outside its folder.
DataFile = Field(pattern=r"^data/shard-[0-9]+-[0-9a-f]+\.[a-z]+$")


def _check_moment(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("names no time zone")
    return text


Moment = Annotated[str, AfterValidator(_check_moment)]
"""A point in time as ISO 8601 has it, with its zone."""


class Document(BaseModel):
    """A JSON document: immutable, indented for people. See VERSION for how it may change."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


class Signed(Document):
    """A document that says who wrote it. rayskip: the version; written: when (UTC, ISO 8601), for people.

    Both are None in folders of before they did.
    """

    rayskip: str | None = None
    written: Moment | None = None


def signature() -> dict[str, str]:
    """The fields of a signed document, for one that is written now."""
    now = datetime.datetime.now(datetime.UTC)
    return {"rayskip": rayskip.__version__, "written": now.isoformat(timespec="seconds")}


class JobRecord(Signed):
    """What the job is: whether another run's is the same, `identity.differences` tells.

    fingerprint: hash of what decided the output when the job began; ties its commit records to it.
    parts: hash of each content, files and weights. stamps: hash of the input files' sizes and times of change, by
    which earlier versions knew them; not written. config: the job's config as given, every key of it.
    date: that chat templates tell as today's; None where none asks for it. prefix: of the output columns' names.
    shard_rows: most rows of a shard; in folders of before it was chosen, what the config says. rows: input rows.
    nonce: new whenever a job begins in the folder; "" before it does, and in folders of earlier versions.
    since: the epoch in which it began: commit records of earlier ones are of a job before it that --fresh deleted.
    """

    version: int = VERSION
    name: str
    fingerprint: str
    parts: dict[str, str]
    stamps: str = Field("", exclude=True)
    shards: int
    rows: int
    config: dict[str, Any]
    date: datetime.date | None = None
    prefix: str = ""
    shard_rows: int
    nonce: str = Field("", pattern="^[0-9a-f]*$")
    since: int = 0

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, values: dict[str, Any]) -> dict[str, Any]:
        config = values.get("config")
        output = config.get("output") if isinstance(config, dict) else None
        return {"shard_rows": output.get("shard_rows") if isinstance(output, dict) else None} | values

    @property
    def format(self) -> str:
        """Of the data files."""
        return str(self.config["output"].get("format", "parquet"))

    @property
    def begun(self) -> int:
        """When the job began, in seconds since 1970; 0 in folders that do not tell."""
        return int(datetime.datetime.fromisoformat(self.written).timestamp()) if self.written else 0

    @field_validator("config")
    @classmethod
    def _check_sections(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name in ("input", "output"):
            if not isinstance(config.get(name), dict):
                raise ValueError(f"has no section {name}")
        if config["output"].get("format", "parquet") not in SUFFIXES:
            raise ValueError(f"output.format is {config['output']['format']!r}")
        quality = config.get("quality")
        return config | {"quality": _renamed(quality)} if isinstance(quality, dict) else config


class EpochRecord(Document):
    """A driver's claim on the job. Wall-clock time is for people: no decision reads it.

    rayskip: its version; None from before it was told.
    """

    epoch: int
    nonce: str
    host: str
    pid: int
    started: Moment
    rayskip: str | None = None


class CommitRecord(Signed):
    """A shard is done: this file is its output.

    name, start, stop: the input rows (see Shard). rows, rows_failed: output rows. bytes, sha256: of the file.
    errors: the output rows that failed, by error_type; empty in records of before these were told apart.
    input_rows_failed: input rows of which any sample failed. date, shards, shard_rows: the job's (see JobRecord),
    should its job.json be lost. None in records of before there were these.
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
    errors: dict[str, RowErrors] = Field(default_factory=dict)
    input_rows_failed: int | None = None
    date: datetime.date | None = None
    shards: int | None = None
    shard_rows: int | None = None

    @field_validator("stats")
    @classmethod
    def _check_stats(cls, stats: dict[str, Any]) -> dict[str, Any]:
        _counters(stats)
        return stats

    @property
    def failed_input_rows(self) -> int:
        """`input_rows_failed`; in records that do not tell, as if a row fails with all its samples."""
        if self.input_rows_failed is not None:
            return self.input_rows_failed
        return round(self.rows_failed * (self.stop - self.start) / max(1, self.rows))

    @property
    def counters(self) -> Stats:
        """`stats` as counters that add; those that this version does not know are left out."""
        return _counters(self.stats)


class ManifestFile(Document):
    """One data file, relative to the output folder."""

    path: str = DataFile
    shard: int
    rows: int
    rows_failed: int
    bytes: int
    sha256: str


class Manifest(Signed):
    """A finished job: every data file, in shard order. skip: the policy its layers were skipped by.

    rayskip, written: all versions that committed, and the time of the last commit.
    """

    version: int = VERSION
    name: str
    fingerprint: str
    format: str
    skip: dict[str, Any]
    rows: int
    rows_failed: int
    files: list[ManifestFile]


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """The same values under today's names."""
    return {_RENAMED.get(name, name): value for name, value in values.items()}


def _counters(stats: dict[str, Any]) -> Stats:
    """Raises ValueError for what is no counter."""
    counters = Stats()
    for name, value in _renamed(stats).items():
        if name not in _COUNTERS:
            continue
        numbers = value.values() if isinstance(value, dict) else [value]
        like_ours = isinstance(value, dict) == isinstance(getattr(counters, name), dict)
        if not like_ours or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name} is {shown(value)}")
        setattr(counters, name, value)
    return counters


def commit_key(shard: int) -> str:
    return f"{COMMITS}/shard-{shard:05d}.json"


def epoch_key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}.json"


def to_commit(shard: Shard, result: ShardResult, job: JobRecord, epoch: int, nonce: str) -> CommitRecord:
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
        fingerprint=job.fingerprint,
        epoch=epoch,
        nonce=nonce,
        errors=result.errors,
        input_rows_failed=result.input_rows_failed,
        date=job.date,
        shards=job.shards,
        shard_rows=job.shard_rows,
        **signature(),
    )


def fold(
    name: str, fingerprint: str, format: str, skip: dict[str, Any], commits: Iterable[CommitRecord]
) -> Manifest:
    """The manifest of a set of commit records, whatever their order and however often one is given."""
    by_shard: Mapping[int, CommitRecord] = {commit.shard: commit for commit in commits}
    versions = sorted({commit.rayskip for commit in by_shard.values() if commit.rayskip})
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
        rayskip=", ".join(versions) or None,
        written=max((commit.written for commit in by_shard.values() if commit.written), default=None),
    )
