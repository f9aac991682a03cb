"""The nouns that cross module and process boundaries. Plain data, picklable, no behaviour beyond names."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayskip.config import SamplingParams
from rayskip.errors import RowError
from rayskip.stats import Stats

FinishReason = Literal["stop", "length", "score", "error"]

BROKEN_ROW = "__broken_row__"
"""String column that `read_shard` adds to the input's: why the row could not be read, null for a good row."""

TEMPLATE_KWARGS = "chat_template_kwargs"
"""Among a row's own sampling parameters: what its chat template may read."""


@dataclass(frozen=True)
class Prompt:
    """One row, ready for the engine.

    key: 64-bit hash of (job seed, row identity); sample s draws from the stream hash(key, s). candidates: texts, as
    token ids, of which each is scored as what follows, in place of generating; all different, none empty.
    """

    row_index: int
    token_ids: list[int]
    params: SamplingParams
    key: int
    candidates: tuple[tuple[int, ...], ...] = ()

    @property
    def samples(self) -> int:
        """Output rows: candidates are scored once."""
        return 1 if self.candidates else self.params.n

    @cached_property
    def token_array(self) -> NDArray[np.int64]:
        """`token_ids`, once for all of the row's samples."""
        return np.asarray(self.token_ids, dtype=np.int64)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log, of the model's own distribution before temperature and truncation)
    of a generated token, and of the most likely tokens at that position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Labelled:
    """What was found of a row in a labelling task.

    label: None where the model abstains. best: the most probable one. probability: of it, by a softmax over the
    labels; margin: to the second. calibrated: its probability under the temperature that was fitted. A label that
    was generated has no probability.
    """

    label: str | None
    best: str | None = None
    probability: float | None = None
    margin: float | None = None
    probabilities: dict[str, float] | None = None
    calibrated: float | None = None

    @property
    def surest(self) -> float | None:
        """The calibrated probability, where there is one."""
        return self.probability if self.calibrated is None else self.calibrated


@dataclass(frozen=True)
class Generation:
    """One output row: sample `sample_index` of input row `row_index`, or why there is none.

    finish_reason: "stop" at an end token, a stop token or a stop string; "length" at max_tokens or the context's
    end; "score" where candidates were scored and nothing was generated; "error" where error_type and error_message
    say why there is no text.
    text: without special tokens, up to a stop string; None on error, or where the model has no tokenizer.
    token_ids: all that were generated, the one that ended it too. prompt_tokens, completion_tokens: how many.
    logprobs: one for each of token_ids, where asked for. scores: of each of the prompt's candidates the
    log-probability (natural log, of the model's own distribution), summed over its tokens. labelled: in a task
    of labelling.
    skip_policy: which layers its tokens ran, "none" where none was skipped. mean_layers: layers run per generated
    token; None where no generated token ran (the last one never does).
    """

    row_index: int
    sample_index: int
    finish_reason: FinishReason
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    error_type: str | None = None
    error_message: str | None = None
    skip_policy: str | None = None
    mean_layers: float | None = None
    scores: list[float] | None = None
    labelled: Labelled | None = None


def failed_row(row_index: int, samples: int, error: RowError) -> list[Generation]:
    """The output rows of an input row that cannot run: one per sample, so that rows out = rows in x n."""
    return [
        Generation(row_index, sample, "error", error_type=error.kind, error_message=str(error))
        for sample in range(samples)
    ]


@dataclass(frozen=True)
class Shard:
    """A contiguous range of one input file's rows: the unit of dispatch, retry and commit.

    file: where to read it. name: the file's part of the row identity (its path below the input's root).
    rows: [start, stop) in the file. full_depth: no layer is skipped, whatever the job's policy.
    output: the file to write, relative to the output folder; the driver says so when it hands the shard out.
    lost: rows that are known to end a replica, each with how: error rows, that are not run.
    begun: when the job began, in seconds since 1970; the driver says so too.
    probe: whether its rows end a replica is all that is asked: nothing is written.
    """

    index: int
    file: str
    name: str
    start: int
    stop: int
    full_depth: bool = False
    output: str = ""
    begun: int = 0
    lost: tuple[tuple[int, str], ...] = ()
    probe: bool = False

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class RowErrors:
    """Output rows that failed in one way: how many, and which input row was the first, with its error_message."""

    count: int
    row_file: str
    row_index: int
    message: str


@dataclass(frozen=True)
class ShardResult:
    """What a replica did for a shard: its whole output file is there, not yet committed.

    path: relative to the output folder; empty for a probe, which writes none. sha256, bytes: of the file.
    rows: output rows in it. rows_failed: those of them that failed; errors: by error_type. input_rows_failed: input
    rows of which any sample failed.
    """

    shard: int
    path: str
    sha256: str
    bytes: int
    rows: int
    rows_failed: int
    stats: Stats
    errors: dict[str, RowErrors] = field(default_factory=dict)
    input_rows_failed: int = 0
