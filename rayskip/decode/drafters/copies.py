"""`auto`'s copies: for which rows to look them up, how likely they are to hold, and which to verify."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from operator import and_, mul
from weakref import WeakKeyDictionary

from rayskip.config import AutoDraft
from rayskip.decode.drafters.lookup import LOOKUP, Continuation, Lookups
from rayskip.decode.drafters.value import Plan, Ratio, Savings, worth_verifying
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict

ROW_FORGETS = 0.95
"""As FORGET, of one row: its last twenty counts or so."""
SUREST = 0.97
"""Highest chance that a copy's first token is given, however lucky its row."""
HOPE = 0.1
"""Tokens that a look-up is believed to gain before any did."""


class CopyChances:
    """How likely copies are to hold: by the length of the suffix that was found and the copy's rank, and by how the
    row's own copies fared against that. The text tells, whether or not they were verified."""

    def __init__(self) -> None:
        self._first: defaultdict[tuple[int, int], Ratio] = defaultdict(Ratio)
        self._later: defaultdict[int, Ratio] = defaultdict(Ratio)
        self._fortunes: WeakKeyDictionary[Sequence, Ratio] = WeakKeyDictionary()
        self._open: WeakKeyDictionary[Sequence, tuple[int, Seq[Continuation], float]] = WeakKeyDictionary()

    def of(self, row: Sequence, copies: Seq[Continuation]) -> list[list[float]]:
        """For each token of each copy the chance that all up to it hold; copies: of what follows the row now, best
        first."""
        self._settle(row)
        chances = []
        for copy in copies:
            first = self._first[copy.size, copy.rank].given(0.05 if copy.rank else min(0.15 * copy.size, 0.6))
            if copy is copies[0]:
                self._open[row] = row.length, copies, first
                first = min(first * self._fortunes[row].given(1.0), SUREST)
            later = self._later[copy.size].given(0.8)
            chances.append(list(accumulate([first, *[later] * (len(copy.tokens) - 1)], mul)))
        return chances

    def _settle(self, row: Sequence) -> None:
        """Count how the copies that last stood at choice fared against what came."""
        fortune = self._fortunes.setdefault(row, Ratio())
        if row not in self._open:
            return
        position, copies, expected = self._open.pop(row)
        came = row.tokens(position, row.length)
        for copy in copies:
            held = [drafted == token for drafted, token in zip(copy.tokens, came, strict=False)]
            self._first[copy.size, copy.rank].count(held[0])
            if copy is copies[0]:
                fortune.count(held[0], expected, ROW_FORGETS)
            for before, at in zip(accumulate(held, and_), held[1:], strict=False):
                if before:
                    self._later[copy.size].count(at)


@dataclass(frozen=True)
class Proposal:
    """A copy for a row, and for each of its tokens the chance that all up to it hold."""

    row: Sequence
    tokens: Seq[int]
    chances: Seq[float]


class Copies:
    """Beliefs besides chances: what a look-up gains, in general and in each row, in tokens and after the price of
    verification; and the seconds that it takes."""

    def __init__(self, config: AutoDraft, clock: Callable[[], float] = time.perf_counter) -> None:
        self._tokens = config.tokens
        self._clock = clock
        self._lookups = Lookups(config.max_ngram, config.copies)
        self._chances = CopyChances()
        self._gain, self._seconds = Ratio(), Ratio()
        self._gains: WeakKeyDictionary[Sequence, Ratio] = WeakKeyDictionary()
        self._looking, self._verifying = Savings(), Savings()
        self._steps = 0
        self._looked: list[Sequence] = []

    def plan(self, rows: Seq[Sequence], nothing: Plan) -> tuple[list[Proposal], Plan]:
        """What to verify of what look-ups find, and the plan with it, beside `nothing`."""
        self._looking.save(nothing.seconds)
        self._verifying.save(nothing.seconds)
        self._looked = self._to_look_up(rows, nothing)
        found = [proposal for row in self._looked for proposal in self._look_up(row, nothing.seconds)]
        lengths = worth_verifying([proposal.chances for proposal in found], nothing)
        copies = [
            Proposal(proposal.row, proposal.tokens[:length], proposal.chances[:length])
            for proposal, length in zip(found, lengths, strict=True)
            if length
        ]
        plan = nothing.plus(sum(sum(proposal.chances) for proposal in copies), sum(lengths))
        return (copies, plan) if self._verifying.afford(plan.loss(nothing)) else ([], nothing)

    def observe(self, verdicts: Mapping[Sequence, Verdict], price: float) -> None:
        """What became of the rows looked up; price: of verifying a token, in tokens."""
        for row in self._looked:
            drafters = row.draft.drafters
            held = sum(drafters[node] == LOOKUP for node in verdicts[row].path)
            gain = held - price * drafters.count(LOOKUP)
            self._gain.count(gain)
            self._gains.setdefault(row, Ratio()).count(gain, forget=ROW_FORGETS)

    def _to_look_up(self, rows: Seq[Sequence], nothing: Plan) -> list[Sequence]:
        """Rows for which a look-up pays, or is tried; the trials go round."""
        self._steps += 1
        start = self._steps % len(rows)
        gain, seconds, unknown = self._gain.given(HOPE), self._seconds.given(0.0), Ratio()
        return [
            row
            for row in (*rows[start:], *rows[:start])
            if self._looking.afford(
                nothing.plus(self._gains.get(row, unknown).given(gain), 0, seconds).loss(nothing)
            )
        ]

    def _look_up(self, row: Sequence, step: float) -> list[Proposal]:
        """step: seconds that the step takes without drafts."""
        began = self._clock()
        copies = self._lookups.copies(row, min(self._tokens, row.draft_room))
        chances = self._chances.of(row, copies)
        # a process that was stopped meanwhile must not make look-ups dearer than any trial may be
        self._seconds.count(min(self._clock() - began, step))
        return [Proposal(row, copy.tokens, own) for copy, own in zip(copies, chances, strict=True)]
