"""What a run would do, without a model's weights: the plan, rendered prompts, their lengths, an estimate.

Does not know replicas or Ray. Looks at up to SAMPLE_ROWS rows, taken from shards spread over the input.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from rayskip.config import JobConfig, SamplingParams
from rayskip.data.folder import JOB, open_folder
from rayskip.data.output import count_error
from rayskip.data.prompts import PromptBuilder, prepare_templates, prompt_columns
from rayskip.data.records import Prompt, RowErrors, Shard
from rayskip.data.sources import read_shard
from rayskip.data.storage import probe_unmade
from rayskip.data.tokenizer import load_tokenizer
from rayskip.data.values import python_rows
from rayskip.decode.constraints import Grammars
from rayskip.driver.commit import load_commits, lost_files, read, sizes
from rayskip.driver.identity import as_begun
from rayskip.driver.plan import Plan, adopted, make_plan, settled
from rayskip.driver.records import JobRecord
from rayskip.driver.report import commonest_first, error_lines
from rayskip.errors import JobFailed, OutputError, RayskipError, RowError, counted, shown
from rayskip.model.checkpoint import dequantised, read_spec, resolve, suggested_sampling

SAMPLE_ROWS = 10_000
PROMPTS_SHOWN = 3
FILES_SHOWN = 3
BAR = 40


@dataclass
class DryRun:
    """rows: rows looked at. prompts: the first ones as text. lengths: tokens of each good prompt.

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
    with suppress(OutputError):  # told last
        job = as_begun(job, read(open_folder(job.output.path), JOB, JobRecord))
    templates = prepare_templates(job.input)  # while the plan is made
    plan = make_plan(job)
    plan, committed, refused = _committed(job, plan)
    job = settled(job, plan.record)
    folder = resolve(job.model.path, job.model.revision)
    tokenizer = load_tokenizer(folder)
    spec = read_spec(folder)
    longest = spec.max_positions
    sampling = job.sampling.model_dump()
    suggested = {name: value for name, value in suggested_sampling(folder).items() if value != sampling[name]}
    max_model_len = min(job.engine.max_model_len or longest, longest)
    said = dequantised(folder, job.model.dtype)
    seen = DryRun(job, plan, committed, refused, max_model_len, said, suggested=suggested)
    builder = PromptBuilder(job.input, job.sampling, tokenizer, seen.max_model_len, templates, job.task)
    columns = prompt_columns(job.input, templates)
    grammars = Grammars(tokenizer, spec.vocab, spec.eos_token_ids)
    for shard in sample(plan.shards, SAMPLE_ROWS):
        for index, row in enumerate(python_rows(read_shard(shard, plan.source), columns), shard.start):
            seen.rows += 1
            try:
                prompt = builder.build(row, index, shard.name)
                if prompt.params.constraint is not None:
                    grammars.matcher(prompt.params.constraint)
            except RowError as error:
                count_error(seen.errors, error.kind, shard.name, index, str(error))
                continue
            if len(seen.prompts) < PROMPTS_SHOWN:
                seen.prompts.append(
                    tokenizer.decode(prompt.token_ids) if tokenizer else str(prompt.token_ids)
                )
            seen.lengths.append(len(prompt.token_ids))
            seen.completion_tokens += _most_tokens(prompt, seen.max_model_len)
    seen.continued = builder.continued
    seen.errors = commonest_first(seen.errors)
    if seen.errors and not seen.lengths and not seen.refused:
        seen.refused = JobFailed(
            f"none of the {counted(seen.rows, 'row')} looked at can run; the commonest error is "
            + error_lines(seen.errors)[0]
        )
    return seen


def _committed(job: JobConfig, plan: Plan) -> tuple[Plan, int, OutputError | None]:
    """The plan as the output folder has it, and shards that are committed there or why it is refused."""
    try:
        storage = open_folder(job.output.path)
        plan = adopted(job, plan, storage)
        probe_unmade(storage)
        commits = load_commits(storage, plan.record.fingerprint, plan.shards, plan.record.since)
        return plan, len(commits) - len(lost_files(storage, sizes(commits.values()))), None
    except OutputError as error:
        return plan, 0, error


def sample(shards: list[Shard], rows: int) -> list[Shard]:
    """Shards evenly spread over all, of about `rows` rows together; at least one if there is one."""
    total = sum(shard.rows for shard in shards)
    step = max(1, round(total / rows))
    return shards[::step]


def facts(seen: DryRun) -> dict[str, Any]:
    """The dry run as plain values; the README lists them."""
    record = seen.plan.record
    return {
        "name": record.name,
        "model": seen.job.model.path,
        "dequantised": seen.dequantised,
        "max_model_len": seen.max_model_len,
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
        f"model {seen.job.model.path}, context {seen.max_model_len:,} tokens"
        + (f", {seen.dequantised}" if seen.dequantised else ""),
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
