"""Chooses at every step what to draft, how much, and whether at all, by what it measures.

A step's price comes from timings at start-up (costs.py), a draft's worth from how earlier drafts fared: by the
length of the suffix that lookup found, and, for Kangaroo, over the last rounds (the first are expected to go as its
label says); whether drafting pays at all, the clock tells (trial.py). When the batch is full the price of a token
is high and only near-certain copies are verified; as it thins out, drafts get longer by themselves. The clock reads
steps without prompt tokens alone: where rows are so short that every step has some, nothing is drafted.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from operator import and_, mul
from weakref import WeakKeyDictionary

from torch import Tensor

from rayskip.config import AutoDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.costs import StepCosts, marginal_chance, worth_verifying
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.drafters.kangaroo import KANGAROO, KangarooDrafter
from rayskip.decode.drafters.lookup import LOOKUP, Copy, Lookups
from rayskip.decode.drafters.trial import Trials
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache

BELIEF = 4.0
"""Tests that a prior counts for."""
FORGET, ROW_FORGETS = 0.99, 0.95
"""What earlier counts are multiplied by at each new one, so that old texts fade, and a row's own past."""
SUREST = 0.97
"""Highest chance that a copy's first token is given."""
RETRY = 64
"""Steps after which a drafter whose rounds do not pay gets another."""
DRAFTING = 0.15
"""Share of a step that a round of Kangaroo's is believed to take, before any was timed."""
DEAR = 0.7
"""Chance that a token must have to pay for its verification, from which on Kangaroo is not asked: few of its tokens
have it, and what rows have missed in its cache, their prompts too, would have to be computed first."""
SURE = 0.6
"""Chance of a copy's first token from which on Kangaroo is not asked for a second opinion."""


@dataclass
class Rate:
    """A share that is counted: successes over tests."""

    successes: float = 0.0
    tests: float = 0.0

    def given(self, prior: float) -> float:
        return (self.successes + BELIEF * prior) / (self.tests + BELIEF)

    def count(self, success: bool) -> None:
        self.successes = self.successes * FORGET + success
        self.tests = self.tests * FORGET + 1


@dataclass
class Rounds:
    """How Kangaroo's rounds at about one number of rows went: fading sums over them.

    rounds: how many; rows: of them; drafted, accepted: tokens; seconds: of drafting.
    """

    rounds: float = 0.0
    rows: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    seconds: float = 0.0
    idle: int = 0

    @classmethod
    def expected(cls, rows: int, agreement: float, least: float, seconds: float) -> Rounds:
        """Before any: with confidences spread evenly, of which those from `least` on are drafted, and that hold as
        often as they say, but for the adapter's `agreement` (at one half they do)."""
        drafted, accepted = 1 - least, agreement * (1 - least**2)
        return cls(BELIEF, BELIEF * rows, BELIEF * rows * drafted, BELIEF * rows * accepted, BELIEF * seconds)

    def count(self, rows: int, drafted: int, seconds: float) -> None:
        for name, value in (("rounds", 1), ("rows", rows), ("drafted", drafted), ("seconds", seconds)):
            setattr(self, name, getattr(self, name) * FORGET + value)
        self.accepted *= FORGET
        self.idle = 0

    def worth_trying(self, rows: int, others: float, base: int, late: float, costs: StepCosts) -> bool:
        """Whether a round for `rows` rows is expected to pay, or is due.

        late: seconds of catching up that fall to it; the rest as in `round_pays`.
        """
        if self.idle >= RETRY:
            return True
        accepted, drafted = self.accepted / self.rows, self.drafted / self.rows
        pays = round_pays(rows, others, base, accepted, drafted, self.seconds / self.rounds + late, costs)
        self.idle += not pays
        return pays


def round_pays(
    rows: int, others: float, base: int, accepted: float, drafted: float, seconds: float, costs: StepCosts
) -> bool:
    """Whether the batch gains tokens faster with a round for `rows` of its rows than without.

    others: tokens that the other rows will gain, and wait for. base: tokens that run anyway. accepted, drafted:
    tokens per row and round, of which verification runs all. seconds: that a round adds, besides.
    """
    with_round = (others + rows * (1 + accepted)) / (costs(base + round(rows * drafted)) + seconds)
    return with_round > (others + rows) / costs(base)


@dataclass
class Fortune:
    """How a row's copies fare against what is expected of them: fading sums."""

    held: float = 0.0
    expected: float = 0.0

    @property
    def factor(self) -> float:
        return (self.held + BELIEF) / (self.expected + BELIEF)

    def count(self, held: bool, chance: float) -> None:
        self.held = self.held * ROW_FORGETS + held
        self.expected = self.expected * ROW_FORGETS + chance


@dataclass(frozen=True)
class _Proposed:
    """Copies that stood at choice for a row's tokens from `position` on; chance: the best one's, without the row's
    own fortune."""

    position: int
    copies: list[Copy]
    chance: float


