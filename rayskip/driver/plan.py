"""The plan: which shards the input is cut into, and what job.json says of the job.

Does not know replicas. Holds memory per shard, never per row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rayskip.config import DecodeConfig, JobConfig
from rayskip.data.output import check_output
from rayskip.data.prompts import check_input, prompt_source
from rayskip.data.records import Shard
from rayskip.data.sources import Source, discover, plan_shards
from rayskip.data.tokenizer import tells_date
from rayskip.driver.identity import contents, deciding, digest, said, stamps
from rayskip.driver.records import JobRecord, signature
from rayskip.model.checkpoint import check, read_layer_count, resolve
from rayskip.skip import skip_policy


@dataclass(frozen=True)
class Plan:
    """A job cut into shards. source: what replicas need to read them. record: what job.json says, of a folder that
    holds the job already its own (see `commit.adopt`). seconds: what planning took.
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
    check(folder, Path(job.model.adapter).expanduser() if job.model.adapter else None)
    if job.decode != DecodeConfig():
        from rayskip.decode.drafters import check_files  # imports torch, which takes its time

        check_files(job.decode.draft, folder, skip_policy(job.decode.skip, read_layer_count(folder)))
    parts, config, day = (
        contents(job, source, folder),
        job.model_dump(mode="json"),
        job_date(job, source, folder),
    )
    record = JobRecord(
        name=job.name,
        fingerprint=digest([parts, deciding(said(config)), str(day)]),
        parts=parts,
        stamps=stamps(source),
        date=day,
        shards=len(shards),
        rows=sum(shard.rows for shard in shards),
        config=config,
        **signature(),
    )
    return Plan(source, shards, record, time.monotonic() - began)


def job_date(job: JobConfig, source: Source, model: Path) -> date | None:
    """The day that chat templates are to tell as today's: the job's own, or today; None where none asks for it.

    model: the folder of its checkpoint.
    """
    chat = job.input.chat or prompt_source(job.input, source.columns)[0] == "messages"
    return job.input.date or date.today() if chat and tells_date(model) else None
