"""The input as a whole: which files, how many rows, one schema; and the plan's shards over it.

Holds memory per file and per thousand rows of text formats, never per row. Picklable: a replica gets it once.
Does not know what the columns mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from rayskip.config import InputConfig
from rayskip.data.formats import FORMATS, SUFFIXES, Scan
from rayskip.data.locate import GLOB, Located, first_line, locate, read_if_there
from rayskip.data.records import BROKEN_ROW, Shard
from rayskip.errors import InputError, StorageBusy

_READ_ROWS = 4096

_SCANS = 8
"""Files looked at together: in a bucket, waiting is most of the work."""

OPENAI_COLUMNS = ("custom_id", "messages", "sampling_params")
"""What an openai batch line is read into; these names have a meaning."""

_OPENAI = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class InputFile:
    """name: the file's part of the row identity. fingerprint: changes when the content does.
    marks: what its format needs to find rows again."""

    url: str
    name: str
    rows: int
    fingerprint: str
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """A job's input: files in order of name, and the schema that every shard is read under.

    rename: new names of columns; the files and the schema have the old ones.
    """

    format: str
    files: list[InputFile]
    schema: pa.Schema
    rename: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Column names as the job sees them."""
        return [self.rename.get(name, name) for name in self.schema.names]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def require(self, path: str, key: str, column: str) -> None:
        """Refuse a config whose `key` names a column that the data at `path` lacks. Raises InputError."""
        if column not in self.columns:
            raise InputError(
                f"{path}: {key} names {column!r}, which is no column of the data; "
                f"columns: {', '.join(self.columns)}"
            )

    def file(self, name: str) -> InputFile:
        return next(file for file in self.files if file.name == name)


def discover(config: InputConfig) -> Source:
    """Find and count the input. Raises InputError naming the file that is missing, corrupt or different."""
    kind, located = _locate(config)
    with ThreadPoolExecutor(_SCANS) as pool:
        scans = list(pool.map(lambda file: FORMATS[kind].scan(file.url), located))
    schema = _schema(kind, scans, config)
    files = [
        InputFile(file.url, file.name, scan.rows, file.stamp, scan.marks)
        for file, scan in zip(located, scans, strict=True)
    ]
    if not any(file.rows for file in files):
        raise InputError(f"input.path: {config.path} has no rows")
    source = Source(kind, files, schema, config.rename)
    _check_rename(source, config)
    return source


def plan_shards(source: Source, shard_rows: int, max_rows: int | None = None) -> Iterator[Shard]:
    """Cut the first `max_rows` rows (default: all) into shards of at most `shard_rows`, each of one file."""
    left = source.rows if max_rows is None else min(max_rows, source.rows)
    index = 0
    for file in source.files:
        rows = min(file.rows, left)
        left -= rows
        for start in range(0, rows, shard_rows):
            yield Shard(index, file.url, file.name, start, min(start + shard_rows, rows))
            index += 1


def read_shard(shard: Shard, source: Source) -> pa.Table:
    """The shard's rows: every input column, and BROKEN_ROW, null for a row that could be read.

    Raises InputError when the file is no longer what it was, StorageBusy when it cannot be reached.
    """
    marks = source.file(shard.name).marks
    try:
        table = FORMATS[source.format].read(shard.file, marks, shard.start, shard.stop, source.schema)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise InputError(f"{shard.file}: changed since the job was planned ({first_line(error)})") from error
    except OSError as error:
        raise StorageBusy(f"{shard.file}: cannot be read ({first_line(error)})") from error
    if table.num_rows != shard.rows:
        raise InputError(f"{shard.file}: changed since the job was planned (it has fewer rows)")
    return table.rename_columns([source.rename.get(name, name) for name in table.column_names])


def every_row(source: Source, max_rows: int | None = None) -> Iterator[tuple[Shard, int, dict[str, Any]]]:
    """(shard, row index, row) of the first `max_rows` rows (default: all), for what needs no replicas."""
    for shard in plan_shards(source, _READ_ROWS, max_rows):
        for index, row in enumerate(read_shard(shard, source).to_pylist(), shard.start):
            yield shard, index, row


