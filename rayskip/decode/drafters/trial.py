"""Whether to draft at all, by the clock: what drafting costs beside the forward shows nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from threading import Lock

FADE = 0.05
"""Share of what earlier steps of a worker count that is forgotten at each new one, at most."""
CLEARLY = 1.05
"""How many times faster drafting must be: a clock is noisy, and not drafting is what a user expects at worst."""
DOUBT = 2.0
"""Standard errors by which it must be faster beside that, before it is begun: what steps took varies."""
FEW, EVIDENCE = 4, 256
"""Fewer rows than this need so many verifications of rows to tell what drafting gains: it comes in bursts, while a
step without drafts gains a token a row, whatever comes. Once begun it goes on for them while it is no slower."""
MANY = 32
"""From so many rows on drafting is first tried after SELDOM steps: it seldom pays there, and what rows have missed
is much to catch up on."""
SETTLE = 2
"""Steps of a worker after a change that tell nothing, since they catch up on what the other way left undone."""
PROBE = 8
"""Steps of each worker that the slower way gets at a time, at least."""
AGAIN, SELDOM = 256, 1024
"""Steps of each worker from one time to the next: twice as many each time that it was slower again, up to SELDOM.
Longer where a probe of drafting is, which may be the slower way, and with MANY rows."""
PATIENCE = 4
"""Probes of drafting that would fit into the shortest pause."""


@dataclass
class Way:
    """Fading sums over the steps taken so. steps: of each worker, on average. squares: of tokens, of tokens times
    seconds, of seconds, which fade twice as fast."""

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def error(self) -> float:
        """The rate's standard error, as a share of it (of a ratio of sums over independent steps)."""
        tokens, both, seconds = self.squares
        left = tokens - 2 * self.rate * both + self.rate**2 * seconds
        return sqrt(max(left, 0.0)) / self.tokens if self.tokens else 0.0

    def count(self, tokens: float, seconds: float, fade: float) -> None:
        """One step more; fade: what earlier ones are multiplied by."""
        new = tokens**2, tokens * seconds, seconds**2
        self.tokens, self.seconds = self.tokens * fade + tokens, self.seconds * fade + seconds
        first, second, third = (own * fade**2 + one for own, one in zip(self.squares, new, strict=True))
        self.squares = first, second, third


class Trial:
    """Two ways to take a step, with drafts (True) and without: the one that gains tokens faster is taken, and the
    other is tried now and then."""

    def __init__(self, rows: int) -> None:
        """rows: that a step runs, about."""
        few = rows < FEW
        self._probe = {True: EVIDENCE // rows if few else PROBE, False: PROBE}
        self._fade = {True: rows / EVIDENCE if few else FADE, False: FADE}
        self._stay = 1.0 if few else CLEARLY
        self._ways = {True: Way(steps=PROBE if rows >= MANY else 0), False: Way()}
        self._faster: bool | None = None  # not known yet
        self._counted = 0.0
        self._again = SELDOM if rows >= MANY else max(AGAIN, PATIENCE * self._probe[True])
        self._pause, self._due = self._again, float(self._again)
        self._taken: dict[int, bool] = {}
        self._settling: dict[int, int] = {}

    def choose(self, worker: int = 0, counts: bool = True) -> bool:
        """Whether the next step of the worker with this number drafts.

        counts: whether `count` will hear of it; if not, the worker drafts only if it did before and that is not
        known to be the slower way.
        """
        if not counts:
            return self._taken.get(worker, False) and self._faster is not False
        drafting = self._choose()
        if drafting is not self._taken.get(worker):
            self._taken[worker], self._settling[worker] = drafting, SETTLE
        return drafting

    def _choose(self) -> bool:
        for drafting, way in self._ways.items():
            if way.steps < self._probe[drafting]:
                return drafting
        before, drafts, plain = self._faster, self._ways[True], self._ways[False]
        least = self._stay if before else CLEARLY + DOUBT * hypot(drafts.error, plain.error)
        self._faster = drafts.rate >= plain.rate * least
        if self._faster is not before:
            self._pause = self._again
        elif self._counted >= self._due:
            self._pause = min(2 * self._pause, SELDOM // AGAIN * self._again)
            self._ways[not self._faster] = Way()  # a machine changes
        else:
            return self._faster
        self._due = self._counted + self._pause
        return self._choose()

    def count(self, drafting: bool, tokens: int, seconds: float, worker: int = 0) -> None:
        """A worker's step gained so many tokens in so long."""
        if self._settling[worker]:
            self._settling[worker] -= 1
            return
        share = 1 / len(self._taken)  # workers that have no such step are not waited for
        way, fade = self._ways[drafting], 1 - self._fade[drafting] * share
        way.steps += share
        way.count(tokens, seconds, fade)
        self._counted += share


class Trials:
    """One trial for each number of rows, to a power of two. Workers share them and so go the same way at a time: a
    worker's clock then also sees what drafting costs the other workers, with which it shares the interpreter."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._workers = 0
        self._by_rows: dict[int, Trial] = {}

    def join(self) -> int:
        """A worker's number. All have joined before the first asks."""
        with self._lock:
            self._workers += 1
            return self._workers - 1

    def choose(self, rows: int, worker: int, counts: bool) -> bool:
        """See Trial.choose; rows: that the worker's step runs."""
        with self._lock:
            power = rows.bit_length()
            trial = self._by_rows.setdefault(power, Trial(max(2**power // 2, 1)))
            return trial.choose(worker, counts)

    def count(self, rows: int, drafting: bool, tokens: int, seconds: float, worker: int) -> None:
        """See Trial.count; rows: as in the call of `choose` before the step."""
        with self._lock:
            self._by_rows[rows.bit_length()].count(drafting, tokens, seconds, worker)
