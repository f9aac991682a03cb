"""JSON files: a list of objects, or one object a line.

A list is cut at its commas, without a look into what is between them, and its elements are read as JSON lines are.
So no file is in memory as a whole, and damage within an element costs that row alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from rayskip.data.formats import jsonl
from rayskip.data.formats.base import BUFFER, Format, Reading, Scan
from rayskip.data.formats.text import MAX_LINE, open_text, without_bom
from rayskip.errors import InputError

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""A whole string, or what decides where an element ends; a quote alone begins a string that goes on."""


def scan(url: str, reading: Reading) -> Scan:
    if not _is_list(url, reading):
        _, line = next(jsonl.lines_of(url, reading)(0), (0, b"{}"))
        if (fault := jsonl.parse(line)[1]) is not None:
            raise InputError(f"{url}: is neither a list of objects nor one object a line ({fault})")
    return jsonl.scan_rows(_rows_of(url, reading))


def read(
    url: str, reading: Reading, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    return jsonl.read_rows(_rows_of(url, reading), marks, start, stop, schema)


def _rows_of(url: str, reading: Reading) -> jsonl.Numbered:
    if _is_list(url, reading):
        return partial(_elements, url, reading.encoding)
    return jsonl.lines_of(url, reading)


def _is_list(url: str, reading: Reading) -> bool:
    with open_text(url, reading.encoding) as text:
        return without_bom(text.peek()).lstrip().startswith(b"[")


def _elements(url: str, encoding: str | None, offset: int) -> Iterator[tuple[int, bytes]]:
    """Elements of a file's list with their byte offsets, from the file's beginning or that of an element.

    Raises InputError where the file is not one list.
    """
    with open_text(url, encoding, offset) as source:
        text = source.read(BUFFER)
        begin = place = (
            0 if offset else text.index(b"[") + 1
        )  # of the element, and of what was not looked at yet
        first, depth = not offset, 1
        while True:
            while (found := _TOKEN.search(text, place)) and found[0] != b'"':
                place = found.end()
                opens, closes = found[0] in (b"[", b"{"), found[0] in (b"]", b"}")
                if depth == 1 and (closes or found[0] == b","):
                    element = text[begin : found.start()]
                    _refuse_long(url, offset + begin, element)
                    if element.strip() or not (first and closes):
                        yield offset + begin, element
                    if closes:
                        return _refuse_more(url, text[place:] + source.read(BUFFER))
                    begin, first = place, False
                depth += opens - closes
            place = found.start() if found else len(text)
            _refuse_long(url, offset + begin, text[begin:])
            if not (data := source.read(BUFFER)):
                raise InputError(f"{url}: cut off, its list does not end")
            text, offset, place, begin = text[begin:] + data, offset + begin, place - begin, 0


def _refuse_long(url: str, offset: int, element: bytes) -> None:
    if len(element) > MAX_LINE:
        raise InputError(f"{url}: the element at byte {offset:,} has more than {MAX_LINE:,} bytes")


def _refuse_more(url: str, rest: bytes) -> None:
    if rest.strip():
        raise InputError(f"{url}: goes on after the end of its list")


FORMAT = Format(scan, read, jsonl.unify_files, text=True)
