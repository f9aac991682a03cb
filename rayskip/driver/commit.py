"""The output folder's protocol: create-only records, and an epoch per driver that fences older ones.

Does not know shards' contents or replicas. First creator wins whatever number of drivers runs: epochs only
save work, correctness does not rest on them. Nothing compares wall clocks.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

import rayskip
from rayskip.data.records import Shard, ShardResult
from rayskip.data.storage import Storage, probe
from rayskip.driver.identity import differences
from rayskip.driver.records import (
    COMMITS,
    DATA,
    EPOCHS,
    JOB,
    MANIFEST,
    REPORT,
    VERSION,
    CommitRecord,
    Document,
    EpochRecord,
    JobRecord,
    Manifest,
    Signed,
    commit_key,
    epoch_key,
    to_commit,
)
from rayskip.errors import OutputError

D = TypeVar("D", bound=Document)

_OUR_DATA = re.compile(r"data/shard-\d+-[0-9a-f]+\.[a-z]+")
_READERS = 16
_WRITERS = 32


class _Head(Signed):
    """What documents of every format have: enough to tell whether the rest can be read."""

    version: int = 1


def read(storage: Storage, key: str, kind: type[D]) -> D | None:
    """A document of the folder; None when absent. Raises OutputError when it is not a valid one, or of a format
    that is newer than VERSION."""
    data = storage.get(key)
    if data is None:
        return None
    try:
        head = _Head.model_validate_json(data)
        if head.version > VERSION:
            raise OutputError(
                f"{storage.url}/{key} was written by a newer rayskip, {head.rayskip}; this is {rayskip.__version__}"
            )
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OutputError(f"{storage.url}/{key} is damaged: {where} {first['msg']}".rstrip()) from error


def read_commits(storage: Storage) -> list[CommitRecord]:
    """All commit records, by shard. Raises OutputError for one that is damaged or misnamed."""
    keys = sorted(storage.list(COMMITS))
    with ThreadPoolExecutor(_READERS) as readers:
        records = readers.map(lambda key: read(storage, key, CommitRecord), keys)
    found = [record for record in records if record is not None]
    for key, record in zip(keys, found, strict=True):
        if key != commit_key(record.shard):
            raise OutputError(f"{storage.url}/{key} is damaged: it holds shard {record.shard}")
    return sorted(found, key=lambda record: record.shard)


class Lease:
    """A driver's epoch. A driver that sees a later epoch has been replaced and stops."""

    def __init__(self, storage: Storage) -> None:
        """Claim the next epoch, fencing the driver before."""
        self._storage = storage
        while True:
            self.epoch = 1 + max((int(PurePosixPath(key).stem) for key in storage.list(EPOCHS)), default=0)
            claim = EpochRecord(
                epoch=self.epoch,
                nonce=uuid.uuid4().hex,
                host=socket.gethostname(),
                pid=os.getpid(),
                started=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            key = epoch_key(self.epoch)
            # Told "exists" by a retry whose first reply was lost, the nonce says that it is ours.
            if storage.create(key, claim.to_bytes()) or read(storage, key, EpochRecord) == claim:
                return

    def check(self) -> None:
        """Raises OutputError when a later driver has taken the job over."""
        later = read(self._storage, epoch_key(self.epoch + 1), EpochRecord)
        if later is not None:
            raise OutputError(
                f"{self._storage.url}: another driver took this job over "
                f"(process {later.pid} on {later.host}, since {later.started}); this one stops"
            )


def open_job(storage: Storage, record: JobRecord, fresh: bool) -> Lease:
    """Make the folder this job's and this driver's; job.json is created when there is none.

    fresh: an earlier job's files are deleted. Raises OutputError when the folder holds another job, before
    a driver that may still run it is fenced.
    """
    if not fresh:
        adopt(storage, record)
    probe(storage)
    lease = Lease(storage)
    if fresh:
        clear(storage)
    if not storage.create(JOB, record.to_bytes()):
        adopt(storage, record)
    return lease


def adopt(storage: Storage, record: JobRecord) -> JobRecord:
    """What the folder says of the job that `record` is: its fingerprint, name and date are those it began with.
    `record` itself where the folder holds no job.

    Raises OutputError when it holds another, naming the keys that differ.
    """
    existing = read(storage, JOB, JobRecord)
    if existing is None:
        return record
    if differ := differences(existing, record):
        committed = len(storage.list(COMMITS))
        raise OutputError(
            f"{storage.url} holds another job, {existing.name!r}, {committed:,} of {existing.shards:,} shards "
            f"committed; different: {', '.join(differ)}. Choose another output.path, or run with --fresh to "
            f"delete what is there and start over"
        )
    # before a job kept its date, every run told its own day
    return existing if existing.date else existing.model_copy(update={"date": record.date})


def clear(storage: Storage) -> None:
    """Delete a job's files and no others. Epochs stay: they fence a driver that still runs.

    Top down, so that a crash leaves no record of something that is gone.
    """
    storage.delete([MANIFEST])
    storage.delete([REPORT])
    storage.delete(storage.list(COMMITS))
    storage.delete(_data_files(storage))
    storage.delete([JOB])


def commit(
    storage: Storage, lease: Lease, fingerprint: str, shard: Shard, result: ShardResult
) -> CommitRecord:
    """Commit a shard's attempt and return the record that counts: ours, or the one that was first.

    Raises OutputError when this driver has been replaced.
    """
    lease.check()
    ours = to_commit(shard, result, fingerprint, lease.epoch, uuid.uuid4().hex)
    key = commit_key(shard.index)
    if storage.create(key, ours.to_bytes()):
        return ours
    existing = read(storage, key, CommitRecord)
    if existing is None or existing.fingerprint != fingerprint:
        raise OutputError(f"{storage.url}/{key} belongs to another job; --fresh deletes it and starts over")
    return existing


def commit_all(
    storage: Storage, lease: Lease, fingerprint: str, attempts: Iterable[tuple[Shard, ShardResult]]
) -> list[CommitRecord]:
    """`commit` for attempts at different shards, many at once: most of a commit is waiting for the store.

    Returns when all are committed. Raises what the first to fail raised; those after it may be committed or not.
    """
    with ThreadPoolExecutor(_WRITERS) as writers:
        return list(writers.map(lambda attempt: commit(storage, lease, fingerprint, *attempt), attempts))


def load_commits(storage: Storage, fingerprint: str, shards: Iterable[Shard]) -> dict[int, CommitRecord]:
    """The commit records of an earlier run, by shard. Raises OutputError for one that is not this job's."""
    planned = {shard.index: shard for shard in shards}
    commits = {record.shard: record for record in read_commits(storage)}
    for index, record in commits.items():
        shard = planned.get(index)
        if shard is None or record.fingerprint != fingerprint or _range(record) != _range(shard):
            raise OutputError(
                f"{storage.url}/{commit_key(index)} is not of this job; --fresh deletes it and starts over"
            )
    return commits


def finish(storage: Storage, manifest: Manifest) -> None:
    """Make the job visible: check that every data file is there whole, sweep orphans, create manifest.json.

    Orphans go only now: with every shard committed, no driver can commit one of them any more.
    """
    present = _data_files(storage)
    for file in manifest.files:
        if present.pop(file.path, None) != file.bytes:
            raise OutputError(f"{storage.url}/{file.path} is missing or cut short; --fresh starts over")
    storage.delete(present)
    if storage.create(MANIFEST, manifest.to_bytes()):
        return
    if read(storage, MANIFEST, Manifest) != manifest:
        raise OutputError(f"{storage.url}/{MANIFEST} is of another job")


def _range(record: CommitRecord | Shard) -> tuple[str, int, int]:
    return record.name, record.start, record.stop


def _data_files(storage: Storage) -> dict[str, int]:
    return {key: size for key, size in storage.list(DATA).items() if _OUR_DATA.fullmatch(key)}
