"""Which files belong to which split of a dataset, by the names that `datasets` and the hub go by.

Pure: looks at names only. Does not know formats or file systems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from rayskip.errors import InputError

ALL = "all"
"""The word for every split, as in `datasets`."""

_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_WORD = {
    split: re.compile(rf"(.*[-._ 0-9])?({words})([-._ 0-9].*)?", re.DOTALL)
    for split, words in _KEYWORDS.items()
}
_SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def splits_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split that the names tell of, by the first of three rules that finds any: files such as
    data/SPLIT-00000-of-00002.parquet, folders with a word for a split in their name, files with one.

    names: paths below the input's root, with "/" between parts. Empty when nothing tells.
    """
    for rule in (_by_shard, _by_folder, _by_file):
        if found := _grouped(names, rule):
            return found
    return {}


def choose(splits: Iterable[str], split: str | None, path: str) -> list[str]:
    """The names of the splits to read of those that the data at `path` has: the one asked for, or the only one.

    Raises InputError with the choices when it is not there, or when there are several and none was asked for.
    """
    there = list(splits)
    if split == ALL or (split is None and len(there) == 1):
        return there
    if split in there:
        return [split]
    choices = f"input.split may be {', '.join(there)}" + (f" or {ALL}" if len(there) > 1 else "")
    if split is None:
        raise InputError(f"{path}: has several splits; {choices}")
    raise InputError(f"{path}: has no split {split!r}; {choices}")


def files_of(names: Sequence[str], split: str | None, path: str) -> set[str]:
    """Which of the input's files to read. Data whose names tell of no split is split "train", as in `datasets`.

    Raises InputError as `choose` does.
    """
    found = splits_of(names) or {"train": list(names)}
    told = {name for files in found.values() for name in files}
    # one split; a file may have the words of two in its name
    only = split is None and any(told == set(files) for files in found.values())
    if split == ALL or only:
        return set(names)
    (chosen,) = choose(found, split, path)
    return set(found[chosen])


def _grouped(names: Sequence[str], rule: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        for split in rule(name):
            found.setdefault(split, []).append(name)
    return found


def _by_shard(name: str) -> list[str]:
    match = _SHARDED.fullmatch(name)
    return [match[1]] if match else []


def _by_folder(name: str) -> list[str]:
    return _named_by(PurePosixPath(name).parts[:-1])


def _by_file(name: str) -> list[str]:
    return _named_by(PurePosixPath(name).parts[-1:])


def _named_by(parts: Iterable[str]) -> list[str]:
    return [split for split, word in _WORD.items() if any(word.fullmatch(part) for part in parts)]
