"""Input formats, one file each. A format says how many rows a file has, of which schema, and reads a range.

FORMATS and SUFFIXES are the tables to extend; `sources.py` reads them.
"""

from __future__ import annotations

from rayskip.data.formats import arrow, csv, jsonl, openai, parquet
from rayskip.data.formats.base import UNREADABLE, Format, Scan

__all__ = ["FORMATS", "SUFFIXES", "UNREADABLE", "Format", "Scan"]

FORMATS: dict[str, Format] = {
    "parquet": parquet.FORMAT,
    "arrow": arrow.FORMAT,
    "jsonl": jsonl.FORMAT,
    "openai": openai.FORMAT,
    "csv": csv.FORMAT,
    "datasets": arrow.FORMAT,
    "hub": arrow.FORMAT,
}

SUFFIXES: dict[str, str] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
