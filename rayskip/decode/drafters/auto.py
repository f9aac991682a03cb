"""Chooses at every step what to draft, how much, and whether at all: what gains the most tokens per second.

One value. A step gains a token a row, and each drafted token with the chance that it holds. It takes the price of a
forward over its tokens (costs.py), prompts aside, and the seconds of drafting. So a token is worth the seconds in
which the step gains one, and a draft pays if its tokens are worth more than what they add to the step (value.py).

One decision. What pays is drafted, the cheapest kind first:

- Copies (copies.py). A look-up of a row's newest tokens takes little, but the whole batch waits for it. Of what
  look-ups find, the likeliest tokens of all rows are verified, as many as pay.
- A round of Kangaroo's (rounds.py), for the rows whose copies are likely enough to fail.
- Nothing, where neither pays: in a full batch, whose forward takes longer with every token.

One feedback. Every belief begins as a prior and fades: how often copies hold, by how much of the text they follow;
what a look-up gains in this row, and takes; how many of Kangaroo's tokens hold, and what a round takes; what a
forward takes. Verdicts and the clock correct them. What does not seem to pay (a look-up, a verification, a round, a
step without drafts) must be tried now and then, or nothing is learnt of it: a small share of the time is set aside
for what trials are expected to lose. So cheap ones come often and dear ones seldom, and no more is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from torch import Tensor

from rayskip.config import AutoDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.copies import Copies
from rayskip.decode.drafters.costs import StepCosts
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.drafters.kangaroo import KangarooDrafter
from rayskip.decode.drafters.lookup import LOOKUP
from rayskip.decode.drafters.rounds import Rounds
from rayskip.decode.drafters.value import Plan, Savings
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache


class AutoDrafter(Drafter):
    def __init__(
        self,
        config: AutoDraft,
        costs: StepCosts,
        kangaroo: KangarooDrafter | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.most_tokens = config.tokens + (0 if kangaroo is None else kangaroo.most_tokens)
        self._costs = costs
        self._kangaroo = kangaroo
        self._clock = clock
        self._copies = Copies(config, clock)
        self._rounds = None if kangaroo is None else Rounds(kangaroo, clock)
        self._resting = Savings()
        # of the step under way
        self._decodes_only, self._drafting = False, False
        self._price, self._layers_left, self._drafted = 0.0, 1.0, 0.0

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        self._decodes_only, self._drafting = all(chunk.generated for chunk in chunks), False
        states = self._draft(chunks, rows, cache) if rows else None
        self._layers_left = 1.0 if states is None or self._kangaroo is None else 1 - self._kangaroo.share
        self._drafted = self._clock()
        return states

    def _draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        nothing = Plan.of_nothing(self._costs, len(rows), sum(chunk.stop - chunk.start for chunk in chunks))
        copies, plan = self._copies.plan(rows, nothing)
        left = dict.fromkeys(rows, 1.0)
        for proposal in copies:
            left[proposal.row] -= proposal.chances[0]
        planned = self._rounds.plan(left, plan) if self._rounds else None
        lost = nothing.loss(planned.plan if planned else plan)
        self._resting.save(nothing.seconds)
        self._drafting = lost <= 0 or not self._resting.afford(lost)
        if not self._drafting:
            return None
        for proposal in copies:
            proposal.row.draft.add_chain(proposal.tokens[: proposal.row.draft_places], LOOKUP)
        added = plan.tokens - nothing.tokens
        self._price = (plan.seconds - nothing.seconds) / nothing.each / added if added else 0.0
        return self._rounds.draft(planned, chunks, cache) if self._rounds and planned else None

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: Tensor) -> None:
        if self._decodes_only:  # a prompt's tokens cost otherwise: they share their row's keys
            seconds = self._clock() - self._drafted  # of the forward, and of choosing its tokens
            tokens = sum(1 + len(row.draft) for row in verdicts)
            self._costs = self._costs.learn(tokens, seconds / self._layers_left)
        if self._drafting:
            self._copies.observe(verdicts, self._price)
        if self._rounds:
            self._rounds.observe(verdicts)
        if self._kangaroo is not None:
            self._kangaroo.observe(verdicts, hidden)