def _schema(kind: str, scans: Sequence[Scan], config: InputConfig) -> pa.Schema:
    try:
        schema = FORMATS[kind].unify([scan.schema for scan in scans])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{config.path}: the files' columns do not agree ({first_line(error)})") from error
    if BROKEN_ROW in schema.names:
        raise InputError(f"{config.path}: the column name {BROKEN_ROW} is taken; rename it in the data")
    if kind == "jsonl" and config.format is None and set(schema.names) >= _OPENAI:
        raise InputError(
            f"{config.path}: these look like OpenAI batch lines; set input.format to openai to run them "
            "or to jsonl to read them as they are"
        )
    return schema


def _check_rename(source: Source, config: InputConfig) -> None:
    present = source.schema.names
    for old, new in config.rename.items():
        if old not in present:
            raise InputError(
                f"{config.path}: input.rename names {old!r}, which is no column of the data; "
                f"columns: {', '.join(present)}"
            )
        if new == BROKEN_ROW or (source.format == "openai" and old in OPENAI_COLUMNS):
            raise InputError(
                f"{config.path}: input.rename cannot make {old!r} {new!r}; rayskip needs the name"
            )
        if source.columns.count(new) > 1:
            raise InputError(f"{config.path}: input.rename gives two columns the name {new!r}")


def _locate(config: InputConfig) -> tuple[str, list[Located]]:
    """The format, and the files."""
    if config.format == "hub" or (config.format is None and _is_hub_name(config.path)):
        return "hub", _hub(config)
    if config.format in (None, "datasets") and not GLOB & set(config.path):
        saved = _saved(config)
        if saved:
            return "datasets", saved
    if config.format == "datasets":
        raise InputError(f"{config.path}: not a folder written by datasets' save_to_disk (no state.json)")
    located = locate(config.path)
    return config.format or _format_of(located), located


def _format_of(located: Sequence[Located]) -> str:
    found = {SUFFIXES.get(_suffix(file.name)): file.name for file in located}
    if None in found:
        raise InputError(
            f"input.path: cannot tell the format of {found[None]} from its suffix; set input.format, or name "
            f"files that end in {', '.join(SUFFIXES)}"
        )
    if len(found) > 1:
        raise InputError(f"input.path: files of several formats, such as {' and '.join(found.values())}")
    return next(kind for kind in found if kind)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _saved(config: InputConfig) -> list[Located]:
    """The data files of a folder that `save_to_disk` wrote, in its order; none if it is no such folder."""
    folder = config.path.rstrip("/")
    if (index := read_if_there(f"{folder}/dataset_dict.json")) is not None:
        splits = json.loads(index)["splits"]
        if config.split not in splits:
            raise InputError(
                f"{folder}: has no split {config.split!r}; input.split may be {', '.join(splits)}"
            )
        folder = f"{folder}/{config.split}"
    if (data := read_if_there(f"{folder}/state.json")) is None:
        return []
    state = json.loads(data)
    if state.get("_indices_files"):
        raise InputError(f"{folder}: its rows are chosen by an index; save it again after flatten_indices()")
    return [file for entry in state["_data_files"] for file in locate(f"{folder}/{entry['filename']}")]


def _is_hub_name(path: str) -> bool:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or _suffix(path) in SUFFIXES:
        return False
    if PurePosixPath(path).parent.name and Path(path).parent.is_dir():
        return False  # a name below a folder that is here is a file's, mistyped perhaps
    try:
        locate(path)
    except InputError:
        return True
    return False


def _hub(config: InputConfig) -> list[Located]:
    """The Arrow files that `datasets` keeps of a hub dataset's split, fetched on first use.

    Replicas on other machines read them too, so there the cache must be on a shared file system.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(config.path, split=config.split)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"input.path: {config.path} is no file or folder here, and the hub does not give it "
            f"({first_line(error)})"
        ) from error
    return [file for entry in dataset.cache_files for file in locate(entry["filename"])]
