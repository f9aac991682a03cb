"""The plan: which shards the input is cut into, and what job.json says of the job.

Does not know replicas. Holds memory per shard, never per row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from rayskip.config import DecodeConfig, JobConfig
from rayskip.config.label import LabelTask
from rayskip.data.folder import DATA, JOB, open_folder
from rayskip.data.labelled_file import check_task, hint
from rayskip.data.locate import covers
from rayskip.data.output import SUFFIXES, choose_prefix
from rayskip.data.prompts import check_input, prompt_source
from rayskip.data.records import Shard
from rayskip.data.sources import Source, discover, every_row, plan_shards
from rayskip.data.storage import Storage
from rayskip.data.tokenizer import special_tokens, tells_date
from rayskip.decode.constraints import check_constraint
from rayskip.decode.draft_files import check_files
from rayskip.driver.identity import as_begun, contents, fingerprint, stamps
from rayskip.driver.lease import adopt
from rayskip.driver.record_store import read
from rayskip.driver.records import JobRecord, signature
from rayskip.errors import ConfigError, InputError, OutputError, RayskipError, StorageBusy, shown
from rayskip.model.checkpoint import check, read_layer_count, resolve
from rayskip.skip import skip_policy

SHARDS_PER_REPLICA = 16
LARGEST_SHARD = 256
LEAST_SHARD = 16
"""See `choose_shard_rows`. A run that is stopped may lose what its shards in flight have done."""
_ESCAPE = re.compile(r"\\([nrt])")

_LOOKED_AT = 100
"""Prompts that are searched for special tokens."""


@dataclass(frozen=True)
class Plan:
    """A job cut into shards. source: what replicas need to read them. record: what job.json says, of a folder that
    holds the job already its own (see `lease.adopt`). seconds: what planning took. warnings: what is perhaps not
    meant.
    """

    source: Source
    shards: list[Shard]
    record: JobRecord
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

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
    _refuse_own_output(job)
    check_input(job.input, source.columns)
    labelled = check_task(job, source)
    prefix = choose_prefix(job, source.columns)
    shard_rows = job.output.shard_rows or choose_shard_rows(job, source)
    shards = list(plan_shards(source, shard_rows, job.input.max_rows))
    if job.sampling.constraint is not None:
        check_constraint(job.sampling.constraint)
    folder = resolve(job.model.path, job.model.revision)
    check(folder, job.model.adapter_folder)
    if job.decode != DecodeConfig():
        check_files(job.decode.draft, folder, skip_policy(job.decode.skip, read_layer_count(folder)))
    parts, config, day = (
        contents(job, source, folder, labelled),
        job.model_dump(mode="json"),
        job_date(job, source, folder),
    )
    record = JobRecord(
        name=job.name,
        fingerprint="",
        parts=parts,
        stamps=stamps(source),
        date=day,
        prefix=prefix,
        shard_rows=shard_rows,
        shards=len(shards),
        rows=sum(shard.rows for shard in shards),
        config=config,
        **signature(),
    )
    record = record.model_copy(update={"fingerprint": fingerprint(record)})
    return Plan(source, shards, record, time.monotonic() - began, tuple(_warnings(job, source, folder)))


def _refuse_own_output(job: JobConfig) -> None:
    """Raises ConfigError where the output would be input: then the next run has another one."""
    out = job.output
    if covers(job.input.path, f"{out.path}/{DATA}/shard.{SUFFIXES[out.format]}"):
        raise ConfigError(
            f"output.path: {out.path} lies where input.path {job.input.path} reads, so that the same command would "
            "not find the same input again; choose another folder"
        )


def choose_shard_rows(job: JobConfig, source: Source) -> int:
    """Rows of a shard where the job does not say: as many as give each replica SHARDS_PER_REPLICA of them.

    At least LEAST_SHARD, and not more than LARGEST_SHARD; but each replica has a shard.
    """
    rows = min(source.rows, job.input.max_rows or source.rows)
    replicas = job.cluster.replica_range[1]
    wanted = min(max(-(-rows // (replicas * SHARDS_PER_REPLICA)), LEAST_SHARD), LARGEST_SHARD)
    return max(1, min(wanted, -(-rows // replicas)))


def adopted(job: JobConfig, plan: Plan, storage: Storage) -> Plan:
    """The plan as the folder has it, if that holds the job already: with its record, and cut into its shards.

    Raises OutputError when it holds another.
    """
    record = adopt(storage, plan.record)
    if record.shard_rows == plan.record.shard_rows:
        return replace(plan, record=record)
    shards = list(plan_shards(plan.source, record.shard_rows, job.input.max_rows))
    return replace(plan, record=record, shards=shards)


def plan_in_folder(job: JobConfig) -> tuple[Plan, JobConfig, RayskipError | None]:
    """The plan and the job as they go on in the output folder; or their own, and why the folder refuses the job.

    Raises as `make_plan` does.
    """
    storage = None
    refused: RayskipError | None = None
    try:
        storage = open_folder(job.output.path)
        job = as_begun(job, read(storage, JOB, JobRecord))
    except (OutputError, StorageBusy) as error:
        refused = error
    plan = make_plan(job)
    if storage and not refused:
        try:
            plan = adopted(job, plan, storage)
        except (OutputError, StorageBusy) as error:
            refused = error
    return plan, settled(job, plan.record), refused


def settled(job: JobConfig, record: JobRecord) -> JobConfig:
    """The job with what it leaves open filled in, as its record says."""
    chosen = {"prefix": record.prefix, "shard_rows": record.shard_rows}
    return job.model_copy(
        update={
            "input": job.input.model_copy(update={"date": record.date}),
            "output": job.output.model_copy(update=chosen),
        }
    )


def job_date(job: JobConfig, source: Source, model: Path) -> date | None:
    """The day that chat templates are to tell as today's: the job's own, or today; None where none asks for it.

    model: the folder of its checkpoint.
    """
    kind, _ = prompt_source(job.input, source.columns)
    chat = job.input.chat or job.task is not None or kind == "messages"
    return job.input.date or date.today() if chat and tells_date(model) else None


def _warnings(job: JobConfig, source: Source, model: Path) -> Iterator[str]:
    """What the job's author may not have meant, in words. model: the folder of its checkpoint."""
    yield from (f"{file.name}: {warning}" for file in source.files for warning in file.warnings)
    for stop in job.sampling.stop:
        if found := _ESCAPE.search(stop):
            yield (
                f"sampling.stop has {stop!r}: a backslash and the letter {found[1]}, as YAML reads no escapes but "
                f"in double quotes, such as --set 'sampling.stop=\"\\{found[1]}\"'"
            )
    if job.task is not None and job.task.gold is not None:
        with suppress(InputError, StorageBusy):  # reading tells
            yield from _strange_gold(job, job.task, job.task.gold, source)
    kind, column = prompt_source(job.input, source.columns)
    if kind == "prompt" and not job.input.special_tokens:
        with suppress(InputError, StorageBusy):  # reading tells
            yield from _rendered_before(job, source, column, sorted(special_tokens(model)))


