"""What `auto` weighs by: a plan's expected tokens per second, what it believes, and what it may lose to learn."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile
from math import inf

from rayskip.decode.drafters.costs import StepCosts

MARGIN = 8
"""Tokens over which the price of one more is taken: a single one costs less than the clock can tell."""
BELIEF = 4.0
"""Tests that a prior counts for."""
FORGET = 0.99
"""What earlier counts are multiplied by at each new one: the last hundred or so tell."""
TRYING = 0.0025
"""Share of the time set aside for each of the four kinds of trial: all of them lose a hundredth at most, which the
noise of a measurement hides."""


@dataclass(frozen=True)
class Plan:
    """What a step may do: gain so many tokens, by expectation, with a forward over so many, drafts included.

    besides: seconds of drafting, less those of the step's prompt tokens, which are to be run anyway: a token is not
    worth more because a prompt happens to run beside it.
    """

    costs: StepCosts
    gained: float
    tokens: float
    besides: float = 0.0

    @classmethod
    def of_nothing(cls, costs: StepCosts, rows: int, tokens: int) -> Plan:
        """No drafts for rows that decode; tokens: all that run, prompts' too."""
        return cls(costs, rows, tokens, costs(rows) - costs(tokens))

    def plus(self, gained: float, tokens: float, seconds: float = 0.0) -> Plan:
        """With drafts, of so many tokens of which so many hold, that take so long besides the forward."""
        return Plan(self.costs, self.gained + gained, self.tokens + tokens, self.besides + seconds)

    @property
    def seconds(self) -> float:
        return self.costs(self.tokens) + self.besides

    @property
    def each(self) -> float:
        """Seconds in which it gains a token: what one is worth. The best plan has the least."""
        return self.seconds / self.gained

    def loss(self, best: Plan) -> float:
        """Seconds lost if it is carried out in place of another, which would gain as many tokens in so much less;
        negative if it is the better one."""
        return self.seconds - self.gained * best.each

    @property
    def least_chance(self) -> float:
        """Chance of holding from which on one token more is worth its verification; 1 if none is."""
        more = self.costs(self.tokens + MARGIN) - self.costs(self.tokens)
        return min(more / MARGIN / self.each, 1.0)


@dataclass
class Ratio:
    """A belief: how much came of how much, in fading sums."""

    came: float = 0.0
    of: float = 0.0

    def given(self, prior: float) -> float:
        return (self.came + BELIEF * prior) / (self.of + BELIEF)

    def count(self, came: float, of: float = 1.0, forget: float = FORGET) -> None:
        self.came = self.came * forget + came
        self.of = self.of * forget + of


class Savings:
    """Seconds set aside for one kind of trial, at most those of a step."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def save(self, step: float) -> None:
        """Before a step that takes so long."""
        self._seconds = min(self._seconds + TRYING * step, step)

    def afford(self, loss: float, debt: float = 0.0) -> bool:
        """Whether to do what loses so many seconds, which are then spent, and some more that are paid back before
        the next trial; what loses none needs no savings."""
        if loss <= 0:
            return True
        if loss > self._seconds:
            return False
        self._seconds -= loss + debt
        return True


def worth_verifying(chances: Seq[Seq[float]], plan: Plan) -> list[int]:
    """How much of each draft to verify beside what the plan has, so that expected tokens per second are most; the
    likeliest token at least, also where none pays.

    chances[i][j]: probability that draft i's tokens up to j all hold, so descending in j; a row's drafts begin with
    different tokens. Tokens are added by falling chance, over all drafts (TETRIS, arXiv 2502.15197).
    """
    likeliest = max((own[0] for own in chances if own), default=0.0)
    # with less a token pays nowhere
    needed = min(plan.costs.least_each(plan.tokens) / plan.each, likeliest)
    order = sorted(
        (
            (chance, draft, at)
            for draft, own in enumerate(chances)
            for at, chance in enumerate(takewhile(lambda chance: chance >= needed, own))
        ),
        key=lambda item: (-item[0], item[2], item[1]),
    )
    gained, least, best_count = plan.gained, inf, 0
    for count, (chance, _, _) in enumerate(order, 1):
        gained += chance
        if (each := (plan.costs(plan.tokens + count) + plan.besides) / gained) < least:
            least, best_count = each, count
    lengths = [0] * len(chances)
    for _, draft, at in order[:best_count]:
        lengths[draft] = max(lengths[draft], at + 1)
    return lengths
