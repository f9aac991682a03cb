"""Which rows run in the next step, in which slots. Pure bookkeeping: no tensors, no I/O.

Every step takes one token of every row that decodes, and as many prompt tokens as still fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from rayskip.decode.batch import Chunk
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KEY_BLOCK

FEWEST_TOKENS = 64
"""Tokens in a forward that are not halved any more where memory does not suffice."""
SHARED_PREFIX = 16
"""Shortest prefix worth copying from another row instead of computing it."""


@dataclass(frozen=True)
class Copy:
    """Copy the first `length` positions of slot `source` to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Resize:
    """Make the cache `slots` rows of `length` positions; the old slots `kept` live on as the first ones."""

    slots: int
    length: int
    kept: list[int]


@dataclass
class StepPlan:
    """One step: first slots are cleared, then come the resize, the copies, in order, and the chunks.

    clears: slots of rows that may have left numbers which are not finite. reused: prompt tokens that a copy spares.
    admitted: rows that join.
    """

    clears: list[int] = field(default_factory=list)
    resize: Resize | None = None
    copies: list[Copy] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    reused: int = 0
    admitted: int = 0

    @property
    def prefills(self) -> bool:
        """Whether prompt tokens are among the chunks."""
        return any(not chunk.generated for chunk in self.chunks)


class Scheduler:
    """Continuous batching: rows join and leave between any two steps.

    max_rows: rows in flight. max_tokens: tokens in one forward. cache_positions: positions the cache may hold,
    rows x the longest reservation. cohort: places that must be free before rows join; those that join together
    share their positions, and so their layer sets. waiting: rows that have not started, taken from the left;
    lanes share it.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, cache_positions: int, cohort: int, waiting: deque[Sequence]
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max(max_tokens, max_rows)
        self.cache_positions = cache_positions
        self.cohort = cohort
        self.waiting = waiting
        self._joining = False
        self.running: list[Sequence] = []
        self._slots = self._length = 0
        self._free: list[int] = []
        self._unclean: list[int] = []

    def retire(self, finished: set[int], unclean: Collection[int] = ()) -> None:
        """Take rows out, by slot. unclean: those whose numbers may not be finite, which are read even if masked."""
        self.running = [row for row in self.running if row.slot not in finished]
        self._free += finished
        self._unclean += unclean

    def halve(self) -> list[Sequence] | None:
        """Allow half as many rows, positions and tokens, and send what runs back to the queue, to begin anew in an
        empty cache: its tokens will be the same, since nothing but the row decides them. Returns what ran; None:
        there is no less."""
        if self.max_rows == 1 and self.max_tokens <= FEWEST_TOKENS:
            return None
        given_up = self.running
        rows = min(self.max_rows, self._slots or self.max_rows)
        self.cohort = max(1, self.cohort * (rows // 2) // self.max_rows)
        self.max_rows = max(rows // 2, 1)
        held = self._slots * self._length or self.cache_positions
        self.cache_positions = max(min(self.cache_positions, held) // 2, KEY_BLOCK)
        self.max_tokens = max(self.max_tokens // 2, self.max_rows)
        self.waiting.extendleft(row.anew() for row in reversed(given_up))
        self.running, self._free, self._unclean = [], [], []
        self._slots = self._length = 0
        return given_up

    def schedule(self, share: int) -> StepPlan:
        """The next step: every decoding row, then as much prefill as the token budget allows.

        share: rows past which none is taken from the queue.
        """
        plan = StepPlan()
        budget = self.max_tokens
        self._joining = self._may_join(share)
        held = self._held(share)
        for row in self.running:
            if row not in held:
                budget -= self._extend(plan, row, budget)
        if self._joining and self.waiting and self._fits(self.waiting[0], share) and self._is_cramped():
            self._resize(plan, self.waiting[0])
        while self._joining and budget > 0 and self.waiting and self._fits(self.waiting[0], share):
            row = self.waiting[0]
            source, shared = self._best_prefix(row)
            ready = min(shared, source.computed) if source is not None else 0
            if shared >= ready + SHARED_PREFIX:
                break  # its prefix is being computed in this very step: join in the next and copy it
            if not self._has_place(row):
                if plan.admitted:
                    break  # the next step begins with a resize
                self._resize(plan, row)
            self.waiting.popleft()
            plan.admitted += 1
            row.slot = self._free.pop()
            self.running.append(row)
            if source is not None and ready >= SHARED_PREFIX:
                row.computed = ready
                row.draft_cached = min(ready, source.draft_cached)
                plan.copies.append(Copy(source.slot, row.slot, ready))
                plan.reused += ready
            budget -= self._extend(plan, row, budget)
        if not plan.chunks:
            for row in held:
                budget -= self._extend(plan, row, budget)
        if plan.chunks:
            plan.clears, self._unclean = self._unclean, []
        return plan

    def _held(self, share: int) -> list[Sequence]:
        """Rows of a cohort that are prefilled wait for its others, so that all begin to decode in one step."""
        if self.cohort == 1:
            return []
        joins = self._joining and bool(self.waiting) and self._fits(self.waiting[0], share)
        if not joins and not any(row.prefilling for row in self.running):
            return []
        return [row for row in self.running if len(row.generated) == 1]

    def _extend(self, plan: StepPlan, row: Sequence, budget: int) -> int:
        if row.length >= row.limit:
            return 0  # its last token is on its way
        stop = min(row.length, row.computed + budget)
        if stop > row.computed:
            plan.chunks.append(Chunk(row, row.computed, stop))
        return stop - row.computed

    def _may_join(self, share: int) -> bool:
        """Once begun, a cohort joins over as many steps as its prefill takes."""
        free = min(self.max_rows, share) - len(self.running)
        return free > 0 and (self._joining or free >= min(self.cohort, len(self.waiting)) or not self.running)

    def _fits(self, row: Sequence, share: int) -> bool:
        if not self.running:
            return True
        rows = len(self.running) + 1
        return rows <= min(self.max_rows, share) and rows * self._longest(row) <= self.cache_positions

    def _longest(self, row: Sequence) -> int:
        return max(row.reserved, max((other.reserved for other in self.running), default=0))

    def _has_place(self, row: Sequence) -> bool:
        return bool(self._free) and row.reserved <= self._length

    def _is_cramped(self) -> bool:
        """Whether the shape, made for longer rows that are gone, keeps rows waiting."""
        possible = min(self.max_rows, self.cache_positions // self._longest(self.waiting[0]))
        return self._slots < min(possible, len(self.running) + len(self.waiting))

    def _resize(self, plan: StepPlan, row: Sequence) -> None:
        """Shape the cache for the rows in flight and `row`, for as many as its limit allows; renumbers slots."""
        self._length = self._longest(row)
        self._slots = max(min(self.max_rows, self.cache_positions // self._length), len(self.running) + 1)
        plan.resize = Resize(self._slots, self._length, [other.slot for other in self.running])
        for slot, other in enumerate(self.running):
            other.slot = slot
        self._free = list(reversed(range(len(self.running), self._slots)))

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
