"""What a run would do, without a model's weights: the plan, rendered prompts, their lengths, an estimate.

Does not know replicas or Ray.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rayskip.cluster.paths import check_output
from rayskip.config import JobConfig, SamplingParams
from rayskip.data.folder import open_folder
from rayskip.data.output import count_error
from rayskip.data.prompts import prepare_templates
from rayskip.data.records import Prompt, RowErrors
from rayskip.data.storage import probe_unmade
from rayskip.driver.commit import load_commits
from rayskip.driver.look import Look, none_can_run
from rayskip.driver.plan import Plan, plan_in_folder
from rayskip.driver.record_store import lost_files, sizes
from rayskip.driver.report import commonest_first, error_lines
from rayskip.errors import OutputError, RayskipError, RowError, StorageBusy, counted, shown
from rayskip.model.checkpoint import dequantised, suggested_sampling, weight_bytes

PROMPTS_SHOWN = 3
FILES_SHOWN = 3
BAR = 40


@dataclass
class DryRun:
    """rows: rows looked at. prompts: the first ones as text. lengths: tokens of each good prompt.

    road: what the model is, and what runs it. weights_gb: memory that the weights take, in 10^9 bytes.
    completion_tokens: the most that the good rows looked at may generate. errors: the rows that cannot run, by
    error_type. committed: shards that earlier runs of this job finished. refused: why a run would not write into
    that folder, or that none of the rows can run; None if all is well. suggested: sampling parameters that the
    model's generation_config.json has and the job has otherwise. continued: rows whose last message is continued.
    dequantised: from what the model's weights are dequantised, and to what; None if they are stored as floats.
    """

    job: JobConfig
    plan: Plan
    committed: int
    refused: RayskipError | None
    max_model_len: int
    road: str
    weights_gb: float = 0.0
    dequantised: str | None = None
    continued: int = 0
    suggested: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    prompts: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    errors: dict[str, RowErrors] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """How many rows of the job stand behind one looked at."""
        return self.plan.rows / self.rows if self.rows else 0.0


def dry_run(job: JobConfig) -> DryRun:
    """Validate a job against its input, model and output folder, and render a sample of its rows.

    Raises UserError for what a run would be refused for; what the output folder is refused for is in `refused`, so
    that what is wrong with the rows shows first.
    """
    templates = prepare_templates(job.input)  # while the plan is made
    plan, job, refused = plan_in_folder(job)
    committed = 0
    if not refused:
        committed, refused = _committed(job, plan)
    look = Look(job, plan.source, templates)
    sampling = job.sampling.model_dump()
    theirs = suggested_sampling(look.folder).items()
    suggested = {name: value for name, value in theirs if value != sampling[name]}
    weights_gb = round(weight_bytes(look.folder, job.model.dtype) / 1e9, 2)
    said = dequantised(look.folder, job.model.dtype)
    seen = DryRun(
        job, plan, committed, refused, look.max_model_len, look.road, weights_gb, said, suggested=suggested
    )
    for shard, index, made in look.rows(plan.shards):
        seen.rows += 1
        if isinstance(made, RowError):
            count_error(seen.errors, made.kind, shard.name, index, str(made))
            continue
        if len(seen.prompts) < PROMPTS_SHOWN:
            ids = made.token_ids
            seen.prompts.append(look.tokenizer.decode(ids) if look.tokenizer else str(ids))
        seen.lengths.append(len(made.token_ids))
        seen.completion_tokens += _most_tokens(made, seen.max_model_len)
    seen.continued = look.continued
    seen.errors = commonest_first(seen.errors)
    if seen.errors and not seen.lengths and not seen.refused:
        seen.refused = none_can_run(seen.errors)
    return seen


def _committed(job: JobConfig, plan: Plan) -> tuple[int, RayskipError | None]:
    """Shards that are committed in the output folder, or why nothing can be written there."""
    try:
        check_output(job.output.path)
        storage = open_folder(job.output.path)
        probe_unmade(storage)
        commits = load_commits(storage, plan.record.fingerprint, plan.shards, plan.record.since)
        return len(commits) - len(lost_files(storage, sizes(commits.values()))), None
    except (OutputError, StorageBusy) as error:
        return 0, error


def facts(seen: DryRun) -> dict[str, Any]:
    """The dry run as plain values; the README lists them."""
    record = seen.plan.record
    return {
        "name": record.name,
        "model": seen.job.model.path,
        "road": seen.road,
        "dequantised": seen.dequantised,
        "max_model_len": seen.max_model_len,
        "weights_gb": seen.weights_gb,
        "rows": record.rows,
        "shards": record.shards,
        "shard_rows": record.shard_rows,
        "shards_committed": seen.committed,
        "date": record.date and str(record.date),
        "prefix": record.prefix,
        "suggested_sampling": seen.suggested,
        "rows_looked_at": seen.rows,
        "rows_failed": seen.rows - len(seen.lengths),
        "errors": {kind: asdict(found) for kind, found in seen.errors.items()},
        "prompts": seen.prompts,
        "longest_prompt": max(seen.lengths, default=0),
        "prompt_tokens": round(sum(seen.lengths) * seen.share),
        "most_completion_tokens": round(seen.completion_tokens * seen.share),
        "refused": seen.refused and str(seen.refused),
    }


def format_dry_run(seen: DryRun) -> str:
    """The dry run as text for a terminal."""
    record = seen.plan.record
    parts = [
        f"{record.name}: {counted(record.rows, 'row')} in {counted(record.shards, 'shard')}, "
        f"{seen.committed:,} committed",
        f"model {seen.job.model.path} ({seen.road}), {seen.weights_gb} GB in {seen.job.model.dtype}, context "
        f"{seen.max_model_len:,} tokens" + (f", {seen.dequantised}" if seen.dequantised else ""),
    ]
    source = seen.plan.source
    if source.format == "csv" or source.partitions.names:
        parts.append("columns: " + ", ".join(f"{name} ({kind})" for name, kind in source.types.items()))
    parts += [f"{file.name}: {note}" for file in source.files[:FILES_SHOWN] for note in file.notes]
    if seen.job.sampling.stop or seen.job.sampling.stop_token_ids:
        parts.append(f"a text ends before {_stops(seen.job.sampling)}")
    if record.date:
        parts.append(f"the chat template tells the date: {record.date}")
    if record.prefix:
        parts.append(f"the output's columns begin with {record.prefix}, as {record.prefix}text")
    if seen.suggested:
        parts.append(_suggestion(seen))
    parts += [f"warning: {warning}" for warning in seen.plan.warnings]
    parts += [f"\nprompt {number}:\n{text}" for number, text in enumerate(seen.prompts, 1)]
    parts.append(f"\nprompt tokens, {seen.rows:,} of {counted(record.rows, 'row')} looked at:")
    parts += histogram(seen.lengths)
    if seen.continued:
        parts.append(
            f"{counted(seen.continued, 'row')} with the assistant's message last, which is continued; "
            "input.continue_final_message: false has a new answer begin"
        )
    if seen.errors:
        parts.append(
            f"{counted(seen.rows - len(seen.lengths), 'row')} cannot run and would come out with an error:"
        )
        parts += [f"  {line}" for line in error_lines(seen.errors)]
    parts.append(_estimate(seen))
    return "\n".join(parts)


def histogram(lengths: list[int]) -> list[str]:
    """One line per power of two that a length falls below."""
    counts = Counter(length.bit_length() for length in lengths)
    if not counts:
        return ["  no prompt can run"]
    most = max(counts.values())
    return [
        f"  {1 << bits >> 1:>7,} to {(1 << bits) - 1:>7,}  {counts[bits]:>7,}  "
        f"{'#' * max(min(1, counts[bits]), round(BAR * counts[bits] / most))}"
        for bits in range(min(counts), max(counts) + 1)
    ]


def _most_tokens(prompt: Prompt, max_model_len: int) -> int:
    if prompt.candidates:
        return 0  # nothing is generated
    return prompt.params.n * min(prompt.params.max_tokens, max_model_len - len(prompt.token_ids))


def _stops(sampling: SamplingParams) -> str:
    tokens = [f"token {token}" for token in sampling.stop_token_ids]
    return ", ".join([*map(shown, sampling.stop), *tokens])


def _suggestion(seen: DryRun) -> str:
    sampling = seen.job.sampling.model_dump()
    theirs = ", ".join(f"{name} {shown(value)}" for name, value in seen.suggested.items())
    ours = ", ".join(f"{name} {shown(sampling[name])}" for name in seen.suggested)
    greedy = ", greedy" if sampling["temperature"] == 0 else ""
    return f"the model's generation_config.json suggests {theirs}; the job's sampling has {ours}{greedy}"


def _estimate(seen: DryRun) -> str:
    return (
        f"in all about {sum(seen.lengths) * seen.share:,.0f} prompt tokens "
        f"and at most {seen.completion_tokens * seen.share:,.0f} completion tokens"
    )
