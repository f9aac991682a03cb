"""The input as a whole: which files, how many rows, one schema; and the plan's shards over it.

Holds memory per file and per thousand rows of text formats, never per row. Picklable: a replica gets it once.
Does not know what the columns mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from rayskip.config import InputConfig
from rayskip.data.fingerprint import fingerprint
from rayskip.data.formats import COMPRESSED, FORMATS, SUFFIXES, UNREADABLE, Reading, Scan
from rayskip.data.formats.text import inner_suffix
from rayskip.data.locate import Located, locate, locate_file, read_if_there, stamp
from rayskip.data.partitions import schema_of, with_columns
from rayskip.data.records import BROKEN_ROW, Shard
from rayskip.data.splits import ALL, choose, files_of
from rayskip.data.values import Row, python_rows
from rayskip.errors import InputError, StorageBusy, first_line

_READ_ROWS = 4096

_SCANS = 8
"""Files looked at together: in a bucket, waiting is most of the work."""

OPENAI_COLUMNS = ("custom_id", "url", "messages", "sampling_params")
"""What an openai batch line is read into; these names have a meaning."""

_OPENAI = {"custom_id", "method", "url", "body"}

_MOST_STATE = 1 << 26
"""Bytes of the files in which `datasets` says what a folder holds."""


@dataclass(frozen=True)
class InputFile:
    """name: the file's part of the row identity. fingerprint: of its content. stamp: its size and time of change,
    by which a change while a job runs is noticed. marks: what its format needs to find rows again. notes, warnings:
    see `Scan`."""

    url: str
    name: str
    rows: int
    fingerprint: str
    stamp: str
    marks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


_NO_COLUMNS = pa.schema([])
_USUAL = Reading()


@dataclass(frozen=True)
class Source:
    """A job's input: files in order of name, and the schema that every shard is read under.

    rename: new names of columns; the files and the schemas have the old ones. partitions: columns that the names of
    folders hold. reading: how text is read.
    """

    format: str
    files: list[InputFile]
    schema: pa.Schema
    rename: dict[str, str] = field(default_factory=dict)
    partitions: pa.Schema = _NO_COLUMNS
    reading: Reading = _USUAL

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column types by name, as the job sees them."""
        fields = [*self.schema, *self.partitions]
        return {self.rename.get(field.name, field.name): field.type for field in fields}

    @property
    def columns(self) -> list[str]:
        """Column names as the job sees them."""
        names = [*self.schema.names, *self.partitions.names]
        return [self.rename.get(name, name) for name in names]

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


