"""A job's config, and the sections that are only there to make it up."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayskip.config.constraint import read_schema
from rayskip.config.decode import DecodeConfig
from rayskip.config.label import LabelTask
from rayskip.config.sampling import SamplingParams
from rayskip.config.section import ModelConfig, Section, UserPath

_OWN_KWARGS = {
    "chat_template",
    "conversations",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
}


def check_template_kwargs(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a value that a chat template gets from rayskip alone."""
    if taken := sorted(_OWN_KWARGS & kwargs.keys()):
        raise ValueError(f"chat_template_kwargs may not have {', '.join(taken)}")


class InputConfig(Section):
    """Where the rows are and which column is the prompt.

    Name at most one of prompt, messages, prompt_token_ids, template. With none named, the first of
    those three columns that the data has is used.
    """

    path: UserPath = Field(
        description="file, glob, folder, save_to_disk folder, s3:// or gs:// url, or hub dataset name"
    )
    format: Literal["parquet", "arrow", "jsonl", "json", "openai", "csv", "datasets", "hub"] | None = Field(
        None, description="read from the suffix when left out"
    )
    split: str | None = Field(
        None, description="which split to read of data that has several, by datasets' names; all: every one"
    )
    encoding: str | None = Field(
        None, description="of text files, such as latin-1; null: UTF-8, or UTF-16 where the file says so"
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="between CSV's fields; null: what the first rows agree on",
    )
    text_columns: tuple[str, ...] | Literal["all"] = Field(
        (),
        description="columns of CSV that stay text, as the prompt's does, whatever is in them; all: every one, an "
        "empty field is an empty text, and neither delimiter nor encoding is guessed",
    )
    partitions: bool = Field(True, description="folders named key=value become columns")
    prompt: str | None = Field(None, description="column with a text prompt")
    messages: str | None = Field(None, description="column with a list of {role, content}")
    prompt_token_ids: str | None = Field(None, description="column with a list of token ids")
    template: str | None = Field(None, description="Jinja template over the columns, rendered in a sandbox")
    special_tokens: bool = Field(
        False,
        description="read special tokens in a prompt or template, as of chats that were rendered before",
    )
    chat: bool = Field(False, description="send a prompt or template through the model's chat template")
    system: str | None = Field(None, description="system message put before chat prompts that have none")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what else the chat template may read, such as {enable_thinking: false}"
    )
    continue_final_message: bool = Field(
        True,
        description="go on with the assistant's message where messages end with one; false: a new answer",
    )
    sampling_params: str | None = Field(None, description="column with per-row sampling parameters")
    rename: dict[str, str] = Field(
        {}, description="new names of columns, {old: new}; all other keys and the output use the new ones"
    )
    max_rows: int | None = Field(None, ge=1, description="read only the first so many rows")
    date: datetime.date | None = Field(
        None,
        description="the day that chat templates tell as today's, such as 2026-11-28; null: that of the first run",
    )

    @field_validator("date", mode="before")
    @classmethod
    def _check_date(cls, value: object) -> object:
        if value is None or type(value) is datetime.date:
            return value
        try:
            return datetime.date.fromisoformat(str(value))
        except ValueError:
            raise ValueError(f"must be a day such as 2026-11-28, got {value}") from None

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a file, glob, folder, url or hub dataset")
        if "\0" in value:
            raise ValueError("may not hold a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("is not valid UTF-8; rename the file or folder") from error
        return value

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                "a".encode(value)
        except (LookupError, UnicodeError):
            raise ValueError(
                f"no encoding is called {value!r}; utf-8, utf-16, latin-1 and cp1252 are some"
            ) from None
        return value

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value in ('"', "\n", "\r"):
            raise ValueError(f"may be no quote and no line break, got {value!r}")
        return value

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\w+(\.\w+)*", value):
            raise ValueError(
                f"must be the name of one split, or all; got {value!r}"
                + (" (input.max_rows reads only the first rows)" if "[" in value else "")
            )
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_template_kwargs(value)
        return value

    @model_validator(mode="after")
    def _check_special_tokens(self) -> InputConfig:
        if self.special_tokens and (self.chat or self.messages or self.prompt_token_ids):
            raise ValueError(
                "special_tokens: true is for a prompt or template that goes to the model as it is"
            )
        return self

    @model_validator(mode="after")
    def _check_prompt_source(self) -> InputConfig:
        named = [
            k for k in ("prompt", "messages", "prompt_token_ids", "template") if getattr(self, k) is not None
        ]
        if len(named) > 1:
            raise ValueError(
                f"name one of prompt, messages, prompt_token_ids, template; got {' and '.join(named)}"
            )
        return self


class EngineConfig(Section):
    """Sizes of a replica's engine. What is left out is chosen by the free memory and by timed steps."""

    max_batch_rows: int | None = Field(None, ge=1, description="most rows that generate at once")
    max_batch_tokens: int | None = Field(None, ge=16, description="most tokens in one forward")
    cohort: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the batch that must be free before rows join, so that they share positions and "
        "layer sets; 0: one is enough, 1: static batches; null: 1/4 where layers depend on the position, else 0",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="longest prompt + completion; the model's own by default"
    )
    kv_cache_gb: float | None = Field(
        None,
        gt=0,
        description="memory for the KV cache; null: memory_fraction of what is free after the load",
    )
    memory_fraction: float | None = Field(
        None, gt=0, le=1, description="see kv_cache_gb; null: 0.4 on a CPU, 0.85 on a GPU"
    )


