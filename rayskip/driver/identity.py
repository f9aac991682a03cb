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
from rayskip.driver.records import JobRecord
from rayskip.errors import shown
from rayskip.model.checkpoint import adapter_fingerprint, weights_fingerprint

_DECIDING = ("input", "sampling", "decode.skip", "engine.max_model_len", "output")
"""Parts of a config that decide the output's bytes; what only decides speed is not among them."""

_NAMING = {
    "input files": ("input.path", "input.split"),
    "model": ("model.path", "model.revision", "model.adapter", "model.dtype"),
}
"""Keys that only say what the contents are; told where those differ."""

_ELSEWHERE = (*_NAMING["input files"], "input.date", "output.path")
"""Not compared with their part: contents are hashed, a record has the date, and the folder is the same."""

Values = dict[str, Any]
"""What a config says, by dotted key."""


def contents(job: JobConfig, source: Source, model: Path) -> dict[str, str]:
    """A hash for each content that decides the output. model: the folder of its checkpoint."""
    adapter = job.model.adapter and adapter_fingerprint(Path(job.model.adapter).expanduser())
    return {
        "input files": digest([(file.name, file.rows, file.fingerprint) for file in source.files]),
        "model": digest([weights_fingerprint(model), adapter, job.model.dtype]),
    }


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


def differences(there: JobRecord, here: JobRecord) -> list[str]:
    """What decides the output and is not the same in both, with both values; empty where they are one job.

    there: a folder's, perhaps by another version: a key that it lacks has come since and counts as its default, one
    that only it has differs unless it is null. Its input files may be known by their stamps. A date that was not
    given here is taken from there.
    """
    try:
        known = JobConfig.model_validate(there.config, extra="ignore").model_dump(mode="json")
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        return [f"{key} ({shown(fault['input'])} there, which this rayskip does not know)"]
    old, new = said(known), said(here.config)
    found = []
    for part, keys in _NAMING.items():
        if there.parts.get(part) not in (here.parts.get(part), here.stamps):
            found += _unequal(old, new, keys) or [part]
    old, new = deciding(said(there.config) | old), deciding(new)
    found += _unequal(old, new, sorted(old.keys() | new.keys()))
    if here.config["input"]["date"] is not None and there.date is not None:
        found += _unequal({"input.date": str(there.date)}, {"input.date": str(here.date)}, ["input.date"])
    return found


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
