"""The user's cache folder: what takes its time to make and may be made again at any time.

Whole folders that others read (`publish`), and small facts as JSON (`recall`). Does not know what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayskip.errors import ModelError

KEPT_S = 90 * 24 * 3600
"""Seconds for which something is kept that nobody uses."""


def cache_root() -> Path:
    """RAYSKIP_CACHE, or rayskip/ in the user's cache folder."""
    if own := os.environ.get("RAYSKIP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayskip"


def publish(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that a reader sees whole or not at all: `fill` writes beside it, a rename shows it.

    Of several writers one wins and all end well. Raises ModelError when the place is not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise ModelError(f"cannot write to {target.parent} ({error.strerror}); set RAYSKIP_CACHE") from error
    try:
        fill(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # else another writer was first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _forget(target.parent)


def used(path: Path) -> None:
    """Keep it for as long again (KEPT_S)."""
    with suppress(OSError):
        os.utime(path)


def _forget(folder: Path) -> None:
    """Delete what is in a folder of the cache and was not used for KEPT_S, drafts of ended processes too."""
    with suppress(OSError):
        for path in folder.iterdir():
            if time.time() - path.lstat().st_mtime < KEPT_S:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def is_own(path: Path) -> bool:
    """Whether nobody but this user can have written there. Raises OSError when there is nothing."""
    facts = path.lstat()
    return facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def recall(kind: str, of: Callable[[], Iterable[bytes | str]], make: Callable[[], Any]) -> Any:
    """What `make` returns, a JSON value, from the cache if it has been made of the same before.

    kind: folder of the cache. of: all that decides the value, contents and versions. Where the cache cannot be
    read, written or trusted, the value is made each time. Raises what `make` raises, and keeps nothing then.
    """
    file = fact_file(kind, of())
    if (known := read_fact(file)) is not None:
        return known
    made = make()
    if fact_file(kind, of()) == file:  # else what it is made of has changed meanwhile
        keep_fact(file, made)
    return made


def fact_file(kind: str, of: Iterable[bytes | str]) -> Path:
    """Where a fact of these contents is kept."""
    key = hashlib.blake2b(digest_size=16)
    for part in of:
        data = part.encode() if isinstance(part, str) else part
        key.update(len(data).to_bytes(8, "little") + data)
    try:
        root = cache_root()
    except RuntimeError:  # a user without a home folder, as containers have them
        root = Path(tempfile.gettempdir(), f"rayskip-{os.getuid()}")
    return root / kind / f"{key.hexdigest()}.json"


def read_fact(file: Path) -> Any:
    """The JSON value that `keep_fact` wrote; None where there is none, it is damaged, or others may have written
    it."""
    try:
        if not (is_own(file.parent) and is_own(file)):
            return None
        digest, _, data = file.read_bytes().partition(b"\n")
        used(file)
    except OSError:
        return None
    return json.loads(data) if digest == _digest(data) else None


def keep_fact(file: Path, value: Any) -> None:
    """Write a JSON value, so that a reader sees the whole or what was there before. Nothing is kept where that
    cannot be done."""
    data = json.dumps(value).encode()
    with suppress(OSError):
        file.parent.parent.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        number, draft = tempfile.mkstemp(dir=file.parent, prefix=".")
        try:
            with open(number, "wb") as aside:
                aside.write(_digest(data) + b"\n" + data)
            os.replace(draft, file)
        except OSError:
            os.unlink(draft)
            raise
        _forget(file.parent)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()
