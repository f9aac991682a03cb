"""Commits shards: create-only records of what is there, and the manifest at the end.

Does not know shards' contents or replicas. First creator wins whatever number of drivers runs.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from rayskip.data.folder import MANIFEST
from rayskip.data.records import Shard, ShardResult
from rayskip.data.storage import Storage
from rayskip.driver.lease import Lease
from rayskip.driver.record_store import (
    REPAIR,
    commit_keys,
    data_files,
    lost_files,
    of_another_job,
    read,
    read_commits,
    sizes,
)
from rayskip.driver.records import CommitRecord, Manifest, commit_key, to_commit
from rayskip.errors import OutputError

_log = logging.getLogger(__name__)

_WRITERS = 32


def commit(storage: Storage, lease: Lease, shard: Shard, result: ShardResult) -> CommitRecord:
    """Commit a shard's output and return the record that counts: ours, or the one that was first.

    Raises TakenOver when this driver has been replaced.
    """
    lease.check()
    ours = to_commit(shard, result, lease.job, lease.epoch, uuid.uuid4().hex)
    key = commit_key(shard.index)
    while not storage.create(key, ours.to_bytes()):
        existing = read(storage, key, CommitRecord)
        if existing is None or existing.epoch >= lease.since:
            break
        storage.delete([key])  # a fenced driver was in the middle of this write when its job was deleted
    else:
        return ours
    lease.check()
    if existing is None or existing.fingerprint != lease.job.fingerprint:
        raise OutputError(f"{storage.place(key)} belongs to another job; --fresh deletes it and starts over")
    if existing.file == ours.file and existing.sha256 != ours.sha256:
        raise OutputError(f"{storage.place(key)} is of what {ours.file} held before; {REPAIR}")
    return existing


def commit_all(
    storage: Storage, lease: Lease, attempts: Iterable[tuple[Shard, ShardResult]]
) -> list[CommitRecord]:
    """`commit` for attempts at different shards, many at once: most of a commit is waiting for the store.

    Returns when all are committed. Raises what the first to fail raised; those after it may be committed or not.
    """
    with ThreadPoolExecutor(_WRITERS) as writers:
        return list(writers.map(lambda attempt: commit(storage, lease, *attempt), attempts))


def load_commits(
    storage: Storage, fingerprint: str, shards: Iterable[Shard], since: int
) -> dict[int, CommitRecord]:
    """The commit records of an earlier run, by shard; since: the epoch in which the job began.

    Raises OutputError for one that is not this job's.
    """
    planned = {shard.index: shard for shard in shards}
    commits = {record.shard: record for record in read_commits(storage, since)}
    for index, record in commits.items():
        shard = planned.get(index)
        if shard is None or record.fingerprint != fingerprint or _range(record) != _range(shard):
            raise OutputError(of_another_job(storage, commit_key(index)))
    return commits


def finish(storage: Storage, lease: Lease, manifest: Manifest) -> None:
    """Make the job visible: check that every data file is there whole, sweep strays, create manifest.json.

    What a fenced driver still wrote of a job that --fresh deleted is swept too. Raises TakenOver when this driver
    has been replaced.
    """
    for path in lost_files(storage, sizes(manifest)):
        raise OutputError(f"{storage.place(path)} is gone; the same command runs its shard again")
    sweep(storage, manifest)
    ours = {commit_key(file.shard) for file in manifest.files}
    others = {key: read(storage, key, CommitRecord) for key in commit_keys(storage) if key not in ours}
    storage.delete([key for key, record in others.items() if record and record.epoch < lease.since])
    while not storage.create(MANIFEST, manifest.to_bytes()):
        if read(storage, MANIFEST, Manifest) == manifest:
            return
        lease.check()
        storage.delete([MANIFEST])


def _range(record: CommitRecord | Shard) -> tuple[str, int, int]:
    return record.name, record.start, record.stop


def sweep(storage: Storage, manifest: Manifest) -> None:
    """Delete files by the name of a shard's output that the manifest does not name, and say so.

    Only when every shard is committed: no driver can commit one of them any more.
    """
    strays = sorted(data_files(storage).keys() - sizes(manifest).keys())
    if strays:
        _log.warning("%s: deleted %s, which no record names", storage.url, ", ".join(strays))
        storage.delete(strays)


def take_back(storage: Storage, files: Iterable[str], records: Iterable[str]) -> None:
    """Delete data files and commit records, so that the next run redoes their shards.

    In this order: a crash leaves no manifest that promises what is gone, and no damaged file without a record,
    which a replica would find under its shard's name and take for an attempt before its own. A record without its
    file is taken back by the next run.
    """
    storage.delete([MANIFEST])
    storage.delete(files)
    storage.delete(records)