def discover(config: InputConfig, texts: Collection[str] = ()) -> Source:
    """Find and count the input. texts: columns of CSV that stay text, beside those that the config names.

    Raises InputError naming the file that is missing, corrupt or different.
    """
    kind, located = _locate(config)
    reading = _reading(config, kind, texts)
    with ThreadPoolExecutor(_SCANS) as pool:
        scans = list(pool.map(lambda file: _scan(kind, file.url, reading), located))
    schema = _schema(kind, [scan for scan, _ in scans], config)
    files = [
        InputFile(file.url, file.name, scan.rows, content, file.stamp, scan.marks, scan.notes, scan.warnings)
        for file, (scan, content) in zip(located, scans, strict=True)
    ]
    if not any(file.rows for file in files):
        raise InputError(f"input.path: {config.path} has no rows")
    held = schema_of(file.name for file in files) if config.partitions else _NO_COLUMNS
    partitions = pa.schema([column for column in held if column.name not in schema.names])
    source = Source(kind, files, schema, config.rename, partitions, reading)
    _check_rename(source, config)
    _check_text_columns(source, config)
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

    Raises InputError when the file is no longer what it was or is damaged, StorageBusy when it cannot be reached.
    """
    file = source.file(shard.name)
    _refuse_changed(file)
    try:
        table = FORMATS[source.format].read(
            file.url, source.reading, file.marks, shard.start, shard.stop, source.schema
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file.url}: changed since the job was planned (it is gone)") from error
    except UNREADABLE as error:
        _refuse_changed(file)
        rows = f"rows {shard.start} to {shard.stop - 1}"
        raise InputError(f"{file.url}: damaged, {rows} cannot be read ({first_line(error)})") from error
    _refuse_changed(file)  # in the middle of it
    if table.num_rows != shard.rows:
        raise InputError(f"{file.url}: damaged, it has fewer rows than it says")
    table = with_columns(table, file.name, source.partitions)
    return table.rename_columns([source.rename.get(name, name) for name in table.column_names])


def every_row(
    source: Source, columns: Collection[str], max_rows: int | None = None
) -> Iterator[tuple[Shard, int, Row]]:
    """(shard, row index, row with those of `columns` that are there) of the first `max_rows` rows (default: all),
    for what needs no replicas."""
    for shard in plan_shards(source, _READ_ROWS, max_rows):
        for index, row in enumerate(python_rows(read_shard(shard, source), columns), shard.start):
            yield shard, index, row


def _reading(config: InputConfig, kind: str, texts: Collection[str]) -> Reading:
    """How the job has text read, by the files' own column names. Raises InputError for a key that says nothing of
    the format."""
    if config.encoding is not None and not FORMATS[kind].text:
        raise InputError(f"{config.path}: input.encoding is for text, and {kind} is none")
    for key in ("delimiter", "text_columns"):
        if kind != "csv" and getattr(config, key) not in (None, (), "all"):
            raise InputError(f"{config.path}: input.{key} is for CSV, and this is {kind}")
    if config.text_columns == "all":
        return Reading(config.encoding, config.delimiter, None)
    named = {new: old for old, new in config.rename.items()}
    texts = [*texts, *config.text_columns, config.prompt or "prompt"]
    return Reading(config.encoding, config.delimiter, frozenset(named.get(name, name) for name in texts))


def _scan(kind: str, url: str, reading: Reading) -> tuple[Scan, str]:
    """What is in a file, and the fingerprint of its content."""
    try:
        return FORMATS[kind].scan(url, reading), fingerprint(url, whole=FORMATS[kind].text)
    except (StorageBusy, FileNotFoundError, NotADirectoryError, *UNREADABLE) as error:
        raise InputError(f"{url}: cannot be read ({first_line(error)})") from error


def _refuse_changed(file: InputFile) -> None:
    if stamp(file.url) != file.stamp:
        raise InputError(f"{file.url}: changed since the job was planned")


def _schema(kind: str, scans: Sequence[Scan], config: InputConfig) -> pa.Schema:
    try:
        schema = FORMATS[kind].unify([scan.schema for scan in scans])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{config.path}: the files' columns do not agree ({first_line(error)})") from error
    if BROKEN_ROW in schema.names:
        raise InputError(f"{config.path}: the column name {BROKEN_ROW} is taken; rename it in the data")
    if kind in ("jsonl", "json") and config.format is None and set(schema.names) >= _OPENAI:
        raise InputError(
            f"{config.path}: these look like OpenAI batch lines; set input.format to openai to run them "
            f"or to {kind} to read them as they are"
        )
    return schema


def _check_rename(source: Source, config: InputConfig) -> None:
    present = [*source.schema.names, *source.partitions.names]
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


def _check_text_columns(source: Source, config: InputConfig) -> None:
    if config.text_columns != "all":
        for column in config.text_columns:
            source.require(config.path, "input.text_columns", column)


def _locate(config: InputConfig) -> tuple[str, list[Located]]:
    """The format, and the files."""
    if config.format == "hub" or (config.format is None and _is_hub_name(config.path)):
        return "hub", _hub(config)
    if config.format in (None, "datasets"):
        saved = _saved(config)
        if saved:
            return "datasets", saved
    if config.format == "datasets":
        raise InputError(f"{config.path}: not a folder written by datasets' save_to_disk (no state.json)")
    located = locate(config.path)
    wanted = files_of([file.name for file in located], config.split, config.path)
    located = [file for file in located if file.name in wanted]
    return config.format or _format_of(located), located


def _format_of(located: Sequence[Located]) -> str:
    found = {SUFFIXES.get(_suffix(file.name)): file.name for file in located}
    if None in found:
        raise InputError(
            f"input.path: cannot tell the format of {found[None]} from its suffix; set input.format, or name "
            f"files that end in {', '.join(SUFFIXES)}; those of text may be compressed, {' or '.join(COMPRESSED)}"
        )
    if len(found) > 1:
        raise InputError(f"input.path: files of several formats, such as {' and '.join(found.values())}")
    return next(kind for kind in found if kind)


def _suffix(name: str) -> str:
    """The end of a file's name that tells its format, without that of a compression of text."""
    inner = inner_suffix(name)
    is_text = inner in SUFFIXES and FORMATS[SUFFIXES[inner]].text
    return inner if is_text else PurePosixPath(name.lower()).suffix


