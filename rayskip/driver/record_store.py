"""Reads the records in an output folder, and says which of its files are a job's.

Does not know who may write there: `lease.py` does, and `commit.py` what is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import ValidationError

import rayskip
from rayskip.data.folder import COMMITS, DATA, EPOCHS, JOB, MANIFEST, REPORT
from rayskip.data.storage import Storage
from rayskip.driver.records import VERSION, CommitRecord, Document, Manifest, Signed, commit_key
from rayskip.errors import OutputError

D = TypeVar("D", bound=Document)

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


def of_another_job(storage: Storage, key: str) -> str:
    """What is wrong with a commit record that is not of the job at hand."""
    return (
        f"{storage.place(key)} is not of this job, or of this one with another output.shard_rows or input.date, "
        "which it chose when it began; give those, or --fresh deletes it and starts over"
    )


def commit_keys(storage: Storage) -> list[str]:
    return sorted(filter(_OUR_COMMIT.fullmatch, storage.list(COMMITS)))


def epoch_keys(storage: Storage) -> list[str]:
    return sorted(filter(_OUR_EPOCH.fullmatch, storage.list(EPOCHS)))


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
