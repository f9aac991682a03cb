"""Which files an input path means (one file, a glob, a folder), local or in a bucket, and how to open them.

Does not know formats or rows.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from rayskip.errors import InputError

GLOB = frozenset("*?[")


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
    return _bucket(scheme, path.split("/", 1)[0]), path


@cache
def _bucket(scheme: str, bucket: str) -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        return fs.S3FileSystem(endpoint_override=endpoint, region=os.environ.get("AWS_REGION"))
    if scheme not in ("s3", "gs"):
        raise InputError(f"input.path: {scheme}:// cannot be read; use a local path, s3:// or gs://")
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"input.path: {scheme}://{bucket} cannot be opened ({first_line(error)})") from error


def locate(path: str) -> list[Located]:
    """The files that `path` means, sorted by name. In a folder, names that begin with . or _ are skipped.

    In a glob, * stays within a folder and ** crosses folders. Local paths become absolute, as a replica may
    have another working directory. Raises InputError when there is no file.
    """
    path = path.rstrip("/") if "://" in path else os.path.abspath(path)
    store, inner = filesystem(path)
    prefix = path[: len(path) - len(inner)]
    if GLOB & set(inner):
        root, pattern = _split_glob(inner)
        found = [info for info in _list(store, root, path) if _matches(_parts(info.path, root), pattern)]
    else:
        info = _info(store, inner, path)
        if info.type == fs.FileType.File:
            return [_located(info, prefix, str(PurePosixPath(inner).parent))]
        root = inner
        found = _list(store, root, path)
    visible = (info for info in found if not _hidden(_parts(info.path, root)))
    files = sorted((_located(info, prefix, root) for info in visible), key=lambda file: file.name)
    if not files:
        raise InputError(f"input.path: {path} has no files")
    return files


def read_if_there(url: str) -> bytes | None:
    """A small file's bytes; None when there is no such file."""
    store, path = filesystem(url)
    try:
        with store.open_input_file(path) as source:
            data: bytes = source.read()
            return data
    except (FileNotFoundError, NotADirectoryError):
        return None


def first_line(error: Exception) -> str:
    """An error of a library, short enough to stand in one of ours."""
    return str(error).split("\n", 1)[0]


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The folder above the first part with a wildcard, and the parts from there."""
    parts = PurePosixPath(path).parts
    first = next(index for index, part in enumerate(parts) if GLOB & set(part))
    return str(PurePosixPath(*parts[:first])), list(parts[first:])


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _info(store: fs.FileSystem, inner: str, path: str) -> fs.FileInfo:
    try:
        info: fs.FileInfo = store.get_file_info(inner)
    except OSError as error:
        raise InputError(f"input.path: {path} cannot be read ({first_line(error)})") from error
    if info.type == fs.FileType.NotFound:
        raise InputError(f"input.path: {path} does not exist{_nearest(store, inner)}")
    return info


def _list(store: fs.FileSystem, root: str, path: str) -> list[fs.FileInfo]:
    try:
        infos: list[fs.FileInfo] = store.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise InputError(f"input.path: {path} cannot be listed ({first_line(error)})") from error
    return [info for info in infos if info.type == fs.FileType.File]


def _parts(path: str, root: str) -> list[str]:
    return list(PurePosixPath(path).relative_to(root).parts)


def _hidden(parts: list[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)


def _located(info: fs.FileInfo, prefix: str, root: str) -> Located:
    return Located(prefix + info.path, "/".join(_parts(info.path, root)), f"{info.size}:{info.mtime_ns}")


def _nearest(store: fs.FileSystem, inner: str) -> str:
    """ "; did you mean …?" from the names beside a missing path."""
    path = PurePosixPath(inner)
    try:
        beside = [info.base_name for info in store.get_file_info(fs.FileSelector(str(path.parent)))]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {near[0]}?" if near else ""
