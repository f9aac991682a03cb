"""What a file holds, as one hash: a copy has the same one, whatever its name, its time and its store.

Does not know formats or jobs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import BinaryIO

from rayskip.data.blocks import BLOCK, blocks, sampled
from rayskip.data.locate import open_input

_SAMPLE = 1 << 18
_PARQUET = b"PAR1"


def fingerprint(url: str, whole: bool) -> str:
    """Identity of the content of the file at `url`, a sha256 hex digest.

    Of all bytes if `whole`, which is for files that planning reads whole anyway. Otherwise of the size, of all
    bytes up to 4 MiB, of a larger file 16 evenly spaced blocks of 256 KiB, and a Parquet file's whole footer, which
    has size and bounds of every column chunk. Raises FileNotFoundError or NotADirectoryError, and StorageBusy when
    the file cannot be read.
    """
    digest = hashlib.sha256()
    with io.BufferedReader(open_input(url), BLOCK) as source:
        size = source.seek(0, io.SEEK_END)
        digest.update(f"{size}\n".encode())
        for block in blocks(source) if whole else _some(source, size):
            digest.update(block)
    return digest.hexdigest()


def _some(source: BinaryIO, size: int) -> Iterator[bytes]:
    yield from sampled(source, size, _SAMPLE)
    source.seek(max(0, size - 8))
    length, magic = source.read(4), source.read(4)
    footer = int.from_bytes(length, "little") + 8
    if magic == _PARQUET and _SAMPLE < footer <= size:
        source.seek(size - footer)
        yield source.read(footer)
