"""Text files as UTF-8 bytes, whatever their encoding and compression, and their lines.

A place in a file is a byte offset into that text. Plain UTF-8 is read from there; what is compressed or in another
encoding is read from its beginning, and what comes before is dropped. Does not know what lines mean.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayskip.data.formats.base import BUFFER
from rayskip.data.locate import open_input
from rayskip.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MARK_ROWS = 1000
"""Rows between two remembered byte offsets of a text file: planning keeps a number per so many rows."""

MAX_LINE = 1 << 24
"""Bytes of the longest line of a text format that is read, 16 MiB: a prompt of some million tokens. While it is
parsed a line may take fifty times as much memory."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Ends of the names of compressed text files."""

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin, which no text does."""

_BOM = codecs.BOM_UTF8
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class LongLine:
    """In place of a line of more than MAX_LINE bytes, which is never read as a whole. size: its bytes."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"the line has {self.size:,} bytes; the most that is read is {MAX_LINE:,}"


Line = bytes | LongLine


def open_text(url: str, encoding: str | None, offset: int = 0) -> io.BufferedReader[Any]:
    """A file's text in UTF-8, from a byte offset into that. encoding: null for what the file begins with.

    Raises as `open_input` does; a read raises OSError where compressed data is damaged, UnicodeDecodeError where
    the text is not of another encoding that it should be of. UTF-8 is not checked.
    """
    text = _unpacked(url)
    if codec := _codec(url, encoding, text):
        text = io.BufferedReader(_Transcoded(text, codec), BUFFER)
    if text.seekable():
        text.seek(offset)
        return text
    while offset > 0 and (dropped := text.read(min(offset, BUFFER))):
        offset -= len(dropped)
    return text


def inner_suffix(name: str) -> str:
    """The end of a file's name, in lower case, without that of a compression."""
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def encoding_of(url: str, encoding: str | None) -> str | None:
    """The codec of a file's text, None for UTF-8: `encoding`, or what the file begins with tells. Raises InputError
    where it does not."""
    with _unpacked(url) as text:
        return _codec(url, encoding, text)


def read_lines(url: str, encoding: str | None, offset: int = 0) -> Iterator[Line]:
    """Lines with their line ends, from a byte offset that begins one. Only a newline ends a line."""
    with open_text(url, encoding, offset) as source:
        while line := source.readline(MAX_LINE + 1):
            if len(line) <= MAX_LINE:
                yield line
                continue
            size = len(line)
            while not line.endswith(b"\n") and (line := source.readline(BUFFER)):
                size += len(line)
            yield LongLine(size)


def without_bom(line: bytes) -> bytes:
    """The first line of a file without the mark that some editors put there."""
    return line.removeprefix(_BOM)


def _unpacked(url: str) -> io.BufferedReader[Any]:
    """A file's bytes, decompressed where they are compressed, whatever the file is called."""
    packed = io.BufferedReader(open_input(url), BUFFER)
    head = packed.peek(4)[:4]
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            plain = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), kind)
            return io.BufferedReader(plain, BUFFER)
    return packed


def _codec(url: str, encoding: str | None, text: io.BufferedReader[Any]) -> str | None:
    """`encoding_of` a text that is at its beginning, and stays there."""
    if encoding is not None:
        return None if codecs.lookup(encoding).name == "utf-8" else encoding
    head = text.peek(4)[:4]
    if head.startswith(_UTF_16):
        return "utf-16"
    if b"\0" in head:
        raise InputError(f"{url}: begins with a NUL, so it is not UTF-8; name its encoding in input.encoding")
    return None


class _Transcoded(io.RawIOBase):
    """Text of another encoding as UTF-8."""

    def __init__(self, source: io.BufferedReader[Any], encoding: str) -> None:
        super().__init__()
        self._source = source
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            data = self._source.read(BUFFER)
            self._ready = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()
