"""Whose the output folder is: an epoch per driver, which fences older ones, and the one job that it holds.

Epochs only save work, correctness does not rest on them. Nothing compares wall clocks.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath

import rayskip
from rayskip.data.folder import JOB, MANIFEST, RECORDS, REPORT
from rayskip.data.storage import Storage, probe
from rayskip.driver.heartbeat import last_driver
from rayskip.driver.identity import as_chosen, differences
from rayskip.driver.record_store import Damaged, commit_keys, data_files, epoch_keys, of_another_job, read
from rayskip.driver.records import CommitRecord, EpochRecord, JobRecord, epoch_key
from rayskip.errors import OutputError, TakenOver, counted


class Lease:
    """A driver's epoch. A driver that sees a later epoch has been replaced and stops.

    job: what the folder says of the job, once `open_job` has made the folder that job's.
    """

    job: JobRecord

    def __init__(self, storage: Storage) -> None:
        """Claim the next epoch, fencing the driver before."""
        self._storage = storage
        while True:
            self.epoch = 1 + max((int(PurePosixPath(key).stem) for key in epoch_keys(storage)), default=0)
            claim = EpochRecord(
                epoch=self.epoch,
                nonce=uuid.uuid4().hex,
                host=socket.gethostname(),
                pid=os.getpid(),
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                rayskip=rayskip.__version__,
            )
            key = epoch_key(self.epoch)
            # Told "exists" by a retry whose first reply was lost, the nonce says that it is ours.
            if storage.create(key, claim.to_bytes()) or read(storage, key, EpochRecord) == claim:
                return

    @property
    def nonce(self) -> str:
        """By which the job names its data files."""
        return self.job.nonce or self.job.fingerprint[:32]

    @property
    def since(self) -> int:
        """The epoch in which the job began."""
        return self.job.since

    def check(self) -> None:
        """Raises TakenOver when a later driver has taken the job over."""
        later = read(self._storage, epoch_key(self.epoch + 1), EpochRecord)
        if later is not None:
            raise TakenOver(
                f"{self._storage.url}: another driver took this job over "
                f"(process {later.pid} on {later.host}, since {later.started}); this one stops"
            )


def open_job(storage: Storage, record: JobRecord, fresh: bool) -> Lease:
    """Make the folder this job's and this driver's; job.json is created when there is none.

    fresh: an earlier job's files are deleted; so is another job of which nothing was done. Raises OutputError when
    the folder holds another job, or with `fresh` what is no job's, before a driver that may still run it is fenced;
    TakenOver when another run starts it over at this moment.
    """
    if fresh:
        refuse_strangers(storage)
    elif (existing := read(storage, JOB, JobRecord)) is not None:
        fresh = _yields(storage, existing, record)
        if not fresh:
            _same_job(storage, existing, record)
    else:
        record = _recovered(storage, record)
    probe(storage)
    lease = Lease(storage)
    if fresh:
        clear(storage)
    # A job.json that a person deleted says nothing of the records that are there.
    since = lease.epoch if fresh or not commit_keys(storage) else 0
    storage.create(JOB, record.model_copy(update={"nonce": uuid.uuid4().hex, "since": since}).to_bytes())
    there = read(storage, JOB, JobRecord)
    if there is None:
        raise TakenOver(f"{storage.place(JOB)} is gone: another run starts this job over; this one stops")
    _same_job(storage, there, record)
    lease.job = there
    return lease


def refuse_strangers(storage: Storage, fingerprint: str | None = None) -> None:
    """Raises OutputError when files by the names that a job uses are not of job `fingerprint`. Without one: when
    they are not a job's, or when there are files and no job ever began there.

    `--fresh` deletes what has these names, and a run that ends replaces it.
    """
    known = _holds_job(storage)
    for key in (MANIFEST, REPORT):
        if (data := storage.get(key)) is None:
            continue
        found = _fingerprint(data)
        if not (found == fingerprint if fingerprint else known and found != ""):
            raise OutputError(
                f"{storage.place(key)} is not this job's, and a run would replace it; move it away, or choose "
                f"another output.path"
            )
    if known or epoch_keys(storage):
        return
    if fingerprint:  # a run ends with deleting what lies among its data files and is not its own
        if found := min(data_files(storage), default=None):
            raise OutputError(
                f"{storage.url} holds {found} and no {JOB}: the output of a job that came without its records; "
                f"choose another output.path"
            )
        return
    if found := min(filter(_seen, storage.list("")), default=None):
        raise OutputError(
            f"{storage.url} is no job's output folder: it holds {found} and no {JOB}, so --fresh deletes nothing "
            f"there; choose another output.path"
        )


def _seen(key: str) -> bool:
    """Whether it is no hidden file, as systems put into folders."""
    return key.startswith(f"{RECORDS}/") or not any(part.startswith(".") for part in key.split("/"))


def _holds_job(storage: Storage) -> bool:
    """Whether there is a job.json, which may be damaged where a driver has claimed the folder. Raises Damaged where
    none has: it is something else."""
    try:
        return read(storage, JOB, JobRecord) is not None
    except Damaged:
        if epoch_keys(storage):
            return True
        raise


def _fingerprint(data: bytes) -> str | None:
    """The fingerprint that a manifest or report names, of whatever version; "" for another document, None for what
    is damaged."""
    try:
        document = json.loads(data)
    except ValueError:
        return None
    named = document.get("fingerprint") if isinstance(document, dict) else None
    return named if isinstance(named, str) else ""


def adopt(storage: Storage, record: JobRecord) -> JobRecord:
    """What the folder says of the job that `record` is: its fingerprint, name and date are those it began with.
    `record` itself where the folder holds no job; where its job.json is gone, with the date and the shards that the
    commit records tell.

    Raises OutputError when it holds another, naming the keys that differ.
    """
    existing = read(storage, JOB, JobRecord)
    if existing is None:
        return _recovered(storage, record)
    if _yields(storage, existing, record):
        return record
    return _same_job(storage, existing, record)


def _recovered(storage: Storage, record: JobRecord) -> JobRecord:
    """The record of a job that begins, or of one that goes on without its job.json, which is as its commit records
    tell. Raises OutputError when the folder holds another's files."""
    for key in commit_keys(storage):
        with suppress(Damaged):  # whoever reads them all says so
            found = read(storage, key, CommitRecord)
            if found is not None and found.shard_rows:
                record = as_chosen(record, found)
                if found.fingerprint != record.fingerprint:
                    raise OutputError(of_another_job(storage, key))
                break
    refuse_strangers(storage, record.fingerprint)
    return record


