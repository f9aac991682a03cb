"""What `rayskip eval` and `rayskip bench` read. What is compared is described by a job's sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from rayskip.config.decode import DecodeConfig, NoSkip, SkipConfig
from rayskip.config.job import EngineConfig, InputConfig
from rayskip.config.sampling import SamplingParams
from rayskip.config.section import Dtype, ModelConfig, Section, UserPath
from rayskip.errors import shown


class QualityRun(Section):
    """One way of decoding, compared with the others."""

    name: str = Field(min_length=1)
    model: ModelConfig
    skip: SkipConfig = NoSkip()


class EvalQualityConfig(Section):
    """Runs against references: `rayskip eval quality`. Speed-ups are over the first run."""

    name: str = Field(min_length=1)
    input: InputConfig
    references: str = Field(description="column with a reference text")
    group: str = Field(description="column whose equal values are one input with several references")
    lowercase: bool = Field(True, description="compare lower-cased, as the E2E challenge does")
    sampling: SamplingParams = SamplingParams()
    engine: EngineConfig = EngineConfig()
    runs: tuple[QualityRun, ...] = Field(min_length=1)
    output: UserPath = Field(description="local folder for quality.json, quality.png and each run's texts")

    @model_validator(mode="after")
    def _check_names(self) -> EvalQualityConfig:
        _require_unique_names("runs", self.runs)
        return self


class BenchMode(Section):
    """One way of generating, timed against the others. What is left out is as in the bench's own sections."""

    name: str = Field(min_length=1)
    model: ModelConfig | None = None
    decode: DecodeConfig = DecodeConfig()
    cohort: float | None = Field(None, ge=0, le=1, description="engine.cohort of this mode")


class BenchPeer(Section):
    """Another library, timed in turns with the modes: on the bench's `model`, in a process of its own."""

    name: str = Field(min_length=1)
    kind: Literal["transformers", "transformers_batch", "vllm"] = Field(
        description="transformers' generate or generate_batch, or vLLM's LLM.generate"
    )
    python: UserPath | None = Field(
        None, description="interpreter of the environment that has it; null: the one that runs the bench"
    )
    batch_rows: tuple[int | None, ...] | None = Field(
        None, description="the bench's batch sizes that it runs at; null: all"
    )
    dtype: Dtype | None = Field(None, description="what it computes in; null: the bench's model.dtype")


class BenchConfig(Section):
    """Timings of several modes over the same rows: `rayskip bench`. Ratios are over the first mode."""

    name: str = Field(min_length=1)
    model: ModelConfig
    input: InputConfig
    sampling: SamplingParams = SamplingParams()
    engine: EngineConfig = EngineConfig()
    modes: tuple[BenchMode, ...] = Field(min_length=1)
    peers: tuple[BenchPeer, ...] = Field((), description="other libraries; all but vllm are greedy only")
    batch_rows: tuple[int | None, ...] = Field(
        (None,), min_length=1, description="batch sizes to time; null: chosen by the engine"
    )
    rows_per_place: float | None = Field(
        None,
        gt=0,
        description="rows to generate, as a multiple of the batch size; null: all that the input has",
    )
    min_rows: int = Field(1, ge=1, description="fewest rows to generate, however small the batch")
    rounds: int = Field(3, ge=1, description="every mode and peer runs once a round")
    turn_s: float | None = Field(
        None,
        gt=0,
        description="seconds for which each runs at a time, in turns within a round; null: to its end",
    )
    output: UserPath = Field(description="local folder for bench.json and bench.png")

    @model_validator(mode="after")
    def _check_names(self) -> BenchConfig:
        _require_unique_names("modes, peers", (*self.modes, *self.peers))
        return self

    @model_validator(mode="after")
    def _check_peers(self) -> BenchConfig:
        for peer in self.peers:
            _require_known_sizes("peers", peer, self.batch_rows)
        per_row = self.input.sampling_params or self.input.format == "openai"
        may_sample = all(peer.kind == "vllm" for peer in self.peers)
        if self.peers and (per_row or not _peers_support(self.sampling, may_sample)):
            raise ValueError(
                "peers: they end at EOS (unless ignore_eos) or max_tokens, and all but vllm are greedy; sampling "
                "must have temperature 0 and n 1 (vllm alone: any), no stop strings and nothing else that changes "
                "tokens, and rows no parameters of their own"
            )
        if self.peers and self.model.adapter:
            raise ValueError("peers: they load model.path alone; merge model.adapter into it")
        return self


def _peers_support(sampling: SamplingParams, may_sample: bool) -> bool:
    """Whether peers generate by these parameters: greedily or, where they may sample, from the whole distribution.

    Greedy decoding ignores top_p, top_k and min_p, so they may have any value there.
    """
    supported = {"max_tokens", "ignore_eos", "seed"}
    if may_sample:
        supported |= {"temperature", "n"}
    if sampling.temperature == 0:
        supported |= {"top_p", "top_k", "min_p"}
    return sampling == SamplingParams(**sampling.model_dump(include=supported))


class SpecBenchDrafter(Section):
    """A drafter to compare, under its name in the tables."""

    name: str = Field(min_length=1)
    decode: DecodeConfig = DecodeConfig()
    batch_rows: tuple[int, ...] | None = Field(None, description="batch sizes it runs at; null: all")


class SpecBenchConfig(Section):
    """Spec-Bench's protocol: `rayskip eval spec-bench`. Speed-ups are over the first drafter."""

    name: str = Field(min_length=1)
    model: ModelConfig
    questions: UserPath = Field(description="Spec-Bench's question.jsonl")
    per_task: int | None = Field(
        None, ge=1, description="questions of each of the six subtasks, evenly spread; null: all 80"
    )
    sampling: SamplingParams = SamplingParams(max_tokens=1024)
    engine: EngineConfig = EngineConfig()
    drafters: tuple[SpecBenchDrafter, ...] = Field(min_length=1)
    batch_rows: tuple[int, ...] = Field(
        (1,), min_length=1, description="1: question by question, as published"
    )
    warmups: int = Field(3, ge=0, description="questions generated before the clock runs")
    rounds: int = Field(3, ge=1, description="times that everything runs")
    output: UserPath = Field(description="local folder for spec_bench.json, plots and spec_bench.html")

    @model_validator(mode="after")
    def _check_drafters(self) -> SpecBenchConfig:
        _require_unique_names("drafters", self.drafters)
        for drafter in self.drafters:
            _require_known_sizes("drafters", drafter, self.batch_rows)
        sizes = self.drafters[0].batch_rows
        if sizes is not None and self.batch_rows[0] not in sizes:
            raise ValueError(
                f"drafters[0] must run at batch_rows[0] ({self.batch_rows[0]}): the others are compared with it"
            )
        return self


def _require_unique_names(
    key: str, runs: Sequence[QualityRun | BenchMode | BenchPeer | SpecBenchDrafter]
) -> None:
    """Results are stored and shown by name."""
    names = [run.name for run in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{key}: two are named {repeated[0]!r}; each needs a name of its own")


def _require_known_sizes(
    key: str, run: BenchPeer | SpecBenchDrafter, batch_rows: Sequence[int | None]
) -> None:
    """A run may leave out some of the common batch sizes; it may not add one."""
    for rows in run.batch_rows or ():
        if rows not in batch_rows:
            raise ValueError(f"{key}: {run.name} runs at {shown(rows)} rows, batch_rows lacks that")