def _strange_gold(job: JobConfig, task: LabelTask, column: str, source: Source) -> Iterator[str]:
    """Of right labels that the task has not. Raises ConfigError where none looked at is one of its."""
    rows = every_row(source, {column}, min(_LOOKED_AT, job.input.max_rows or _LOOKED_AT))
    values = [row[column] for _, _, row in rows if row[column] is not None]
    if not (strange := [value for value in values if str(value) not in task.labels]):
        return
    said = (
        f"task.gold: {len(strange):,} of the first {len(values):,} right labels are none of task.labels, as "
        f"{shown(strange[0])}; {hint(task, strange[0])}"
    )
    if len(strange) == len(values):
        raise ConfigError(said)
    yield said


def _rendered_before(job: JobConfig, source: Source, column: str, special: Sequence[str]) -> Iterator[str]:
    """Of prompts with special tokens, as a chat has that was put through a template elsewhere."""
    rows = every_row(source, {column}, min(_LOOKED_AT, job.input.max_rows or _LOOKED_AT))
    texts = [str(row[column]) for _, _, row in rows]
    found = [[token for token in special if token in text] for text in texts]
    if any(found):
        token = next(filter(None, found))[0]
        way = "without input.chat, " if job.input.chat else ""
        yield (
            f"{sum(map(bool, found)):,} of the first {len(texts):,} prompts have special tokens in their text, as "
            f"{token}, which the model gets as plain text; {way}input.special_tokens: true has them read as "
            "special tokens"
        )
