"""Input formats, one file each. A format says how many rows a file has, of which schema, and reads a range.

FORMATS and SUFFIXES are the tables to extend; `sources.py` reads them.
"""

from __future__ import annotations

from rayskip.data.formats import arrow, csv, json, jsonl, openai, parquet
from rayskip.data.formats.base import UNREADABLE, Format, Reading, Scan
from rayskip.data.formats.text import COMPRESSED

__all__ = ["COMPRESSED", "FORMATS", "SUFFIXES", "UNREADABLE", "Format", "Reading", "Scan"]

FORMATS: dict[str, Format] = {
    "parquet": parquet.FORMAT,
    "arrow": arrow.FORMAT,
    "jsonl": jsonl.FORMAT,
    "json": json.FORMAT,
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
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