class AutoDrafter(Drafter):
    def __init__(
        self, config: AutoDraft, costs: StepCosts, kangaroo: KangarooDrafter | None, trials: Trials
    ) -> None:
        """trials: shared by the engine's workers."""
        self._config = config
        self.most_tokens = config.tokens + (0 if kangaroo is None else kangaroo.most_tokens)
        self._costs = costs
        self._kangaroo = kangaroo
        self._lookups = Lookups(config.max_ngram, config.copies)
        self._first: defaultdict[tuple[int, int], Rate] = defaultdict(Rate)
        self._later: defaultdict[int, Rate] = defaultdict(Rate)
        self._fortunes: WeakKeyDictionary[Sequence, Fortune] = WeakKeyDictionary()
        self._proposed: WeakKeyDictionary[Sequence, _Proposed] = WeakKeyDictionary()
        self._rounds: dict[int, Rounds] = {}
        self._round = Rounds()
        self._trials, self._worker = trials, trials.join()
        self._drafting = self._decodes_only = False
        self._tokens, self._layers_left = 0, 1.0
        self._began = self._drafted = 0.0

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        self._began = time.perf_counter()
        self._decodes_only = all(chunk.generated for chunk in chunks)
        self._drafting = self._trials.choose(len(rows), self._worker, self._decodes_only)
        states = self._draft(chunks, rows, cache) if self._drafting else None
        self._tokens = sum(chunk.stop - chunk.start for chunk in chunks) + sum(len(row.draft) for row in rows)
        self._layers_left = 1.0 if states is None or self._kangaroo is None else 1 - self._kangaroo.share
        self._drafted = time.perf_counter()
        return states

    def _draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        if not rows:
            return None
        proposals = [(row, tokens, chances) for row in rows for tokens, chances in self._propose(row)]
        base = sum(chunk.stop - chunk.start for chunk in chunks)
        lengths = worth_verifying([chances for *_, chances in proposals], len(rows), self._costs, base)
        copied: dict[Sequence, list[float]] = {}
        for (row, tokens, chances), length in zip(proposals, lengths, strict=True):
            if fits := min(length, row.draft_places):
                row.draft.add_chain(tokens[:fits], LOOKUP)
                copied.setdefault(row, []).extend(chances[:fits])
        running = base + sum(len(row.draft) for row in rows)
        return self._try_kangaroo(chunks, rows, copied, running, cache)

    def _try_kangaroo(
        self,
        chunks: Seq[Chunk],
        rows: Seq[Sequence],
        copied: Mapping[Sequence, list[float]],
        base: int,
        cache: KVCache,
    ) -> States | None:
        """A round for the rows that copy nothing or are unsure of it, if it is expected to pay.

        copied: the chances of what rows copy. base: tokens that run anyway.
        """
        left = [row for row in rows if row.draft_room > 0 and (row not in copied or copied[row][0] < SURE)]
        if self._kangaroo is None or not left:
            return None
        others = len(rows) - len(left) + sum(map(sum, copied.values()))
        least = marginal_chance(len(left) + others, base, self._costs)
        if least > DEAR:
            return None
        kind = len(left).bit_length()
        if kind not in self._rounds:
            seconds = DRAFTING * self._costs(base)
            self._rounds[kind] = Rounds.expected(len(left), self._kangaroo.agreement, least, seconds)
        self._round = self._rounds[kind]
        # what a row has missed it computes once, for the tokens that it has left
        missed_each = sum(row.missed / row.draft_room for row in left)
        late = missed_each * self._kangaroo.share * self._costs.each
        if not self._round.worth_trying(len(left), others, base, late, self._costs):
            return None
        began = time.perf_counter()
        before = sum(len(row.draft) for row in left)
        missed = sum(row.missed for row in left)
        states = self._kangaroo.draft(chunks, left, cache, least)
        seconds = time.perf_counter() - began
        drafted = sum(len(row.draft) for row in left) - before
        missed -= sum(max(row.missed, 0) for row in left)
        # verification may begin later; and what rows have missed of their prompts is paid once, not every round
        later = 0.0 if states is None else self._costs(base + drafted)
        spared = self._kangaroo.share * (later + missed * self._costs.each)
        if took_part := sum(row.draft_cached == row.length for row in left):
            self._round.count(took_part, drafted, max(seconds - spared, 0.0))
        return states

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: Tensor) -> None:
        now = time.perf_counter()  # after the forward, and after choosing its tokens
        if self._decodes_only:  # a prompt's tokens cost otherwise: they share their row's keys
            self._costs = self._costs.learn(self._tokens, (now - self._drafted) / self._layers_left)
            gained = sum(len(verdict.choices) for verdict in verdicts.values())
            self._trials.count(len(verdicts), self._drafting, gained, now - self._began, self._worker)
        self._round.accepted += sum(
            row.draft.drafters[node] == KANGAROO for row, verdict in verdicts.items() for node in verdict.path
        )
        if self._kangaroo is not None:
            self._kangaroo.observe(verdicts, hidden)

    def _propose(self, row: Sequence) -> list[tuple[list[int], list[float]]]:
        """Copied drafts, and for each of their tokens the chance that all up to it hold."""
        fortune = self._settle(row)
        copies = self._lookups.copies(row, min(self._config.tokens, row.draft_room))
        if not copies:
            return []
        drafts = []
        for copy in copies:
            first = self._chance(copy)
            if copy is copies[0]:
                self._proposed[row] = _Proposed(row.length, copies, first)
                first = min(first * fortune.factor, SUREST)
            later = self._later[copy.size].given(0.8)
            drafts.append((copy.tokens, list(accumulate([first, *[later] * (len(copy.tokens) - 1)], mul))))
        return drafts

    def _chance(self, copy: Copy) -> float:
        """That its first token holds."""
        return self._first[copy.size, copy.rank].given(0.05 if copy.rank else min(0.15 * copy.size, 0.6))

    def _settle(self, row: Sequence) -> Fortune:
        """Count how the row's last copies fared against what came, verified or not."""
        fortune = self._fortunes.setdefault(row, Fortune())
        if proposed := self._proposed.pop(row, None):
            came = row.tokens(proposed.position, row.length)
            for copy in proposed.copies:
                held = [drafted == token for drafted, token in zip(copy.tokens, came, strict=False)]
                self._first[copy.size, copy.rank].count(held[0])
                if copy is proposed.copies[0]:
                    fortune.count(held[0], proposed.chance)
                for before, at in zip(accumulate(held, and_), held[1:], strict=False):
                    if before:
                        self._later[copy.size].count(at)
        return fortune
