"""The output folder's protocol: create-only records, and an epoch per driver that fences older ones.

Does not know shards' contents or replicas. First creator wins whatever number of drivers runs: epochs only
save work, correctness does not rest on them. Nothing compares wall clocks.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

import rayskip
from rayskip.data.folder import COMMITS, DATA, EPOCHS, JOB, MANIFEST, RECORDS, REPORT
from rayskip.data.records import Shard, ShardResult
from rayskip.data.storage import Storage, probe
from rayskip.driver.identity import differences
from rayskip.driver.records import (
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
from rayskip.errors import OutputError, TakenOver, counted

D = TypeVar("D", bound=Document)

_log = logging.getLogger(__name__)

# What we write, and nothing that a person or a system (.DS_Store) puts beside it.
_OUR_DATA = re.compile(rf"{DATA}/shard-\d{{5,}}-[0-9a-f]{{32}}\.[a-z]+")
_OUR_COMMIT = re.compile(rf"{re.escape(COMMITS)}/shard-\d{{5,}}\.json")
_OUR_EPOCH = re.compile(rf"{re.escape(EPOCHS)}/\d{{6,}}\.json")

REPAIR = "`rayskip verify OUT --repair` takes such shards back, and the run command then redoes them alone"
_WAYS_ON = {
    JOB: "; if the folder is this job's, delete that file, and the run command goes on with what is committed",
    MANIFEST: f"; {REPAIR}",
    REPORT: "; delete that file, and the run command writes a new one",
}
_READERS = 16
_WRITERS = 32


class Damaged(OutputError):
    """A document was read and is not what its key says: unlike one that cannot be read now, it will never be."""


class _Head(Signed):
    """What documents of every format have: enough to tell whether the rest can be read."""

    version: int = 1


def read(storage: Storage, key: str, kind: type[D]) -> D | None:
    """A document of the folder; None when absent. Raises Damaged when it is not a valid one, OutputError when it is
    of a format that is newer than VERSION."""
    data = storage.get(key)
    if data is None:
        return None
    try:
        head = _Head.model_validate_json(data)
        if head.version > VERSION:
            theirs, ours = head.rayskip, rayskip.__version__
            raise OutputError(
                f"{storage.place(key)} was written by a newer rayskip, {theirs}; this is {ours}"
            )
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{storage.place(key)} is damaged: {where} {first['msg']}".rstrip()
        raise Damaged(problem + _WAYS_ON.get(key, "")) from error


def read_commits(storage: Storage, since: int) -> list[CommitRecord]:
    """The commit records of a job that began in epoch `since`, by shard.

    Raises OutputError for one that is damaged or misnamed.
    """
    commits, damaged = scan_commits(storage)
    for problem in damaged.values():
        raise OutputError(f"{problem}; {REPAIR}")
    return [record for record in commits if record.epoch >= since]


def scan_commits(storage: Storage) -> tuple[list[CommitRecord], dict[str, str]]:
    """All commit records that can be read, by shard, and what is wrong with the others, by key."""
    damaged: dict[str, str] = {}

    def record(key: str) -> CommitRecord | None:
        try:
            found = read(storage, key, CommitRecord)
            if found is not None and commit_key(found.shard) != key:
                raise Damaged(f"{storage.place(key)} is damaged: it holds shard {found.shard}")
            return found
        except Damaged as error:
            damaged[key] = str(error)
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        found = [record for record in readers.map(record, commit_keys(storage)) if record is not None]
    return sorted(found, key=lambda record: record.shard), damaged


def commit_keys(storage: Storage) -> list[str]:
    return sorted(filter(_OUR_COMMIT.fullmatch, storage.list(COMMITS)))


def epoch_keys(storage: Storage) -> list[str]:
    return sorted(filter(_OUR_EPOCH.fullmatch, storage.list(EPOCHS)))


class Lease:
    """A driver's epoch. A driver that sees a later epoch has been replaced and stops.

    nonce: by which this job names its data files. since: the epoch in which it began. `open_job` sets both.
    """

    nonce = ""
    since = 0

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

    fresh: an earlier job's files are deleted. Raises OutputError when the folder holds another job, or with `fresh`
    what is no job's, before a driver that may still run it is fenced; TakenOver when another run starts it over at
    this moment.
    """
    if fresh:
        refuse_strangers(storage)
    else:
        adopt(storage, record)
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
    lease.nonce, lease.since = there.nonce or there.fingerprint[:32], there.since
    return lease