def _yields(storage: Storage, existing: JobRecord, record: JobRecord) -> bool:
    """Whether the folder's job is another one of which nothing was done, and whose last driver said that it has
    ended: of a run that was refused its cluster, say."""
    if commit_keys(storage) or data_files(storage) or storage.get(MANIFEST) is not None:
        return False
    _, last_word = last_driver(storage)
    return last_word is not None and last_word.ended is not None and bool(differences(existing, record))


def _same_job(storage: Storage, existing: JobRecord, record: JobRecord) -> JobRecord:
    """`adopt` of a record that was read already."""
    if differ := differences(existing, record):
        committed = len(commit_keys(storage))
        raise OutputError(
            f"{storage.url} holds another job, {existing.name!r}, {committed:,} of "
            f"{counted(existing.shards, 'shard')} committed; different: {', '.join(differ)}. Choose another "
            f"output.path, or run with --fresh to delete what is there and start over"
        )
    # before a job kept its date, every run told its own day
    return existing if existing.date else existing.model_copy(update={"date": record.date})


def clear(storage: Storage) -> None:
    """Delete a job's files and no others. Epochs stay: they fence a driver that still runs.

    Top down, so that a crash leaves no record of something that is gone.
    """
    storage.delete([MANIFEST])
    storage.delete([REPORT])
    storage.delete(commit_keys(storage))
    storage.delete(data_files(storage))
    storage.delete([JOB])
