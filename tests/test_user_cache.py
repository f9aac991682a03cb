"""What is kept in the user's cache: read back only where it is whole, of the same contents and this user's own."""

from __future__ import annotations

import os
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
    assert [recall("facts", of, make) for of in (["a", b"bc"], ["a", "bc"], ["ab", "c"], ["a", "bc"])] == [
        [1],
        [1],
        [2],
        [1],
    ]


def test_a_damaged_value_is_made_anew(cache: Path) -> None:
    make = Maker()
    recall("facts", ["a"], make)
    whole = the_file(cache).read_bytes()
    for spoilt in (whole[:-1], whole.replace(b"[1]", b"[7]"), b""):
        the_file(cache).write_bytes(spoilt)
        made = make.made
        assert recall("facts", ["a"], make) == recall("facts", ["a"], make) == [made + 1]


@pytest.mark.parametrize("path", ["facts", "file"])
def test_what_others_may_have_written_is_not_read(path: str, cache: Path) -> None:
    make = Maker()
    recall("facts", ["a"], make)
    os.chmod(cache / "facts" if path == "facts" else the_file(cache), 0o777)
    assert recall("facts", ["a"], make) == [2]


def test_nothing_is_kept_of_a_failure_or_where_nothing_can_be_written(cache: Path) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recall("facts", ["a"], fail)
    make = Maker()
    assert recall("facts", ["a"], make) == [1]
    os.environ["RAYSKIP_CACHE"] = str(the_file(cache))  # no folder
    assert [recall("facts", ["a"], make) for _ in range(2)] == [[2], [3]]