class _DataFile(BaseModel):
    filename: str


class _State(BaseModel):
    """What `save_to_disk` writes about a split's folder, as far as it is read."""

    data_files: list[_DataFile] = Field(alias="_data_files", min_length=1)
    indices_files: list[_DataFile] | None = Field(None, alias="_indices_files")
    split: str | None = Field(None, alias="_split")


class _Splits(BaseModel):
    """What `save_to_disk` writes about a folder of splits."""

    splits: list[str] = Field(min_length=1)


def _saved(config: InputConfig) -> list[Located]:
    """The data files of a folder that `save_to_disk` wrote, in its order; none if it is no such folder."""
    folder = config.path.rstrip("/")
    if (index := _read_state(folder, "dataset_dict.json", _Splits)) is None:
        state = _read_state(folder, "state.json", _State)
        if state is None:
            return []
        choose([state.split or "train"], config.split, folder)
        return _saved_files(folder, state)
    chosen = choose(dict.fromkeys(index.splits), config.split, folder)
    return [file for split in chosen for file in _saved_split(folder, split, config.split == ALL)]


def _saved_split(folder: str, split: str, named: bool) -> list[Located]:
    """The files of a folder's split; named: each by its split too, as there are several."""
    inner = _inside(folder, split, "dataset_dict.json: splits")
    if (state := _read_state(inner, "state.json", _State)) is None:
        raise InputError(f"{folder}/dataset_dict.json: names the split {split!r}, which has no state.json")
    files = _saved_files(inner, state)
    return [replace(file, name=f"{split}/{file.name}") for file in files] if named else files


def _saved_files(folder: str, state: _State) -> list[Located]:
    if state.indices_files:
        raise InputError(f"{folder}: its rows are chosen by an index; save it again after flatten_indices()")
    names = [entry.filename for entry in state.data_files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{folder}/state.json: _data_files names {twice[0]!r} more than once")
    return [locate_file(_inside(folder, name, "state.json: _data_files")) for name in names]


def _inside(folder: str, name: str, key: str) -> str:
    """The path of what a file of the folder calls `name`. Raises InputError for anything but the plain name of
    something in that folder: who made the data must not choose which files of this machine are read."""
    url = f"{folder}/{name}"
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise InputError(f"{folder}/{key} has {name!r}, which is no plain name of a file in that folder")
    if "://" not in folder and os.path.realpath(url) != os.path.join(os.path.realpath(folder), name):
        raise InputError(f"{folder}/{key} has {name!r}, which is a link and no file in that folder")
    return url


S = TypeVar("S", bound=BaseModel)


def _read_state(folder: str, name: str, kind: type[S]) -> S | None:
    if (data := read_if_there(f"{folder}/{name}", _MOST_STATE)) is None:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"{folder}/{name}: {f'{key}: ' if key else ''}{fault['msg']}, so datasets' save_to_disk did not write "
            "this folder; to read the other files in it, set input.format"
        ) from error


def _is_hub_name(path: str) -> bool:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or _suffix(path) in SUFFIXES:
        return False
    if PurePosixPath(path).parent.name and os.path.isdir(PurePosixPath(path).parent):
        return False  # a name below a folder that is here is a file's, mistyped perhaps
    try:
        locate(path)
    except InputError:
        return True
    return False


def _hub(config: InputConfig) -> list[Located]:
    """The Arrow files that `datasets` keeps of a hub dataset's splits, fetched on first use.

    Replicas on other machines read them too, so there the cache must be on a shared file system.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        splits = load_dataset(config.path)  # all are fetched, whichever is asked for
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"input.path: {config.path} is no file or folder here, and the hub does not give it "
            f"({first_line(error)})"
        ) from error
    chosen = choose(splits, config.split, config.path)
    return [locate_file(entry["filename"]) for split in chosen for entry in splits[split].cache_files]
