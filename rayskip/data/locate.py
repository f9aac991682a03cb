"""Which files an input path means: one file, a glob, a folder, local or in a bucket.

Does not know formats or rows.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from rayskip.errors import InputError

GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Located:
    """A file. url: opens it with `filesystem`. name: its path below the input's root.
    stamp: changes when the content does (size and time of change)."""

    url: str
    name: str
    stamp: str


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or of an s3:// or gs:// url, and the path within it.

    S3 takes keys, region and endpoint from the usual AWS variables (AWS_ENDPOINT_URL for other stores).
    """
    if "://" not in url:
        return fs.LocalFileSystem(), url
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise InputError(f"input.path: {url} cannot be opened ({error})") from error
    return found


def locate(path: str) -> list[Located]:
    """The files that `path` means, sorted by name. Names that begin with . or _ inside a folder are skipped.

    Raises InputError when there is none.
    """
    store, inner = filesystem(path)
    prefix = path[: len(path) - len(inner)]
    inner = inner.rstrip("/")
    if GLOB & set(inner):
        root = str(PurePosixPath(*_until_glob(inner)))
        found = [info for info in _list(store, root, path) if fnmatch.fnmatchcase(info.path, inner)]
    else:
        info = _info(store, inner, path)
        if info.type == fs.FileType.File:
            return [_located(info, prefix, str(PurePosixPath(inner).parent))]
        root = inner
        found = _list(store, root, path)
    files = [_located(info, prefix, root) for info in found if not _hidden(info.path, root)]
    if not files:
        raise InputError(f"input.path: {path} matches no file")
    return sorted(files, key=lambda file: file.name)


def _until_glob(path: str) -> list[str]:
    parts = PurePosixPath(path).parts
    first = next(index for index, part in enumerate(parts) if GLOB & set(part))
    return list(parts[:first]) or ["."]


def _info(store: fs.FileSystem, inner: str, path: str) -> fs.FileInfo:
    try:
        info: fs.FileInfo = store.get_file_info(inner)
    except OSError as error:
        raise InputError(f"input.path: {path} cannot be read ({error})") from error
    if info.type == fs.FileType.NotFound:
        raise InputError(f"input.path: {path} does not exist{_nearest(store, inner)}")
    return info


def _list(store: fs.FileSystem, root: str, path: str) -> list[fs.FileInfo]:
    try:
        infos: list[fs.FileInfo] = store.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise InputError(f"input.path: {path} cannot be listed ({error})") from error
    return [info for info in infos if info.type == fs.FileType.File]


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(_below(path, root)).parts)


def _below(path: str, root: str) -> str:
    return str(PurePosixPath(path).relative_to(root)) if root not in ("", ".") else path.removeprefix("./")


def _located(info: fs.FileInfo, prefix: str, root: str) -> Located:
    return Located(prefix + info.path, _below(info.path, root), f"{info.size}:{info.mtime_ns}")


def _nearest(store: fs.FileSystem, inner: str) -> str:
    """' (did you mean …?)' from the names beside a missing path."""
    parent = str(PurePosixPath(inner).parent)
    try:
        beside = [info.base_name for info in store.get_file_info(fs.FileSelector(parent))]
    except OSError:
        return ""
    near = difflib.get_close_matches(PurePosixPath(inner).name, beside, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
