"""Is it the same job: what of a config decides the output, and in what two job records differ.

Does not know storage. Values are compared as values, so that a message can name them; hashes stand only for
contents, files and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayskip.config import JobConfig
from rayskip.data.sources import Source
from rayskip.driver.records import CommitRecord, JobRecord
from rayskip.errors import shown
from rayskip.model.checkpoint import adapter_fingerprint, weights_fingerprint

_DECIDING = ("input", "task", "sampling", "decode.skip", "engine.max_model_len", "output")
"""Parts of a config that decide the output's bytes; what only decides speed is not among them."""

_NAMING = {
    "input files": ("input.path", "input.split"),
    "model": ("model.path", "model.revision", "model.adapter", "model.dtype"),
    "the file of task.calibrate": ("task.calibrate.path",),
}
"""Keys that only say what the contents are; told where those differ."""

_ELSEWHERE = (
    *_NAMING["input files"],
    *_NAMING["the file of task.calibrate"],
    "output.path",
    "input.date",
    "output.prefix",
    "output.shard_rows",
)
"""Not compared with their part: contents are hashed, the folder is the same, and the last are chosen where the
config has none (`chosen`)."""

_BEFORE: dict[str, dict[str, Any]] = {
    "input": {"text_columns": "all", "partitions": False, "continue_final_message": False}
}
"""How a job reads that began before there was the key, where that is not the key's default."""

Values = dict[str, Any]
"""What a config says, by dotted key."""


def contents(job: JobConfig, source: Source, model: Path, labelled: Source | None) -> dict[str, str]:
    """A hash for each content that decides the output. model: the folder of its checkpoint. labelled: rows whose
    label is known, where the job is fitted to some."""
    adapter = (folder := job.model.adapter_folder) and adapter_fingerprint(folder)
    known = [(file.name, file.fingerprint) for file in labelled.files] if labelled else []
    task = {"the file of task.calibrate": digest(known)} if labelled else {}
    return task | {
        "input files": digest([(file.name, file.rows, file.fingerprint) for file in source.files]),
        "model": digest([weights_fingerprint(model), adapter, job.model.dtype]),
    }


def as_begun(job: JobConfig, there: JobRecord | None) -> JobConfig:
    """The job as it goes on in a folder that an earlier version began: what has become a key since is as it was
    then, where the job leaves it out."""
    if there is None:
        return job
    old = {key: value for key, value in _BEFORE["input"].items() if key not in there.config.get("input", {})}
    kept = {key: value for key, value in old.items() if key not in job.input.model_fields_set}
    return job.model_copy(update={"input": job.input.model_copy(update=kept)})


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """What a folder's config says, with what an earlier version did where there was no key yet."""
    return config | {name: values | config.get(name, {}) for name, values in _BEFORE.items()}


def stamps(source: Source) -> str:
    """A hash of the input files' sizes and times of change, as earlier versions had it for "input files"."""
    return digest([(file.name, file.rows, file.stamp) for file in source.files])


def said(config: dict[str, Any], under: str = "") -> Values:
    """What a config's nested sections say, by dotted key."""
    values: Values = {}
    for key, value in config.items():
        values |= said(value, f"{under}{key}.") if isinstance(value, dict) else {f"{under}{key}": value}
    return values


def deciding(values: Values) -> Values:
    """Those of a config's values, which are all there, that decide the output's bytes."""
    falls_back = values["quality.below_floor"] == "full_depth" and values["decode.skip.kind"] != "none"
    parts = (*_DECIDING, "quality") if falls_back else _DECIDING
    return {
        key: value
        for key, value in values.items()
        if key not in _ELSEWHERE and any(f"{key}.".startswith(f"{part}.") for part in parts)
    }


def chosen(record: JobRecord) -> Values:
    """What a job's record says of the keys that a config may leave open, by dotted key."""
    return {
        "input.date": record.date and str(record.date),
        "output.prefix": record.prefix,
        "output.shard_rows": record.shard_rows,
    }


def fingerprint(record: JobRecord) -> str:
    """Of all that decides the job's output, what it chose included."""
    values = deciding(said(record.config))
    return digest([record.parts, values, str(record.date), record.prefix, record.shard_rows])


def as_chosen(record: JobRecord, commit: CommitRecord) -> JobRecord:
    """The record of a job that chose date and shards as a commit of it says, unless its config gives them."""
    given = said(record.config)
    chosen: dict[str, Any] = {}
    if given["input.date"] is None:
        chosen |= {"date": commit.date}
    if given["output.shard_rows"] is None:
        chosen |= {"shard_rows": commit.shard_rows, "shards": commit.shards}
    changed = record.model_copy(update=chosen)
    return record if changed == record else changed.model_copy(update={"fingerprint": fingerprint(changed)})


def differences(there: JobRecord, here: JobRecord) -> list[str]:
    """What decides the output and is not the same in both, with both values; empty where they are one job.

    there: a folder's, perhaps by another version: a key that it lacks has come since and counts as what was done
    before, which is its default but for _BEFORE; one that only it has differs unless it is null. Its input files
    may be known by their stamps. What is chosen where it is not given is taken from there.
    """
    config = _complete(there.config)
    try:
        known = JobConfig.model_validate(config, extra="ignore").model_dump(mode="json")
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        return [f"{key} ({shown(fault['input'])} there, which this rayskip does not know)"]
    old, new = said(known), said(here.config)
    found = []
    for part, keys in _NAMING.items():
        if there.parts.get(part) not in (here.parts.get(part), here.stamps):
            found += _unequal(old, new, keys) or [part]
    given = {
        key: new[key] for key, value in chosen(there).items() if value is not None and new[key] is not None
    }
    old = deciding(said(config) | old) | {key: chosen(there)[key] for key in given}
    new = deciding(new) | given
    return found + _unequal(old, new, sorted(old.keys() | new.keys()))


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _unequal(old: Values, new: Values, keys: Iterable[str]) -> list[str]:
    """The keys whose values differ, with both."""
    return [
        f"{key} ({shown(old.get(key))} there, {shown(new.get(key))} here)"
        for key in keys
        if old.get(key) != new.get(key)
    ]
