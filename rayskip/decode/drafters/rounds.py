"""`auto`'s rounds of Kangaroo's: for which rows, and what they are expected to give."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import MISSED, States
from rayskip.decode.drafters.kangaroo import KANGAROO, KangarooDrafter
from rayskip.decode.drafters.value import Plan, Ratio, Savings
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache

DRAFTING = 0.15
"""Share of a step that a round is believed to take before any was timed."""


@dataclass
class Beliefs:
    """At about one number of rows: tokens drafted by a row that takes part, tokens accepted by one without a copy
    that holds, seconds of drafting by a round."""

    drafted: Ratio = field(default_factory=Ratio)
    accepted: Ratio = field(default_factory=Ratio)
    seconds: Ratio = field(default_factory=Ratio)


@dataclass(frozen=True)
class Round:
    """rows: that take part, and how likely it is of each that no copy of its holds. least: chance below which a
    token is not drafted. plan: the step with the round."""

    rows: Mapping[Sequence, float]
    least: float
    plan: Plan
    beliefs: Beliefs


class Rounds:
    def __init__(self, kangaroo: KangarooDrafter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._kangaroo = kangaroo
        self._clock = clock
        self._beliefs: defaultdict[int, Beliefs] = defaultdict(Beliefs)
        self._asking = Savings()
        self._asked: tuple[Beliefs, float] | None = None

    def plan(self, left: Mapping[Sequence, float], plan: Plan) -> Round | None:
        """A round, if it pays beside the plan or is to be tried; left: how likely it is of each row that no copy of
        its holds. Rows to which its tokens are not worth their verification take no part."""
        self._asked = None
        self._asking.save(plan.seconds)
        least, beliefs = plan.least_chance, self._beliefs[len(left).bit_length()]
        # before any, with confidences spread evenly, of which those from `least` on are drafted, and that hold as
        # often as they say but for the adapter's agreement (at one half they do)
        drafted = beliefs.drafted.given(1 - least)
        accepted = beliefs.accepted.given(self._kangaroo.agreement * (1 - least**2))
        rows = {
            row: own for row, own in left.items() if row.draft_room > 0 and own * accepted > least * drafted
        }
        seconds = beliefs.seconds.given(DRAFTING * plan.seconds)
        with_round = plan.plus(sum(rows.values()) * accepted, len(rows) * drafted, seconds)
        # what a row has missed it computes once, for the tokens that it has left; a trial may be all that comes
        missed = self._kangaroo.share * plan.costs.each
        spread = sum(row.missed / row.draft_room for row in rows) * missed
        at_once = min(sum(row.missed for row in rows), MISSED) * missed
        if not rows or not self._asking.afford(with_round.loss(plan) + spread, at_once):
            return None
        return Round(rows, least, with_round, beliefs)

    def draft(self, planned: Round, chunks: Seq[Chunk], cache: KVCache) -> States | None:
        rows, costs, began = list(planned.rows), planned.plan.costs, self._clock()
        before, missed = sum(len(row.draft) for row in rows), sum(row.missed for row in rows)
        states = self._kangaroo.draft(chunks, rows, cache, planned.least)
        seconds = self._clock() - began
        drafted = sum(len(row.draft) for row in rows) - before
        missed -= sum(max(row.missed, 0) for row in rows)
        # verification may begin later; and what rows have missed of their prompts is paid once, not every round
        later = 0.0 if states is None else costs(planned.plan.tokens)
        spared = self._kangaroo.share * (later + missed * costs.each)
        if took_part := [row for row in rows if row.draft_cached == row.length]:
            planned.beliefs.drafted.count(drafted, len(took_part))
            planned.beliefs.seconds.count(min(max(seconds - spared, 0.0), planned.plan.seconds))  # see Copies
            self._asked = planned.beliefs, sum(planned.rows[row] for row in took_part)
        return states

    def observe(self, verdicts: Mapping[Sequence, Verdict]) -> None:
        if self._asked:
            (beliefs, rows), self._asked = self._asked, None
            held = sum(
                row.draft.drafters[node] == KANGAROO
                for row, verdict in verdicts.items()
                for node in verdict.path
            )
            beliefs.accepted.count(held, rows)
