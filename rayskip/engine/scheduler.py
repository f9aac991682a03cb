"""Which rows run in the next step, in which slots. Pure bookkeeping: no tensors, no I/O.

Every step takes one token of every row that decodes, and as many prompt tokens as still fit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rayskip.engine.sequence import Sequence

SHARED_PREFIX = 16
"""Shortest prefix worth copying from another row instead of computing it."""


@dataclass(frozen=True)
class Copy:
    """Copy the first `length` positions of slot `source` to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """Run tokens [start, stop) of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the newest known token is among them, so that the next one can be chosen."""
        return self.stop == self.sequence.length


@dataclass
class StepPlan:
    """One step: first the copies, in order; then the chunks.

    reused: prompt tokens that a copy spares.
    """

    copies: list[Copy] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    reused: int = 0

    @property
    def prefills(self) -> bool:
        """Whether prompt tokens are among the chunks."""
        return any(chunk.sequence.prefilling for chunk in self.chunks)


class Scheduler:
    """Continuous batching: rows join and leave between any two steps.

    max_rows: rows in flight. max_tokens: tokens in one forward. cache_positions: positions the cache may hold,
    rows x the longest reservation. waiting: rows that have not started, taken from the left; lanes share it.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, cache_positions: int, waiting: deque[Sequence]
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max(max_tokens, max_rows)
        self.cache_positions = cache_positions
        self.waiting = waiting
        self.running: list[Sequence] = []
        self._free = list(reversed(range(max_rows)))

    def retire(self, finished: set[int]) -> None:
        """Take rows out, by slot."""
        self.running = [row for row in self.running if row.slot not in finished]
        self._free += finished

    def schedule(self, share: int) -> StepPlan:
        """The next step: every decoding row, then as much prefill as the token budget allows.

        share: rows past which none is taken from the queue.
        """
        plan = StepPlan()
        budget = self.max_tokens
        for row in self.running:
            budget -= self._extend(plan, row, budget)
        while budget > 0 and self.waiting and self._fits(self.waiting[0], share):
            row = self.waiting[0]
            source, shared = self._best_prefix(row)
            ready = min(shared, source.computed) if source is not None else 0
            if shared >= ready + SHARED_PREFIX:
                break  # its prefix is being computed in this very step: join in the next and copy it
            self.waiting.popleft()
            row.slot = self._free.pop()
            self.running.append(row)
            if source is not None and ready >= SHARED_PREFIX:
                row.computed = ready
                plan.copies.append(Copy(source.slot, row.slot, ready))
                plan.reused += ready
            budget -= self._extend(plan, row, budget)
        return plan

    def _extend(self, plan: StepPlan, row: Sequence, budget: int) -> int:
        stop = min(row.length, row.computed + budget)
        if stop > row.computed:
            plan.chunks.append(Chunk(row, row.computed, stop))
        return stop - row.computed

    def _fits(self, row: Sequence, share: int) -> bool:
        if not self.running:
            return True
        longest = max(row.reserved, max(other.reserved for other in self.running))
        rows = len(self.running) + 1
        return rows <= min(self.max_rows, share) and rows * longest <= self.cache_positions

    def _best_prefix(self, row: Sequence) -> tuple[Sequence | None, int]:
        """The running row that shares the longest prefix, and how much of it `row` can use.

        The last prompt token always runs: its logits choose the first token.
        """
        best, longest = None, 0
        for other in self.running:
            shared = min(row.common_prefix(other), len(row.prompt.token_ids) - 1)
            if (shared, other.computed) > (longest, best.computed if best else 0):
                best, longest = other, shared
        return best, longest
