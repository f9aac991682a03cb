"""Counters that add, so that a job's total is a sum over its shards.

Does not know who prints them. Seconds are wall seconds of the thread that did the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

PHASES = ("tokenize", "prefill", "decode", "sample", "write", "idle")


def _no_seconds() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)


@dataclass
class Stats:
    """What was done, in tokens, rows and seconds.

    rows, rows_failed: output rows (input rows x n); failed ones have finish_reason "error".
    prompt_tokens: tokens of the prompts; prefix_tokens of them were reused, not prefilled.
    steps, step_rows, step_slots: engine steps, sum of rows they ran, sum of rows they could have run.
    layer_tokens: layer executions, one per token and layer.
    padding_tokens: tokens computed only to fill a fixed row tile.
    """

    rows: int = 0
    rows_failed: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    step_slots: int = 0
    layer_tokens: int = 0
    padding_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=_no_seconds)

    def __add__(self, other: Stats) -> Stats:
        total = Stats(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"})
        total.seconds = dict(self.seconds)
        total += other
        return total

    def __iadd__(self, other: Stats) -> Stats:
        for f in fields(self):
            if f.name != "seconds":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return self

    @property
    def batch_fill(self) -> float:
        """Share of the batch's rows that did work, over all steps (0 to 1)."""
        return self.step_rows / self.step_slots if self.step_slots else 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall seconds of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
