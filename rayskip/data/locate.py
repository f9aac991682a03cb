"""Which files an input path means (one file, a glob, a folder), local or in a bucket, and how to open them.

Does not know formats or rows.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow import fs

from rayskip.data.credentials import why_refused
from rayskip.data.folder import DATA, is_unfinished
from rayskip.errors import InputError, StorageBusy, first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Located:
    """A file. url: what `filesystem` takes. name: its path below the input's root.
    stamp: changes when the content does (size and time of change)."""

    url: str
    name: str
    stamp: str


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or of an s3:// or gs:// url, and the path within it.

    Keys, region and endpoint of S3 come from the usual AWS variables (AWS_ENDPOINT_URL for other stores).
    Raises InputError for another scheme, or a bucket that cannot be found.
    """
    if "://" not in url:
        return fs.LocalFileSystem(), url
    scheme, path = url.split("://", 1)
    endpoint, region = os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_REGION")
    return _bucket(scheme, path.split("/", 1)[0], endpoint, region), path


@cache
def _bucket(scheme: str, bucket: str, endpoint: str | None, region: str | None) -> fs.FileSystem:
    if scheme == "s3" and endpoint:
        return fs.S3FileSystem(endpoint_override=endpoint, region=region)
    if scheme not in ("s3", "gs"):
        raise InputError(f"input.path: {scheme}:// cannot be read; use a local path, s3:// or gs://")
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    except (pa.ArrowInvalid, OSError) as error:
        url = f"{scheme}://{bucket}"
        raise InputError(
            f"input.path: {url} cannot be opened ({first_line(error)}){why_refused(url)}"
        ) from error


def locate(path: str) -> list[Located]:
    """The files that `path` means, sorted by name. In a folder, names that begin with . or _ are skipped.

    In a glob, * stays within a folder and ** crosses folders; a name that is there as it is written is no glob.
    Local paths become absolute, as a replica may have another working directory. A file to which several names
    lead, by links, is there once. Raises InputError when there is no file, or one that cannot be named or read.
    """
    path = path.rstrip("/") if "://" in path else os.path.abspath(path)
    store, inner = filesystem(path)
    prefix = path[: len(path) - len(inner)]
    root, pattern = _split_glob(store, inner, path)
    if pattern:
        found = _list(store, root, path, pattern)
    else:
        info = _info(store, inner, path)
        if info.type == fs.FileType.File:
            _refuse_unfinished(store, [info], prefix)
            return [_located(info, prefix, str(PurePosixPath(inner).parent))]
        if info.type != fs.FileType.Directory:
            raise InputError(f"input.path: {path} is no file and no folder")
        found = _list(store, root, path, ["**"])
    _refuse_unfinished(store, found, prefix)
    if lost := [info.path for info in found if info.type == fs.FileType.NotFound]:
        raise InputError(f"input.path: {lost[0]} is a link that leads nowhere")
    files = sorted((_located(info, prefix, root) for info in found), key=lambda file: file.name)
    if not files:
        if is_unfinished(partial(_has, store, PurePosixPath(root), path)):
            raise _of_unfinished(path)
        raise InputError(f"input.path: {path} has no files")
    return files


def covers(path: str, file: str) -> bool:
    """Whether a visible file by that name would be among those that `path` means, were it there."""
    path, file = (url if "://" in url else os.path.abspath(url) for url in (path.rstrip("/") or "/", file))
    store, inner = filesystem(path)
    prefix = path[: len(path) - len(inner)]
    root, pattern = _split_glob(store, inner, path)
    place = PurePosixPath(file.removeprefix(prefix))
    if not file.startswith(prefix) or not place.is_relative_to(root):
        return False
    return _wanted(_parts(str(place), root), pattern or ["**"])


def locate_file(url: str) -> Located:
    """One file by its name, which holds no wildcards. Raises InputError when it is not there or no file."""
    path = url if "://" in url else os.path.abspath(url)
    store, inner = filesystem(path)
    info = _info(store, inner, path)
    if info.type != fs.FileType.File:
        raise InputError(f"input.path: {path} is no file")
    return _located(info, path[: len(path) - len(inner)], str(PurePosixPath(inner).parent))


def stamp(url: str) -> str | None:
    """What changes when the file at `url` does: its size and time of change; None when there is no such file.

    Raises StorageBusy when the store does not say.
    """
    store, path = filesystem(url)
    try:
        info = store.get_file_info(path)
    except OSError as error:
        raise StorageBusy(f"{url}: cannot be read ({first_line(error)})") from error
    return _stamp(info) if info.type == fs.FileType.File else None


