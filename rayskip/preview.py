"""What a run would do, without a model's weights: the plan, rendered prompts, their lengths, an estimate.

Does not know replicas or Ray. Looks at up to SAMPLE_ROWS rows, taken from shards spread over the input.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from rayskip.config import JobConfig
from rayskip.data.folder import open_folder
from rayskip.data.prompts import PromptBuilder, prompt_columns
from rayskip.data.records import Prompt, Shard
from rayskip.data.sources import read_shard
from rayskip.data.tokenizer import load_tokenizer
from rayskip.data.values import python_rows
from rayskip.driver.commit import adopt, load_commits, lost_files, sizes
from rayskip.driver.plan import Plan, make_plan
from rayskip.errors import OutputError, RowError, shown
from rayskip.model.checkpoint import read_spec, resolve, suggested_sampling

SAMPLE_ROWS = 10_000
PROMPTS_SHOWN = 3
BAR = 40


@dataclass
class Preview:
    """rows: rows looked at. prompts: the first ones as text. lengths: tokens of each good prompt.

    completion_tokens: the most that the good rows looked at may generate. bad: rows by error type, with one
    message each in `examples`. committed: shards that earlier runs of this job finished. refused: why a run
    would not write into that folder, None if it would. suggested: sampling parameters that the model's
    generation_config.json has and the job has otherwise.
    """

    job: JobConfig
    plan: Plan
    committed: int
    refused: OutputError | None
    max_model_len: int
    suggested: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    prompts: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def preview(job: JobConfig) -> Preview:
    """Validate a job against its input, model and output folder, and render a sample of its rows.

    Raises UserError for what a run would be refused for; what the output folder is refused for is in `refused`, so
    that what is wrong with the rows shows first.
    """
    plan = make_plan(job)
    plan, committed, refused = _committed(job, plan)
    job = job.dated(plan.record.date)
    folder = resolve(job.model.path, job.model.revision)
    tokenizer = load_tokenizer(folder)
    longest = read_spec(folder).max_positions
    sampling = job.sampling.model_dump()
    suggested = {name: value for name, value in suggested_sampling(folder).items() if value != sampling[name]}
    max_model_len = min(job.engine.max_model_len or longest, longest)
    seen = Preview(job, plan, committed, refused, max_model_len, suggested)
    builder = PromptBuilder(job.input, job.sampling, tokenizer, seen.max_model_len)
    columns = prompt_columns(job.input)
    for shard in sample(plan.shards, SAMPLE_ROWS):
        for index, row in enumerate(python_rows(read_shard(shard, plan.source), columns), shard.start):
            seen.rows += 1
            try:
                prompt = builder.build(row, index, shard.name)
            except RowError as error:
                seen.bad[error.kind] += 1
                seen.examples.setdefault(error.kind, f"{shard.name} row {index}: {error}")
                continue
            if len(seen.prompts) < PROMPTS_SHOWN:
                seen.prompts.append(
                    str(tokenizer.decode(prompt.token_ids) if tokenizer else prompt.token_ids)
                )
            seen.lengths.append(len(prompt.token_ids))
            seen.completion_tokens += _most_tokens(prompt, seen.max_model_len)
    return seen


def _committed(job: JobConfig, plan: Plan) -> tuple[Plan, int, OutputError | None]:
    """The plan as the output folder has it, and shards that are committed there or why it is refused."""
    storage = open_folder(job.output.path)
    try:
        plan = replace(plan, record=adopt(storage, plan.record))
        commits = load_commits(storage, plan.record.fingerprint, plan.shards, plan.record.since)
        return plan, len(commits) - len(lost_files(storage, sizes(commits.values()))), None
    except OutputError as error:
        return plan, 0, error


def sample(shards: list[Shard], rows: int) -> list[Shard]:
    """Shards evenly spread over all, of about `rows` rows together; at least one if there is one."""
    total = sum(shard.rows for shard in shards)
    step = max(1, round(total / rows))
    return shards[::step]


def format_preview(seen: Preview) -> str:
    """The preview as text for a terminal."""
    record = seen.plan.record
    parts = [
        f"{record.name}: {record.rows:,} rows in {record.shards:,} shards, {seen.committed:,} committed",
        f"model {seen.job.model.path}, context {seen.max_model_len:,} tokens",
    ]
    if record.date:
        parts.append(f"the chat template tells the date: {record.date}")
    if seen.suggested:
        parts.append(_suggestion(seen))
    parts += [f"\nprompt {number}:\n{text}" for number, text in enumerate(seen.prompts, 1)]
    parts.append(f"\nprompt tokens, {seen.rows:,} of {record.rows:,} rows looked at:")
    parts += histogram(seen.lengths)
    parts += [f"{kind}: {count:,} rows, such as {seen.examples[kind]}" for kind, count in seen.bad.items()]
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


def _suggestion(seen: Preview) -> str:
    sampling = seen.job.sampling.model_dump()
    theirs = ", ".join(f"{name} {shown(value)}" for name, value in seen.suggested.items())
    ours = ", ".join(f"{name} {shown(sampling[name])}" for name in seen.suggested)
    greedy = ", greedy" if sampling["temperature"] == 0 else ""
    return f"the model's generation_config.json suggests {theirs}; the job's sampling has {ours}{greedy}"


def _estimate(seen: Preview) -> str:
    share = seen.plan.rows / seen.rows if seen.rows else 0.0
    return (
        f"in all about {sum(seen.lengths) * share:,.0f} prompt tokens "
        f"and at most {seen.completion_tokens * share:,.0f} completion tokens"
    )
