"""A shard's output file: one name per shard and job, created once, whatever number of replicas writes it.

A replica may outlive its driver and wake when another has long finished the job. Its write finds the name taken
and changes nothing, so data/ never holds a shard twice. Does not know commits: the driver records what is there.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from rayskip.data.folder import DATA, JOB
from rayskip.data.storage import Storage
from rayskip.errors import OutputError, TakenOver


def data_key(shard: int, nonce: str, suffix: str) -> str:
    """Where a shard's output goes. nonce: the hex digits by which job.json tells this job from one before it."""
    return f"{DATA}/shard-{shard:05d}-{nonce}.{suffix}"


def write_attempt(storage: Storage, key: str, data: bytes) -> bytes:
    """Write a shard's output file, unless it is there; returns what is there now: `data`, or what another wrote.

    The file goes again when the folder has been given to another job meanwhile (`--fresh`), whose readers would
    find it: job.json is looked at after the write, since a look before says nothing about the moment of the write.
    Raises TakenOver then.
    """
    created = storage.create(key, data)
    nonce = PurePosixPath(key).stem.rsplit("-", 1)[1]
    if nonce.encode() not in (storage.get(JOB) or b""):
        storage.delete([key])
        raise TakenOver(f"{storage.place(JOB)} is gone or another job's; this one stops")
    there = data if created else storage.get(key)
    if there is None:
        raise OutputError(
            f"{storage.place(key)} was deleted while it was written; run the same command again"
        )
    return there
