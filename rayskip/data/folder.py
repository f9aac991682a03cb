"""The names in a job's output folder, in this one place, and the folders that have other ones.

All that is not data is in one folder whose name dataset readers pass over. Relative to OUT:

    data/shard-00042-<hex>.parquet           a shard's output
    .rayskip/job.json                        what the job is
    .rayskip/epochs/000001.json              one per driver that ever ran
    .rayskip/epochs/000001-heartbeat.json    how far that driver is; written again and again
    .rayskip/commits/shard-00042.json        one per finished shard
    .rayskip/report.json                     throughput of the run that finished the job
    .rayskip/manifest.json                   created last; a reader that finds it sees the whole job

Does not know what the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from rayskip.data.storage import Storage, open_storage

DATA = "data"
RECORDS = ".rayskip"
JOB = f"{RECORDS}/job.json"
MANIFEST = f"{RECORDS}/manifest.json"
REPORT = f"{RECORDS}/report.json"
COMMITS = f"{RECORDS}/commits"
EPOCHS = f"{RECORDS}/epochs"

_EARLIER = {
    JOB: "job.json",
    MANIFEST: "manifest.json",
    REPORT: "report.json",
    COMMITS: "_commits",
    EPOCHS: "_epochs",
}
"""Names in folders that were begun before all of these were in one folder; such a folder keeps them."""

_EARLIER_RECORD = re.compile(r"_epochs/\d{6,}\.json|_commits/shard-\d{5,}\.json")


def open_folder(url: str) -> Storage:
    """The output folder at a local path or an s3:// or gs:// url. Its keys are the names above, also where files
    have earlier ones.

    Raises as `open_storage` and `Storage.list` do.
    """
    storage = open_storage(url)
    earlier = (key for kind in (EPOCHS, COMMITS) for key in storage.list(_EARLIER[kind]))
    if not storage.list(EPOCHS) and any(map(_EARLIER_RECORD.fullmatch, earlier)):
        return EarlierFolder(storage)
    return storage


def is_unfinished(there: Callable[[str], bool]) -> bool:
    """Whether a job began in a folder and has not ended. there: whether it has a file or folder of that name."""
    return any(
        there(epochs) and not there(manifest)
        for epochs, manifest in ((EPOCHS, MANIFEST), (_EARLIER[EPOCHS], _EARLIER[MANIFEST]))
    )


class EarlierFolder:
    """A folder with earlier names, under today's."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.url = storage.url

    def place(self, key: str) -> str:
        return self._storage.place(_moved(key, _EARLIER))

    def create(self, key: str, data: bytes) -> bool:
        return self._storage.create(_moved(key, _EARLIER), data)

    def put(self, key: str, data: bytes) -> None:
        self._storage.put(_moved(key, _EARLIER), data)

    def get(self, key: str) -> bytes | None:
        return self._storage.get(_moved(key, _EARLIER))

    def list(self, prefix: str) -> dict[str, int]:
        today = {earlier: name for name, earlier in _EARLIER.items()}
        found = self._storage.list(_moved(prefix, _EARLIER))
        return {_moved(key, today): size for key, size in found.items()}

    def delete(self, keys: Iterable[str]) -> None:
        self._storage.delete([_moved(key, _EARLIER) for key in keys])


def _moved(key: str, names: dict[str, str]) -> str:
    """The key with what it is, or is in, under another name."""
    for name, other in names.items():
        if key == name or key.startswith(f"{name}/"):
            return other + key.removeprefix(name)
    return key
