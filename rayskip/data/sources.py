"""The input as a whole: which files, how many rows, one schema; and the plan's shards over it.

Holds memory per file and per thousand rows of text formats, never per row. Picklable: a replica gets it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from rayskip.config import InputConfig
from rayskip.data.formats import FORMATS, SUFFIXES
from rayskip.data.locate import Located, locate
from rayskip.data.records import Shard
from rayskip.errors import InputError


@dataclass(frozen=True)
class InputFile:
    """name: the file's part of the row identity. fingerprint: changes when the content does.
    marks: byte offsets that find rows again (text formats)."""

    url: str
    name: str
    rows: int
    fingerprint: str
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """A job's input: files in order of name, and the schema that every shard is read under."""

    format: str
    files: list[InputFile]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def file(self, name: str) -> InputFile:
        return next(file for file in self.files if file.name == name)


def discover(config: InputConfig) -> Source:
    """Find and count the input. Raises InputError naming the file that is missing, corrupt or unlike the rest."""
    kind, located = _locate(config)
    files, schemas = [], []
    for file in located:
        scan = FORMATS[kind].scan(file.url)
        files.append(InputFile(file.url, file.name, scan.rows, file.stamp, scan.marks))
        schemas.append(scan.schema)
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{config.path}: the files' columns do not agree ({error})") from error
    if not any(file.rows for file in files):
        raise InputError(f"{config.path}: no rows")
    return Source(kind, files, schema)


def plan_shards(source: Source, shard_rows: int, max_rows: int | None = None) -> Iterator[Shard]:
    """Cut the first `max_rows` rows (all by default) into shards of at most `shard_rows`; none spans two files."""
    left = source.rows if max_rows is None else min(max_rows, source.rows)
    index = 0
    for file in source.files:
        rows = min(file.rows, left)
        left -= rows
        for start in range(0, rows, shard_rows):
            yield Shard(index, file.url, file.name, start, min(start + shard_rows, rows))
            index += 1


def read_shard(shard: Shard, source: Source) -> pa.Table:
    """The shard's rows: every input column, and BROKEN_ROW, null for a row that could be read."""
    marks = source.file(shard.name).marks
    return FORMATS[source.format].read(shard.file, marks, shard.start, shard.stop, source.schema)


def _locate(config: InputConfig) -> tuple[str, list[Located]]:
    """The format, and the files."""
    folder = Path(config.path)
    if config.format == "hub" or (config.format is None and _is_hub_name(config.path)):
        return "hub", _hub(config)
    if config.format == "datasets" or (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return "datasets", _saved(folder, config.split)
    located = locate(config.path)
    return config.format or _format_of(located), located


def _format_of(located: list[Located]) -> str:
    suffixes = {PurePosixPath(file.name).suffix for file in located}
    kinds = {SUFFIXES.get(suffix) for suffix in suffixes}
    kind = kinds.pop()
    if kinds or kind is None:
        known = ", ".join(SUFFIXES)
        raise InputError(
            f"input.path: cannot tell the format of {located[0].url} from {', '.join(sorted(suffixes)) or 'no suffix'}; "
            f"set input.format, or give files of one of {known}"
        )
    return kind


def _saved(folder: Path, split: str) -> list[Located]:
    """The data files of a folder written by `save_to_disk`, in its own order."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise InputError(f"{folder}: has no split {split!r}; input.split may be {', '.join(splits)}")
        folder = folder / split
    if not (folder / "state.json").exists():
        raise InputError(f"{folder}: not a folder written by datasets' save_to_disk (no state.json)")
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_files"):
        raise InputError(f"{folder}: saved with an index over its rows; call flatten_indices() before save_to_disk()")
    return [located for entry in state["_data_files"] for located in locate(str(folder / entry["filename"]))]


def _is_hub_name(path: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists() and not PurePosixPath(path).suffix


def _hub(config: InputConfig) -> list[Located]:
    """The Arrow files that `datasets` keeps of a hub dataset's split, fetched on first use."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(config.path, split=config.split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"input.path: no file {config.path}, and the hub does not give it ({error})") from error
    return [located for entry in dataset.cache_files for located in locate(entry["filename"])]
