"""Whether to draft at all, by the clock: what drafting costs beside the forward shows nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

FADE = 0.9
"""What earlier steps count at each new one."""
CLEARLY = 1.15
"""How many times faster drafting must be: a lane's own clock does not see that its Python holds up other lanes."""
PROBE, AGAIN = 4, 128
"""Steps that the slower way gets at a time, and steps from one time to the next."""


@dataclass
class Way:
    """Fading sums over the steps taken so."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Trial:
    """Two ways to take a step, with drafts (True) and without: the one that gains tokens faster is taken, and the
    other is tried now and then."""

    ways: dict[bool, Way] = field(default_factory=lambda: {True: Way(), False: Way()})
    _step: int = PROBE

    def choose(self) -> bool:
        for drafting, way in self.ways.items():
            if way.steps < PROBE:
                return drafting
        faster = self.ways[True].rate >= self.ways[False].rate * CLEARLY
        self._step += 1
        return faster if self._step % AGAIN >= PROBE else not faster

    def count(self, drafting: bool, tokens: int, seconds: float) -> None:
        """A step gained so many tokens in so long."""
        way = self.ways[drafting]
        way.steps += 1
        way.tokens = way.tokens * FADE + tokens
        way.seconds = way.seconds * FADE + seconds
