"""How far a run is and how fast, for people who watch. Decides nothing and prints nothing."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from rayskip.pool import ReplicaProgress

WINDOW_S = 15.0
"""Seconds over which the present speed is taken."""

_NOTHING = ReplicaProgress(0, 0)


@dataclass(frozen=True)
class Progress:
    """A snapshot. Rows are input rows, committed or generated and not yet committed; resumed ones count.

    failed: generations without an answer, of those committed.
    tokens: completion tokens of this run. tok_s_now, tok_s: per second, over the last seconds and over
    the run since the first replica was ready. eta_s: seconds to go, None before the first token.
    phase: what goes on. elapsed_s: since the run began.
    """

    phase: str
    elapsed_s: float
    rows: int
    rows_total: int
    tokens: int
    tok_s_now: float
    tok_s: float
    eta_s: float | None
    replicas: int
    replicas_total: int
    retries: int
    failed: int


class Meter:
    """Adds up what was committed and what replicas say of work under way. Seconds are handed in."""

    def __init__(self, rows_resumed: int, most_tokens: int) -> None:
        """most_tokens: that a row may come to."""
        self._most_tokens = most_tokens
        self._rows_resumed = rows_resumed
        self._rows = 0
        self._tokens = 0
        # Per replica: what it says it did, and how much of that is committed.
        self._said: dict[int, ReplicaProgress] = {}
        self._committed: dict[int, ReplicaProgress] = {}
        # What it says beyond that; the totals are kept, since many ask between two events of thousands of replicas.
        self._ahead: dict[int, ReplicaProgress] = {}
        self._rows_ahead = 0
        self._tokens_ahead = 0
        self._started: float | None = None
        self._window: deque[tuple[float, int]] = deque()

    @property
    def rows(self) -> int:
        """Input rows done, resumed ones included."""
        return self._rows_resumed + self._rows + self._rows_ahead

    @property
    def tokens(self) -> int:
        """Completion tokens of this run."""
        return self._tokens + self._tokens_ahead

    def start(self, now: float) -> None:
        """The first replica is ready: speeds count from here; later calls change nothing."""
        if self._started is None:
            self._started = now
            self._window.append((now, 0))

    def said(self, replica: int, progress: ReplicaProgress) -> bool:
        """A replica's counters since its start; whether they differ from the last ones."""
        moved = self._said.get(replica) != progress
        self._said[replica] = progress
        self._count_ahead(replica)
        return moved

    def committed(self, replica: int, rows: int, tokens: int) -> None:
        """A shard of this replica is committed, with so many input rows and completion tokens."""
        self._rows += rows
        self._tokens += tokens
        self.dropped(replica, rows, tokens)

    def dropped(self, replica: int, rows: int, tokens: int) -> None:
        """A replica generated so much that is not to be counted, or is already."""
        before = self._committed.get(replica, _NOTHING)
        self._committed[replica] = ReplicaProgress(before.rows + rows, before.completion_tokens + tokens)
        self._count_ahead(replica)

    def lost(self, replica: int) -> None:
        """What a lost replica had under way is lost too."""
        self._said.pop(replica, None)
        self._count_ahead(replica)

    def speeds(self, now: float) -> tuple[float, float]:
        """Completion tokens per second: over the last seconds, and since the start."""
        if self._started is None:
            return 0.0, 0.0
        self._window.append((now, self.tokens))
        while len(self._window) > 2 and now - self._window[0][0] > WINDOW_S:
            self._window.popleft()
        then, tokens = self._window[0]
        return (
            max(0.0, (self.tokens - tokens) / (now - then)) if now > then else 0.0,
            self.tokens / (now - self._started) if now > self._started else 0.0,
        )

    def eta_s(self, tok_s: float, rows_total: int) -> float | None:
        """Seconds to go at a speed in tokens, of which a row is expected to take as many as those committed took.

        Not from rows: many are under way together, and none is done for a long time. Before the first commit, when
        most rows are under way and those done are the shortest, it is the tokens so far for each row done, and not
        more than a row may come to.
        """
        if not self.tokens or not tok_s:
            return None
        done = self.rows - self._rows_resumed
        a_row = (
            self._tokens / self._rows
            if self._tokens
            else min(self._most_tokens, self.tokens / done if done else math.inf)
        )
        return max(0.0, a_row * (rows_total - self._rows_resumed) - self.tokens) / tok_s

    def _count_ahead(self, replica: int) -> None:
        """Bring the totals up to date with what is known of one replica."""
        said = self._said.get(replica, _NOTHING)
        committed = self._committed.get(replica, _NOTHING)
        ahead = ReplicaProgress(
            max(0, said.rows - committed.rows), max(0, said.completion_tokens - committed.completion_tokens)
        )
        before = self._ahead.get(replica, _NOTHING)
        self._ahead[replica] = ahead
        self._rows_ahead += ahead.rows - before.rows
        self._tokens_ahead += ahead.completion_tokens - before.completion_tokens