def refuse_strangers(storage: Storage, fingerprint: str | None = None) -> None:
    """Raises OutputError when files by the names that a job uses are not of job `fingerprint`. Without one: when
    they are not a job's, or when there are files and no job ever began there.

    `--fresh` deletes what has these names, and a run that ends replaces it.
    """
    known = read(storage, JOB, JobRecord) is not None
    for key in (MANIFEST, REPORT):
        found = _fingerprint(storage, key)
        ours = found == fingerprint if fingerprint else found and known
        if found is not None and not ours:
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


def _fingerprint(storage: Storage, key: str) -> str | None:
    """The fingerprint that a manifest or report names, of whatever version; "" for other content, None for none."""
    data = storage.get(key)
    if data is None:
        return None
    with suppress(ValueError):
        document = json.loads(data)
        if isinstance(document, dict) and isinstance(document.get("fingerprint"), str):
            return str(document["fingerprint"])
    return ""


def adopt(storage: Storage, record: JobRecord) -> JobRecord:
    """What the folder says of the job that `record` is: its fingerprint, name and date are those it began with.
    `record` itself where the folder holds no job.

    Raises OutputError when it holds another, naming the keys that differ.
    """
    existing = read(storage, JOB, JobRecord)
    if existing is None:
        refuse_strangers(storage, record.fingerprint)
        return record
    return _same_job(storage, existing, record)


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


def commit(
    storage: Storage, lease: Lease, fingerprint: str, shard: Shard, result: ShardResult
) -> CommitRecord:
    """Commit a shard's output and return the record that counts: ours, or the one that was first.

    Raises TakenOver when this driver has been replaced.
    """
    lease.check()
    ours = to_commit(shard, result, fingerprint, lease.epoch, uuid.uuid4().hex)
    key = commit_key(shard.index)
    while not storage.create(key, ours.to_bytes()):
        existing = read(storage, key, CommitRecord)
        if existing is None or existing.epoch >= lease.since:
            break
        storage.delete([key])  # a fenced driver was in the middle of this write when its job was deleted
    else:
        return ours
    lease.check()
    if existing is None or existing.fingerprint != fingerprint:
        raise OutputError(f"{storage.place(key)} belongs to another job; --fresh deletes it and starts over")
    if existing.file == ours.file and existing.sha256 != ours.sha256:
        raise OutputError(f"{storage.place(key)} is of what {ours.file} held before; {REPAIR}")
    return existing


def commit_all(
    storage: Storage, lease: Lease, fingerprint: str, attempts: Iterable[tuple[Shard, ShardResult]]
) -> list[CommitRecord]:
    """`commit` for attempts at different shards, many at once: most of a commit is waiting for the store.

    Returns when all are committed. Raises what the first to fail raised; those after it may be committed or not.
    """
    with ThreadPoolExecutor(_WRITERS) as writers:
        return list(writers.map(lambda attempt: commit(storage, lease, fingerprint, *attempt), attempts))


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
            raise OutputError(
                f"{storage.place(commit_key(index))} is not of this job; --fresh deletes it and starts over"
            )
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


def data_files(storage: Storage) -> dict[str, int]:
    """The files in data/ that have the name of a shard's output, with their sizes in bytes."""
    return {key: size for key, size in storage.list(DATA).items() if _OUR_DATA.fullmatch(key)}


def sizes(committed: Manifest | Iterable[CommitRecord]) -> dict[str, int]:
    """Bytes of each data file that was committed."""
    if isinstance(committed, Manifest):
        return {file.path: file.bytes for file in committed.files}
    return {record.file: record.bytes for record in committed}


def lost_files(storage: Storage, committed: Mapping[str, int]) -> set[str]:
    """Those of the committed files, given with their sizes, that are not there any more.

    Raises OutputError for one of another size: it holds what no run of ours wrote, so that a person has to say that
    it may go.
    """
    there = data_files(storage)
    for path, size in committed.items():
        if there.get(path, size) != size:
            raise OutputError(
                f"{storage.place(path)} has {there[path]:,} bytes, {size:,} were committed; {REPAIR}"
            )
    return committed.keys() - there.keys()


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
