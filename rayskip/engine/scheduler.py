"""Which rows run in the next step, and in which pages. Pure bookkeeping: no tensors, no I/O.

Every step takes one token of every row that decodes, and as many prompt tokens as still fit. A row takes pages
when it reaches them. Where there are none left, the row that joined last gives its own up and begins anew later:
its tokens will be the same, since nothing but the row decides them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rayskip.decode.batch import Chunk
from rayskip.decode.constraints import MOST_FORCED
from rayskip.decode.sequence import Sequence
from rayskip.model.cache.blocks import SHARED, Block, BlockPool, Match
from rayskip.model.cache.kv_cache import Assignment
from rayskip.skip import SkipPolicy

FEWEST_TOKENS = 64
"""Tokens in a forward that are not halved any more where memory does not suffice."""


@dataclass
class Shared:
    """What the schedulers of an engine share, one for each worker. pool: of the pages. waiting: rows that have not
    started, taken from the left. running: the others, in the order in which they joined."""

    pool: BlockPool
    waiting: deque[Sequence]
    running: list[Sequence] = field(default_factory=list)


def layer_order(policy: SkipPolicy, extra_layers: int) -> list[int]:
    """Layers by how long the policy has them run; extra ones, after the model's, always do."""
    layers = len(policy.until)
    own = sorted(range(layers), key=lambda layer: -policy.until[layer])
    return [*range(layers, layers + extra_layers), *own]


@dataclass(frozen=True)
class Copy:
    """The first `count` positions of a block's pages are copied. pages: (from, to). source: held until then."""

    source: Block
    pages: list[tuple[int, int]]
    count: int


@dataclass
class StepPlan:
    """One step over a cache of `pages`: first pages are cleared, then come assignments, the copies and the chunks.

    clears: pages that may hold numbers which are not finite. copies: of blocks, see `Copy`. reused: prompt tokens
    that a shared prefix spares. admitted: rows that join. preempted: rows that ran and begin anew later. held:
    pages that its worker's rows hold, shared ones once; unfilled: positions in them without a token's keys and
    values after the step. spared: pages that rows do without, since none of their tokens from there on runs the
    layer: new blocks' and those given up.
    """

    pages: int
    clears: list[int] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    reused: int = 0
    admitted: int = 0
    preempted: list[Sequence] = field(default_factory=list)
    held: float = 0
    unfilled: float = 0
    spared: int = 0

    @property
    def prefills(self) -> bool:
        """Whether prompt tokens are among the chunks."""
        return any(not chunk.generated for chunk in self.chunks)


