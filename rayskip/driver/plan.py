"""The plan: which shards the input is cut into, and the fingerprint that says what decides the output.

Does not know replicas. Holds memory per shard, never per row.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayskip.config import DecodeConfig, JobConfig
from rayskip.data.output import check_output
from rayskip.data.prompts import check_input
from rayskip.data.records import Shard
from rayskip.data.sources import Source, discover, plan_shards
from rayskip.driver.records import JobRecord
from rayskip.model.checkpoint import (
    adapter_fingerprint,
    check_base,
    read_layer_count,
    resolve,
    weights_fingerprint,
)
from rayskip.skip import skip_policy


@dataclass(frozen=True)
class Plan:
    """A job cut into shards. source: what replicas need to read them. record: what job.json says.
    seconds: what planning took.
    """

    source: Source
    shards: list[Shard]
    record: JobRecord
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Input rows of the job."""
        return self.record.rows


def make_plan(job: JobConfig) -> Plan:
    """Look at the input, the model and what drafts for it, and cut the input into shards; loads no weights.

    Raises InputError, ModelError or ConfigError.
    """
    began = time.monotonic()
    source = discover(job.input)
    check_input(job.input, source.columns)
    check_output(job, source.columns)
    shards = list(plan_shards(source, job.output.shard_rows, job.input.max_rows))
    folder = resolve(job.model.path, job.model.revision)
    if job.model.adapter is not None:
        check_base(Path(job.model.adapter).expanduser(), folder)
    if job.decode != DecodeConfig():
        from rayskip.decode.drafters import check_files  # imports torch, which takes its time

        check_files(job.decode.draft, folder, skip_policy(job.decode.skip, read_layer_count(folder)))
    parts = fingerprint_parts(job, source, folder)
    record = JobRecord(
        name=job.name,
        fingerprint=digest(parts),
        parts=parts,
        shards=len(shards),
        rows=sum(shard.rows for shard in shards),
        config=job.model_dump(mode="json"),
    )
    return Plan(source, shards, record, time.monotonic() - began)


def fingerprint_parts(job: JobConfig, source: Source, model: Path) -> dict[str, str]:
    """A hash for each part of a job that decides its output bytes; what only decides speed is left out.

    model: the folder of its checkpoint.
    """
    weights = weights_fingerprint(model)
    adapter = job.model.adapter and adapter_fingerprint(Path(job.model.adapter).expanduser())
    falls_back = job.quality.below_floor == "full_depth" and job.decode.skip.kind != "none"
    return {
        "input files": digest([(file.name, file.rows, file.fingerprint) for file in source.files]),
        "input": digest(job.input.model_dump(mode="json", exclude={"path"})),
        "model": digest([weights, adapter, job.model.dtype]),
        "sampling": digest(job.sampling.model_dump(mode="json")),
        "decode.skip": digest(job.decode.skip.model_dump(mode="json")),
        "quality": digest(job.quality.model_dump(mode="json") if falls_back else None),
        "engine.max_model_len": digest(job.engine.max_model_len),
        "output": digest(job.output.model_dump(mode="json", exclude={"path"})),
    }


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
