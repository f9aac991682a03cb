"""A file's bytes for its hash: all of them, or evenly spaced blocks of a large one.

Does not know what files hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 1 << 20

SAMPLES = 16
"""Blocks that are read of a large file, evenly spaced: the first and the last begin and end it."""


def blocks(source: BinaryIO) -> Iterator[bytes]:
    """A whole file, from its start."""
    source.seek(0)
    while block := source.read(BLOCK):
        yield block


def sampled(source: BinaryIO, size: int, block: int) -> Iterator[bytes]:
    """SAMPLES evenly spaced blocks of `block` bytes of a file of `size` bytes; all of it where that is no more."""
    if size <= SAMPLES * block:
        yield from blocks(source)
        return
    for part in range(SAMPLES):
        source.seek((size - block) * part // (SAMPLES - 1))
        yield source.read(block)
