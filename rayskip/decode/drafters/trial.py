"""Whether to draft at all, by the clock: what drafting costs beside the forward shows nowhere else."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from threading import Lock

FADE = 0.95
"""What earlier steps count at each new one."""
CLEARLY = 1.05
"""How many times faster drafting must be: a clock is noisy, and not drafting is what a user expects at worst."""
SETTLE, PROBE = 4, 12
"""Steps after a change that tell nothing, since they catch up on what the other way left undone; and those after
them that do."""
AGAIN = 256
"""Steps from one probe of the slower way to the next."""


@dataclass
class Way:
    """Fading sums over the steps taken so. settling: steps yet to come that tell nothing."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    settling: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Trial:
    """Two ways to take a step, with drafts (True) and without: the one that gains tokens faster is taken, and the
    other is tried now and then."""

    ways: dict[bool, Way] = field(default_factory=lambda: {True: Way(), False: Way()})
    _taken: bool | None = None
    _step: int = SETTLE + PROBE

    def choose(self) -> bool:
        if (drafting := self._due()) is not self._taken:
            self._taken = drafting
            self.ways[drafting].settling = SETTLE
        return drafting

    def _due(self) -> bool:
        for drafting, way in self.ways.items():
            if way.steps < PROBE:
                return drafting
        faster = self.ways[True].rate >= self.ways[False].rate * CLEARLY
        self._step += 1
        return faster if self._step % AGAIN >= SETTLE + PROBE else not faster

    def count(self, drafting: bool, tokens: int, seconds: float) -> None:
        """A step gained so many tokens in so long."""
        way = self.ways[drafting]
        if way.settling:
            way.settling -= 1
            return
        way.steps += 1
        way.tokens = way.tokens * FADE + tokens
        way.seconds = way.seconds * FADE + seconds


class Trials:
    """One trial for each number of rows, to a power of two. Lanes share them and so go the same way at a time: a
    lane's clock then also sees what drafting costs the other lanes, with which it shares the interpreter."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_rows: defaultdict[int, Trial] = defaultdict(Trial)

    def choose(self, rows: int) -> bool:
        with self._lock:
            return self._by_rows[rows.bit_length()].choose()

    def count(self, rows: int, drafting: bool, tokens: int, seconds: float) -> None:
        """See Trial.count; rows: as in the call of `choose` before the step."""
        with self._lock:
            self._by_rows[rows.bit_length()].count(drafting, tokens, seconds)