def open_input(url: str) -> _Input:
    """A file to read. Raises FileNotFoundError or NotADirectoryError, and StorageBusy for every other fault of the
    store, now or at a later read: an OSError that a decoder raises over it is about what the file holds.
    """
    store, path = filesystem(url)
    try:
        return _Input(url, store.open_input_file(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageBusy(f"{url}: cannot be read ({first_line(error)})") from error


class _Input(io.RawIOBase):
    def __init__(self, url: str, source: pa.NativeFile) -> None:
        super().__init__()
        self._url = url
        self._source = source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._source.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._source.seek(offset, whence))

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            return int(self._source.readinto(buffer))
        except OSError as error:
            raise StorageBusy(f"{self._url}: cannot be read ({first_line(error)})") from error

    def close(self) -> None:
        self._source.close()
        super().close()


def read_if_there(url: str, most: int) -> bytes | None:
    """A small file's bytes; None when there is no such file. Raises InputError when it has more than `most`."""
    try:
        with open_input(url) as source:
            data = source.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StorageBusy as error:
        raise InputError(str(error)) from error
    if data is not None and len(data) > most:
        raise InputError(f"{url}: has more than {most:,} bytes, which is no such file")
    return data


def _split_glob(store: fs.FileSystem, inner: str, path: str) -> tuple[str, list[str]]:
    """The folder above the first part with a wildcard, and the parts from there; no parts where there is none."""
    parts = PurePosixPath(inner).parts
    for index, part in enumerate(parts):
        if _GLOB & set(part) and not _is_there(store, str(PurePosixPath(*parts[: index + 1])), path):
            return str(PurePosixPath(*parts[:index])), list(parts[index:])
    return inner, []


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    alike = bool(parts) and (parts[0] == pattern[0] or fnmatch.fnmatchcase(parts[0], pattern[0]))
    return alike and _matches(parts[1:], pattern[1:])


def _is_there(store: fs.FileSystem, inner: str, path: str) -> bool:
    return bool(_any_info(store, inner, path).type != fs.FileType.NotFound)


def _info(store: fs.FileSystem, inner: str, path: str) -> fs.FileInfo:
    info = _any_info(store, inner, path)
    if info.type == fs.FileType.NotFound:
        raise InputError(f"input.path: {path} does not exist{_nearest(store, inner)}")
    return info


def _any_info(store: fs.FileSystem, inner: str, path: str) -> fs.FileInfo:
    """Also of what is not there, which is of type NotFound."""
    try:
        return store.get_file_info(inner)
    except OSError as error:
        raise InputError(
            f"input.path: {path} cannot be read ({first_line(error)}){why_refused(path)}"
        ) from error


def _refuse_unfinished(store: fs.FileSystem, infos: Iterable[fs.FileInfo], prefix: str) -> None:
    """Raises InputError for data files of a job that is not finished: more may come, and not all may count.

    prefix: what a url has before the paths of its store.
    """
    folders = {PurePosixPath(info.path).parent for info in infos}
    for out in sorted(folder.parent for folder in folders if folder.name == DATA):
        url = f"{prefix}{out}"
        if is_unfinished(partial(_has, store, out, url)):
            raise _of_unfinished(url)


def _of_unfinished(url: str) -> InputError:
    return InputError(
        f"input.path: {url} is the output of a job that is not finished; run that job to its end"
    )


def _has(store: fs.FileSystem, folder: PurePosixPath, url: str, name: str) -> bool:
    return _is_there(store, str(folder / name), url)


def _list(store: fs.FileSystem, root: str, path: str, pattern: list[str]) -> list[fs.FileInfo]:
    """The files below `root` that match, without hidden ones; a link that leads nowhere is of type NotFound."""
    try:
        if isinstance(store, fs.LocalFileSystem):
            names = [name for name in _walk(root) if _matches(_parts(name, root), pattern)]
            infos = store.get_file_info([_nameable(name) for name in names])
            return [info for info in infos if info.type in (fs.FileType.File, fs.FileType.NotFound)]
        infos = store.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise InputError(
            f"input.path: {path} cannot be listed ({first_line(error)}){why_refused(path)}"
        ) from error
    return [
        info for info in infos if info.type == fs.FileType.File and _wanted(_parts(info.path, root), pattern)
    ]


def _wanted(parts: list[str], pattern: list[str]) -> bool:
    return _matches(parts, pattern) and not any(map(_hidden, parts))


def _walk(root: str) -> list[str]:
    """Paths of the files below a local folder. Links are followed, but no file is there twice and no folder that
    holds the root is entered; a file that is below the root under its own name goes by that. Raises OSError."""
    top = os.path.realpath(root)
    names: dict[str, str] = {}  # by the real path
    entered: set[str] = set()
    folders, links = [root], list[str]()
    while folders or links:
        # What is here comes before what links lead to.
        folder = folders.pop() if folders else links.pop()
        real = os.path.realpath(folder)
        if real in entered or (real != top and PurePosixPath(top).is_relative_to(real)):
            continue
        entered.add(real)
        with os.scandir(folder) as entries:
            inside = sorted(
                (entry for entry in entries if not _hidden(entry.name)), key=lambda entry: entry.name
            )
        for entry in inside:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_symlink():
                names.setdefault(os.path.realpath(entry.path), entry.path)
            elif entry.is_file():
                names[os.path.join(real, entry.name)] = entry.path
        links.sort(reverse=True)
    return list(names.values())


def _nameable(path: str) -> str:
    """The path itself. Raises InputError for one that is not UTF-8, which no output row could name."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"input.path: the name {path!a} is not valid UTF-8; rename it") from error
    return path


def _parts(path: str, root: str) -> list[str]:
    return list(PurePosixPath(path).relative_to(root).parts)


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _located(info: fs.FileInfo, prefix: str, root: str) -> Located:
    return Located(prefix + info.path, "/".join(_parts(info.path, root)), _stamp(info))


def _stamp(info: fs.FileInfo) -> str:
    return f"{info.size}:{info.mtime_ns}"


def _nearest(store: fs.FileSystem, inner: str) -> str:
    """ "; did you mean …?" from the names beside a missing path."""
    path = PurePosixPath(inner)
    try:
        beside = [info.base_name for info in store.get_file_info(fs.FileSelector(str(path.parent)))]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {near[0]}?" if near else ""
