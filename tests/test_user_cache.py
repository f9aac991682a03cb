"""What is kept in the user's cache: read back only where it is whole, of the same contents and this user's own."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from rayskip.user_cache import recall


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Says how often it was asked."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> list[int]:
        self.made += 1
        return [self.made]


def the_file(cache: Path) -> Path:
    (file,) = (cache / "facts").iterdir()
    return file


def test_a_value_is_made_once_for_the_same_contents() -> None:
    make = Maker()
    assert [
        recall("facts", lambda of=of: of, make)
        for of in (["a", b"bc"], ["a", "bc"], ["ab", "c"], ["a", "bc"])
    ] == [
        [1],
        [1],
        [2],
        [1],
    ]


def test_a_damaged_value_is_made_anew(cache: Path) -> None:
    make = Maker()
    recall("facts", lambda: ["a"], make)
    whole = the_file(cache).read_bytes()
    for spoilt in (whole[:-1], whole.replace(b"[1]", b"[7]"), b""):
        the_file(cache).write_bytes(spoilt)
        made = make.made
        assert recall("facts", lambda: ["a"], make) == recall("facts", lambda: ["a"], make) == [made + 1]


@pytest.mark.parametrize("path", ["facts", "file"])
def test_what_others_may_have_written_is_not_read(path: str, cache: Path) -> None:
    make = Maker()
    recall("facts", lambda: ["a"], make)
    os.chmod(cache / "facts" if path == "facts" else the_file(cache), 0o777)
    assert recall("facts", lambda: ["a"], make) == [2]


def test_nothing_is_kept_of_a_failure_or_where_nothing_can_be_written(cache: Path) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recall("facts", lambda: ["a"], fail)
    make = Maker()
    assert recall("facts", lambda: ["a"], make) == [1]
    os.environ["RAYSKIP_CACHE"] = str(the_file(cache))  # no folder
    assert [recall("facts", lambda: ["a"], make) for _ in range(2)] == [[2], [3]]


def test_what_changed_while_it_was_read_is_not_kept() -> None:
    make, contents = Maker(), ["before"]

    def changing() -> list[int]:
        contents[0] = "after"
        return make()

    assert recall("facts", lambda: contents, changing) == [1]
    contents[0] = "before"
    assert recall("facts", lambda: contents, make) == [2]


def test_what_nobody_uses_is_forgotten(cache: Path) -> None:
    make = Maker()
    recall("facts", lambda: ["old"], make)
    recall("facts", lambda: ["used"], make)
    (cache / "facts/.draft").mkdir()
    for path in (cache / "facts").iterdir():
        os.utime(path, (0, 0))
    assert recall("facts", lambda: ["used"], make) == [2]
    recall("facts", lambda: ["new"], make)
    assert len(list((cache / "facts").iterdir())) == 2
    assert recall("facts", lambda: ["used"], make) == [2]


def test_a_user_without_a_home_folder_has_facts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAYSKIP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make = Maker()
    assert [recall("facts", lambda: ["a"], make) for _ in range(2)] == [[1], [1]]