class ClusterConfig(Section):
    """Where replicas run and what each holds."""

    address: str | None = Field(
        None, description="Ray address; null: what RAY_ADDRESS says, else a local cluster"
    )
    replicas: int | tuple[int, int] = Field(1, description="number of replicas, or [min, max]")
    cpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="CPU cores of a replica; null: an equal share of this machine's, 1 on a cluster",
    )
    gpus_per_replica: float = Field(0, ge=0)
    join_s: float = Field(
        10,
        ge=0,
        description="seconds that nodes get to join a cluster before replicas that fit on none fail the job; a "
        "cluster that grows when asked needs more",
    )

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = _range(replicas)
        if not 1 <= low <= high:
            given = list(replicas) if isinstance(replicas, tuple) else replicas
            raise ValueError(f"must be at least 1 and [min, max] in order, got {given}")
        return replicas

    def with_cpus(self, cores: int) -> ClusterConfig:
        """The same with cpus_per_replica filled in: where it is null, an equal share of `cores`, at least one."""
        share = max(1, cores // self.replica_range[1])
        return (
            self if self.cpus_per_replica is not None else self.model_copy(update={"cpus_per_replica": share})
        )

    @property
    def replica_range(self) -> tuple[int, int]:
        """(min, max) replicas."""
        return _range(self.replicas)


def _range(replicas: int | tuple[int, int]) -> tuple[int, int]:
    return replicas if isinstance(replicas, tuple) else (replicas, replicas)


class RetryConfig(Section):
    """When to try again and when to give up."""

    max_shard_attempts: int = Field(
        4,
        ge=1,
        description="attempts of a shard before the row that ends its replicas is searched for; where the store or "
        "the input cannot be reached, before the job fails",
    )
    max_failed_rows: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="stop the job past this many (integer) or this share (0.0 to 1.0) of failed rows"
    )
    shard_timeout_s: float = Field(
        3600, gt=0, description="a replica that makes no progress for so long is replaced"
    )


class QualityConfig(Section):
    """Quality audits of lossy decoding: a share of the rows is decoded again at full depth and compared."""

    sample: float = Field(0.02, ge=0, le=1, description="share of the rows, chosen by their identity")
    floor: float = Field(
        0.0, ge=0, le=1, description="least mean edit similarity of token ids, over the audited rows"
    )
    min_audits: int = Field(20, ge=1, description="rows audited before the floor is applied")
    below_floor: Literal["stop", "full_depth"] = Field(
        "stop", description="stop the job, or decode the remaining shards at full depth"
    )


class OutputConfig(Section):
    """Where generations go."""

    path: UserPath = Field(description="folder, local or s3:// or gs://")
    format: Literal["parquet", "jsonl", "openai"] = "parquet"
    token_ids: bool = Field(False, description="write the token_ids column")
    columns: Literal["from_schema"] | None = Field(
        None,
        description="from_schema: a column for each property of sampling.constraint.json_schema, beside the text",
    )
    prefix: str | None = Field(
        None,
        description="what the added columns' names begin with; null: nothing, or generated_ where the input has "
        "a column of such a name",
    )
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="input rows per shard, the unit of commit and retry; null: up to 256, fewer in a small job, so "
        "that each replica has several",
    )

    @model_validator(mode="after")
    def _check_prefix(self) -> OutputConfig:
        if self.prefix is not None and not re.fullmatch(r"\w*", self.prefix):
            raise ValueError(f"prefix may hold letters, digits and underscores, got {self.prefix!r}")
        if self.prefix and self.format == "openai":
            raise ValueError("prefix has no meaning with format: openai, whose keys are fixed")
        return self


class JobConfig(Section):
    """One batch-generation job."""

    name: str = Field(min_length=1)
    model: ModelConfig
    input: InputConfig
    sampling: SamplingParams = SamplingParams()
    task: LabelTask | None = Field(None, description="what to do with each prompt; null: generate")
    engine: EngineConfig = EngineConfig()
    decode: DecodeConfig = DecodeConfig()
    quality: QualityConfig = QualityConfig()
    cluster: ClusterConfig = ClusterConfig()
    retry: RetryConfig = RetryConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _check_columns(self) -> JobConfig:
        constraint = self.sampling.constraint
        if self.output.columns is None:
            return self
        if constraint is None or constraint.json_schema is None:
            raise ValueError("output.columns: from_schema needs sampling.constraint.json_schema")
        if self.output.format == "openai":
            raise ValueError("output.columns has no meaning with format: openai, whose keys are fixed")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> JobConfig:
        if self.task is None:
            return self
        if self.sampling.constraint is not None:
            raise ValueError("task: label has its labels for a constraint; leave sampling.constraint out")
        if self.output.format == "openai":
            raise ValueError("task: label gives columns, which output.format: openai has no place for")
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_schema(cls, values: object) -> object:
        """A schema that the config names by its file or its pydantic model is read here, once. A row's data can
        name neither."""
        try:
            named = values["sampling"]["constraint"]["json_schema"]  # type: ignore[index]
        except (TypeError, KeyError):
            return values
        if not isinstance(named, str) or named.lstrip().startswith("{"):
            return values
        sampling = values["sampling"]  # type: ignore[index]
        try:
            schema = read_schema(named)
        except ValueError as error:
            raise ValueError(f"sampling.constraint.json_schema: {error}") from error
        constraint = {**sampling["constraint"], "json_schema": schema}
        return {**values, "sampling": {**sampling, "constraint": constraint}}  # type: ignore[dict-item]
