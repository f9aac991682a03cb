"""Identity of input files by content: a copy is the same file, a change of equal size makes another."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import s3_server

from rayskip.config import InputConfig
from rayskip.data.fingerprint import fingerprint
from rayskip.data.locate import filesystem
from rayskip.data.sources import discover
from rayskip.data.storage import open_storage

LARGE = 6 << 20


def _flip(path: Path, place: int) -> None:
    """Change a byte and nothing that the file system tells of the file."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("size", "whole", "places"),
    [
        (100, False, [0, 50, -1]),
        (LARGE, True, [0, 300_000, LARGE // 2, -1]),
        (LARGE, False, [0, 7 * (LARGE - (1 << 18)) // 15, -1]),  # the ends, and a block between
    ],
)
def test_a_copy_is_the_same_and_a_changed_byte_is_not(
    tmp_path: Path, size: int, whole: bool, places: list[int]
) -> None:
    path = tmp_path / "a"
    path.write_bytes(random.Random(1).randbytes(size))
    own = fingerprint(str(path), whole)
    copy = Path(shutil.copyfile(path, tmp_path / "b"))
    os.utime(copy, ns=(0, 0))
    assert fingerprint(str(copy), whole) == own
    seen = {own}
    for place in places:
        _flip(path, place)
        seen.add(fingerprint(str(path), whole))
    assert len(seen) == len(places) + 1
    with copy.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(str(copy), whole) not in seen


def test_a_parquet_footer_counts_whole(tmp_path: Path) -> None:
    """Here it is larger than the blocks that are read of a file, and than what lies between two of them."""
    path = tmp_path / "wide.parquet"
    columns = {f"column {number}": [number] for number in range(3000)}
    pq.write_table(pa.table({"data": [random.Random(1).randbytes(LARGE)]} | columns), path)
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little")
    assert footer > path.stat().st_size // 15
    seen = {fingerprint(str(path), whole=False)}
    between = range(path.stat().st_size - footer, path.stat().st_size - 8, 50_000)
    for place in between:
        _flip(path, place)
        seen.add(fingerprint(str(path), whole=False))
    assert len(seen) == len(between) + 1


def test_planning_reads_text_whole_and_gives_content_and_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "row {row:01000}"}}\n' for row in range(5000)))
    (before,) = discover(InputConfig(path=str(path))).files
    assert path.stat().st_size > 1 << 22
    _flip(path, 100 + 286 * 1019)  # in no block that a sample would read
    (after,) = discover(InputConfig(path=str(path))).files
    assert after.stamp == before.stamp
    assert after.fingerprint != before.fingerprint
    _flip(path, 100 + 286 * 1019)
    os.utime(path, ns=(0, 0))
    (again,) = discover(InputConfig(path=str(path))).files
    assert again.fingerprint == before.fingerprint
    assert again.stamp != before.stamp


def test_an_object_is_the_same_as_the_file_it_was_whatever_parts_it_came_in(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b'{"prompt": "one"}\n')
    pq.write_table(pa.table({"data": [random.Random(1).randbytes(4 * LARGE)]}), tmp_path / "table")
    with s3_server() as bucket:
        for name, whole in (("text", True), ("table", False)):
            data, url = (tmp_path / name).read_bytes(), f"{bucket}/in/{name}"
            store, place = filesystem(url)
            seen = {fingerprint(str(tmp_path / name), whole)}
            for parts in (1, 3):  # the store's own hash of three parts is another
                with store.open_output_stream(place, buffer_size=LARGE) as target:
                    size = -(-len(data) // parts)
                    for start in range(0, len(data), size):
                        target.write(data[start : start + size])
                seen.add(fingerprint(url, whole))
            assert len(seen) == 1
            open_storage(f"{bucket}/in").put(name, bytes([data[0] ^ 1]) + data[1:])
            assert fingerprint(url, whole) not in seen
