"""Looks at a job's rows as prompts, as a replica makes them, without a model's weights.

Does not know replicas or output folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rayskip.config import JobConfig
from rayskip.data.output import count_error
from rayskip.data.prompts import PromptBuilder, Row, prepare_templates, prompt_columns
from rayskip.data.records import Prompt, RowErrors, Shard
from rayskip.data.sources import Source, plan_shards, read_shard
from rayskip.data.templates import Templates
from rayskip.data.tokenizer import load_tokenizer
from rayskip.data.values import python_rows
from rayskip.decode.constraints import Grammars
from rayskip.driver.report import commonest_first, error_lines
from rayskip.errors import JobFailed, RowError, StorageBusy, counted
from rayskip.model.checkpoint import read_spec, resolve

SAMPLE_ROWS = 10_000
"""About as many rows are looked at, of shards that are spread over the input."""


class Look:
    """A job's rows as prompts. job: one whose date and shards are settled. templates: what renders them."""

    def __init__(self, job: JobConfig, source: Source, templates: Templates | None = None) -> None:
        templates = templates or prepare_templates(job.input)
        self.folder = resolve(job.model.path, job.model.revision)
        self.tokenizer = load_tokenizer(self.folder)
        spec = read_spec(self.folder)
        self.road = spec.road
        longest = spec.max_positions
        self.max_model_len = min(job.engine.max_model_len or longest, longest)
        self._source = source
        self._builder = PromptBuilder(
            job.input, job.sampling, self.tokenizer, self.max_model_len, templates, job.task
        )
        self._grammars = Grammars(self.tokenizer, spec.vocab, spec.eos_token_ids)
        self._columns = prompt_columns(job.input, templates)

    @property
    def continued(self) -> int:
        """Rows so far whose last message is continued."""
        return self._builder.continued

    def rows(self, shards: list[Shard]) -> Iterator[tuple[Shard, int, Prompt | RowError]]:
        """Shard, row index and prompt, or why there is none, of a sample of the rows. Raises as `read_shard` does,
        and as `PromptBuilder.build` for what is wrong with all rows."""
        for shard in sample(shards, SAMPLE_ROWS):
            for index, row in enumerate(
                python_rows(read_shard(shard, self._source), self._columns), shard.start
            ):
                try:
                    yield shard, index, self._prompt(row, index, shard.name)
                except RowError as error:
                    yield shard, index, error

    def _prompt(self, row: Row, index: int, name: str) -> Prompt:
        prompt = self._builder.build(row, index, name)
        if prompt.params.constraint is not None:
            self._grammars.matcher(prompt.params.constraint)
        return prompt


def sample(shards: list[Shard], rows: int) -> list[Shard]:
    """Shards evenly spread over all, of about `rows` rows together; at least one if there is one."""
    total = sum(shard.rows for shard in shards)
    step = max(1, round(total / rows))
    return shards[::step]


def check_rows(job: JobConfig, source: Source) -> None:
    """Raises JobFailed where not one of the rows looked at can be a prompt: a run would load a model for nothing.

    The first that can ends the look.
    """
    assert job.output.shard_rows is not None
    shards = list(plan_shards(source, job.output.shard_rows, job.input.max_rows))
    errors: dict[str, RowErrors] = {}
    try:
        for shard, index, made in Look(job, source).rows(shards):
            if isinstance(made, Prompt):
                return
            count_error(errors, made.kind, shard.name, index, str(made))
    except StorageBusy:
        return  # replicas try again
    if errors:
        raise none_can_run(errors)


def none_can_run(errors: Mapping[str, RowErrors]) -> JobFailed:
    """errors: of all rows that were looked at."""
    rows = sum(found.count for found in errors.values())
    return JobFailed(
        f"none of the {counted(rows, 'row')} looked at can run; the commonest error is "
        + error_lines(commonest_first(dict(errors)))[0]
    )
