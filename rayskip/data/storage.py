"""Whole objects in a folder, local or on s3:// or gs://, with one atomic verb: create when absent.

Does not know what the objects mean. Every write is whole and durable when it returns: a reader sees all
of an object or none. There is no rename and no compare-and-swap, so the same protocol runs on every store.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from rayskip.data.credentials import NoCredentials, aws_credentials
from rayskip.errors import OutputError, StorageBusy, first_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

_ATTEMPTS = 4
_BACKOFF_S = 0.5
_TEMPORARY = ".tmp-"


class Storage(Protocol):
    """A folder of objects. Keys are relative, with "/" between parts.

    Every method raises StorageBusy for a passing fault that outlasted the retries, and OutputError for one
    that stays (no permission, no bucket, disk full).
    """

    url: str

    def place(self, key: str) -> str:
        """Where an object is, for messages."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless the key exists; True when this call wrote it.

        Of any number of callers at once exactly one writes. After a lost reply the writer itself may be told
        False: whoever must know puts a nonce into the object and reads it back.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write an object, replacing what was there."""

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None when there is none."""

    def list(self, prefix: str) -> dict[str, int]:
        """Keys in the folder `prefix` and below, with their sizes in bytes; "" lists all."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; keys that do not exist are fine."""


def open_storage(url: str) -> Storage:
    """The storage at a local path or an s3:// or gs:// url. Nothing is written before the first object.

    Raises OutputError for what names no place.
    """
    if not url or "\0" in url:
        raise OutputError(f"{url!r} is no path of an output folder")
    if "://" not in url:
        return LocalStorage(url)
    if url.split("://")[0] not in ("s3", "gs"):
        raise OutputError(f"{url}: use a local path, s3:// or gs://")
    return ObjectStorage(url)


def probe(storage: Storage) -> None:
    """Make sure that creating a key twice is refused here. Raises OutputError on a store that overwrites."""
    key = f".probe-{uuid.uuid4().hex}"
    try:
        storage.create(key, b"first")
    except OutputError as error:
        reason = str(error).removeprefix(f"{storage.place(key)}: ")
        raise OutputError(f"output.path: nothing can be written to {storage.url}: {reason}") from error
    try:
        if storage.create(key, b"second") or storage.get(key) != b"first":
            raise OutputError(
                f"{storage.url}: the store has no conditional put, so commits would not be safe there"
            )
    finally:
        storage.delete([key])


def probe_unmade(storage: Storage) -> None:
    """`probe` for a look at a folder that may not be there yet, and is not made by it."""
    probe(storage.nearest() if isinstance(storage, LocalStorage) else storage)


class LocalStorage:
    """Objects as files. Works on NFS: a hard link is what creates a name."""

    def __init__(self, path: str) -> None:
        self.url = path
        self._root = Path(path)

    def nearest(self) -> LocalStorage:
        """Of this folder and those that it lies in, the first that is there."""
        return LocalStorage(
            str(next(path for path in (self._root, *self._root.absolute().parents) if path.exists()))
        )

    def place(self, key: str) -> str:
        return f"{self.url}/{key}"

    def create(self, key: str, data: bytes) -> bool:
        return self._write(key, data, os.link)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def get(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(key, error) from error

    def list(self, prefix: str) -> dict[str, int]:
        def refuse(error: OSError) -> None:
            # What cannot be read must not pass for empty; what is not there, or no more, is.
            if not isinstance(error, FileNotFoundError):
                raise self._refused(prefix, error) from error

        found = {}
        for folder, _, names in os.walk(self._root / prefix, onerror=refuse):
            for name in names:
                path = Path(folder, name)
                if not name.startswith(_TEMPORARY):
                    try:
                        found[path.relative_to(self._root).as_posix()] = path.stat().st_size
                    except OSError as error:
                        refuse(error)
        return found

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                (self._root / key).unlink(missing_ok=True)
            except OSError as error:
                raise self._refused(key, error) from error

    def _write(self, key: str, data: bytes, publish: Callable[[Path, Path], None]) -> bool:
        """Write aside, fsync, publish under the name, fsync the folder: a crash leaves all or nothing."""
        path = self._root / key
        aside = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_durably(aside, data)
                published = _publish(publish, aside, path)
            finally:
                aside.unlink(missing_ok=True)
            _sync_folder(path.parent)
        except OSError as error:
            raise self._refused(key, error) from error
        return published

    def _refused(self, key: str, error: OSError) -> OutputError:
        files = (folder for folder in (self._root, *self._root.parents) if os.path.isfile(folder))
        if file := next(files, None):
            return OutputError(f"{file}: is a file, not an output folder")
        return OutputError(f"{self._root / key}: {error.strerror or error}")


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(publish: Callable[[Path, Path], None], aside: Path, path: Path) -> bool:
    try:
        publish(aside, path)
    except FileExistsError:
        return False
    return True


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStorage:
    """Objects on S3 or Google Cloud Storage; AWS_ENDPOINT_URL comes from the environment."""

    def __init__(self, url: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url = url
        # Plain http is for an endpoint that the user named so, never for the cloud's own.
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        try:
            self._store: ObjectStore = from_url(
                url,
                credential_provider=aws_credentials() if url.startswith("s3://") else None,
                client_options={"allow_http": plain, "timeout": timedelta(seconds=60)},
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
            )
        except (BaseError, ValueError, NoCredentials) as error:
            raise OutputError(f"{url}: {first_line(error)}") from error

    def place(self, key: str) -> str:
        return f"{self.url}/{key}"

    def create(self, key: str, data: bytes) -> bool:
        return self._retrying(lambda: self._create(key, data))

    def put(self, key: str, data: bytes) -> None:
        import obstore

        self._retrying(lambda: obstore.put(self._store, key, data))

    def get(self, key: str) -> bytes | None:
        return self._retrying(lambda: self._get(key))

    def list(self, prefix: str) -> dict[str, int]:
        import obstore

        pages = self._retrying(lambda: [*obstore.list(self._store, prefix or None)])
        return {item["path"]: item["size"] for page in pages for item in page}

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        names = list(keys)
        if names:
            self._retrying(lambda: obstore.delete(self._store, names))

    def _create(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError

        try:
            obstore.put(self._store, key, data, mode="create")
        except AlreadyExistsError as error:
            # obstore says so of 412, the key exists, and of 409: a write of it was under way, and may have failed.
            try:
                obstore.head(self._store, key)
            except FileNotFoundError:
                raise GenericError(f"{key}: a conflicting write is under way") from error
            return False
        return True

    def _get(self, key: str) -> bytes | None:
        import obstore

        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            return None

    def _retrying(self, call: Callable[[], T]) -> T:
        """Call until no passing fault (throttled, 409, 5xx, reset, timeout) comes back, a few times."""
        from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except (PermissionDeniedError, UnauthenticatedError, FileNotFoundError) as error:  # no bucket
                raise OutputError(f"{self.url}: {first_line(error)}") from error
            except GenericError as error:
                if attempt == _ATTEMPTS - 1:
                    raise StorageBusy(f"{self.url}: {first_line(error)}") from error
            time.sleep(_BACKOFF_S * 2**attempt)
        raise AssertionError("unreachable")