class Scheduler:
    """Continuous batching: rows join and leave between any two steps.

    max_rows: rows in flight. max_tokens: tokens in one forward. layers: that have pages, the one that runs longest
    first, see `layer_order`. cohort: places that must be free before rows join; those that join together share
    their positions, and so their layer sets. drafts: tokens of a row's draft for which it gets places where there
    are some.
    """

    def __init__(
        self,
        max_rows: int,
        max_tokens: int,
        shared: Shared,
        layers: Seq[int],
        policy: SkipPolicy,
        cohort: int,
        drafts: int = 0,
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max(max_tokens, max_rows)
        self.cohort = cohort
        self.waiting, self.pool = shared.waiting, shared.pool
        self.running: list[Sequence] = []
        self._shared, self._layers, self._policy, self._drafts = shared, layers, policy, drafts
        self._drafter_layers = len(layers) - len(policy.until)
        self._joining = False
        self._free_rows = list(range(max_rows - 1, -1, -1))

    def retire(self, finished: Collection[Sequence], unclean: Collection[Sequence] = ()) -> None:
        """Take rows out. unclean: those whose numbers may not be finite, which are read even if masked."""
        for row in finished:
            self._leave(row, row in unclean)

    @property
    def smallest(self) -> bool:
        """Whether it is not halved any more."""
        return self.max_rows == 1 and self.max_tokens <= FEWEST_TOKENS

    def halve(self) -> None:
        """Allow half as many rows and tokens, and have none; who has the pool resets it."""
        rows = min(self.max_rows, len(self.running) or self.max_rows)
        self.cohort = max(1, self.cohort * (rows // 2) // self.max_rows)
        self.max_rows = max(rows // 2, 1)
        self.max_tokens = max(self.max_tokens // 2, self.max_rows)
        self.running, self._free_rows = [], list(range(self.max_rows - 1, -1, -1))

    def schedule(self, share: int) -> StepPlan:
        """The next step: every decoding row, then as much prefill as the token budget allows.

        share: rows past which none is taken from the queue.
        """
        plan = StepPlan(self.pool.pages)
        budget = self.max_tokens
        self._joining = self._may_join(share)
        held = self._held(share)
        for row in list(self.running):
            if row not in held:
                budget -= self._extend(plan, row, budget)
        while self._joining and budget > 0 and self.waiting and self._has_row(share) and not plan.preempted:
            match = self.pool.match(self.waiting[0].prompt.token_array)
            if match.coming >= match.tokens + SHARED:
                break  # its prefix is being computed: join when it can be taken over
            if not self._admit(plan, match):
                break
            budget -= self._extend(plan, self.running[-1], budget)
        if not plan.chunks:
            for row in held:
                budget -= self._extend(plan, row, budget)
        if plan.chunks:
            plan.clears = self.pool.take_unclean(
                block for chunk in plan.chunks for block in chunk.sequence.blocks
            )
        else:
            self.pool.release([copy.source for copy in plan.copies])
        return plan

    def settle(self, plan: StepPlan) -> None:
        """What the plan computes and copies is there, for whoever plans from now on."""
        self.pool.release([copy.source for copy in plan.copies])
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
        # of all pages the worker's share by its rows, since workers' rows hold some together
        share = len(self.running) / max(len(self._shared.running), 1)
        plan.held, plan.unfilled = self.pool.held * share, self._unfilled * share

    @property
    def _unfilled(self) -> int:
        """Positions of the running rows' pages that no token has filled; those blocks are a row's own."""
        size = self.pool.size
        return sum(
            block.needed * (size - max(row.computed - block.start, 0))
            for row in self._shared.running
            for block in row.blocks[row.computed // size :]
        )

    def _held(self, share: int) -> dict[Sequence, None]:
        """Rows of a cohort that are prefilled wait for its others, so that all begin to decode in one step."""
        if self.cohort == 1:
            return {}
        joins = self._joining and bool(self.waiting) and self._has_row(share) and self._has_pages()
        if not joins and not any(row.prefilling for row in self.running):
            return {}
        return dict.fromkeys(row for row in self.running if len(row.generated) == 1)

    def _extend(self, plan: StepPlan, row: Sequence, budget: int) -> int:
        length = row.length
        if row.ended or length >= row.limit:
            return 0  # it has just given its pages up, or its last token is on its way
        stop = min(length, row.computed + budget)
        asked = 0 if row.tree is None else len(row.tree.draft)
        if asked and stop == length and stop - row.computed + asked > budget and plan.chunks:
            stop -= 1  # what is asked goes with the last token into a step with more room
        if stop <= row.computed:
            return 0
        self._give_up_layers(plan, row)
        if stop == length and row.tree is not None:
            row.draft = row.tree.draft
        if not self._reach(plan, row, stop + len(row.draft)):
            return 0
        drafts = self._drafts + (MOST_FORCED if row.matcher is not None else 0)
        if drafts and stop == length and row.generated:
            self._reach_further(plan, row, min(stop + drafts, row.limit + drafts))
        plan.chunks.append(Chunk(row, row.computed, stop))
        return stop - row.computed + len(row.draft)

    def _reach(self, plan: StepPlan, row: Sequence, stop: int) -> bool:
        """See that a row has pages for its tokens before `stop`; False: it had to give up those that it had."""
        while row.places < stop:
            block = self._take(row)
            if block is None:
                victim = self.running[-1]
                self._preempt(plan, victim)
                if victim is row:
                    return False
                continue
            self._append(plan, row, block)
        return True

    def _give_up_layers(self, plan: StepPlan, row: Sequence) -> None:
        """Pages of layers that a row runs no more, but for those of the token before, which may be on its way and
        not be finite. (What a drafter has missed it runs through layers that every token runs.)"""
        if self._policy.is_full:
            return
        layers = self._layers_at(row, row.computed - 1)
        if layers >= min(row.layers, len(self._layers)):
            return
        held = self.pool.held
        self.pool.need(row.blocks, row.layers, layers)
        plan.spared += held - self.pool.held
        row.layers = layers
        for at, block in enumerate(row.blocks):
            pages = block.pages[:layers]  # the newest may have fewer
            plan.assignments.append(Assignment(row.table_row, at, self._layers[: len(pages)], pages))

    def _reach_further(self, plan: StepPlan, row: Sequence, stop: int) -> None:
        """Pages for a draft, if there are some to spare."""
        while row.places < stop and (block := self._take(row)):
            self._append(plan, row, block)

    def _take(self, row: Sequence) -> Block | None:
        """A row's next block, if there are pages for it."""
        pages = self._pages_at(row)
        if pages + self._reserved > self.pool.available:
            return None
        return self.pool.take(pages, row.places, row.layers)

    @property
    def _reserved(self) -> int:
        """Pages that this worker leaves to another one's row, the first of all that run: a worker gives up none but
        its own rows, and two could have each other begin anew for ever."""
        first = self._shared.running[0]
        if self.running and self.running[0] is first:
            return 0
        places = first.limit + max(self._drafts, 0 if first.tree is None else len(first.tree.draft))
        blocks = -(-places // self.pool.size) - len(first.blocks)
        return max(blocks, 0) * len(self._layers)

    def _append(self, plan: StepPlan, row: Sequence, block: Block) -> None:
        before = row.blocks[-1] if row.blocks else None
        tokens = row.prompt.token_array[block.start : block.start + self.pool.size]
        if len(tokens):
            self.pool.offer(block, before, tokens, row)
        plan.spared += len(self._layers) - len(block.pages)
        self._enter(plan, row, block)

    def _enter(self, plan: StepPlan, row: Sequence, block: Block) -> None:
        """As a row's next block."""
        layers = self._layers[: len(block.pages)]
        plan.assignments.append(Assignment(row.table_row, len(row.blocks), layers, block.pages))
        row.blocks.append(block)
        row.places += self.pool.size

    def _pages_at(self, row: Sequence) -> int:
        """Of a row's next block: a layer has one if it runs for any token that may lie there. A draft's tokens lie
        behind the newest one, whatever their positions."""
        return self._layers_at(row, min(row.places, row.length - 1))

    def _layers_at(self, row: Sequence, position: int) -> int:
        """Layers that a row's token at a position runs, with those of the drafter's own."""
        return self._drafter_layers + self._policy.depth(row.skip_position(position))

    def _preempt(self, plan: StepPlan, row: Sequence) -> None:
        row.ended = True  # what a step on its way says of it comes too late
        self._leave(row)
        self.waiting.appendleft(row.anew())
        plan.preempted.append(row)

    def _leave(self, row: Sequence, unclean: bool = False) -> None:
        self.running.remove(row)
        self._shared.running.remove(row)
        self.pool.give_back(row, row.blocks, unclean, row.layers)
        row.blocks, row.places = [], 0
        self._free_rows.append(row.table_row)

    def _may_join(self, share: int) -> bool:
        """Once begun, a cohort joins over as many steps as its prefill takes."""
        free = min(self.max_rows, share) - len(self.running)
        return free > 0 and (self._joining or free >= min(self.cohort, len(self.waiting)) or not self.running)

    def _has_row(self, share: int) -> bool:
        return not self.running or len(self.running) < min(self.max_rows, share)

    def _has_pages(self, shared: int = 0) -> bool:
        """Whether the first waiting row's prompt, but for its first `shared` blocks, the prompts that run, and a
        block more of each row find pages."""
        if not self._shared.running:
            return True
        size = self.pool.size
        blocks = -(-(len(self.waiting[0].prompt.token_array) + 1) // size) - shared
        blocks += sum(max(-(-row.length // size) - len(row.blocks), 0) + 1 for row in self._shared.running)
        return blocks * len(self._layers) + self._reserved <= self.pool.available

    def _admit(self, plan: StepPlan, match: Match) -> bool:
        """The first waiting row joins if there are pages for it. It takes over what there is of its prompt."""
        row = self.waiting[0]
        held = [*match.blocks, *([match.tail] if match.tail else [])]
        self.pool.hold(held)
        if not self._has_pages(len(match.blocks)):
            self.pool.release(held)
            return False
        self.waiting.popleft()
        row.table_row = self._free_rows.pop()
        self.running.append(row)
        self._shared.running.append(row)
        plan.admitted += 1
        for block in match.blocks:
            self._enter(plan, row, block)
        if match.tail is not None:
            whole = len(row.blocks)
            if self._reach(plan, row, match.tokens):
                pages = list(zip(match.tail.pages, row.blocks[whole].pages, strict=False))
                plan.copies.append(Copy(match.tail, pages, match.tokens - whole * self.pool.size))
            else:
                self.pool.release([match.tail])
        row.computed, row.draft_cached = match.tokens, match.drafted
        plan.reused += match.tokens
        return True
