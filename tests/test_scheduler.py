"""The scheduler without a model: every token once, limits kept, prefixes taken over, no page shared by mistake."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rayskip.config import NoSkip, SamplingParams, SkipDecodeSkip
from rayskip.data.records import Prompt
from rayskip.decode.sequence import Sequence
from rayskip.engine.scheduler import Scheduler, Shared, StepPlan, layer_order
from rayskip.model.cache.blocks import BlockPool
from rayskip.skip import SkipPolicy, skip_policy

SIZE = 16
LAYERS = 4
FULL = skip_policy(NoSkip(), LAYERS)
SKIPPING = skip_policy(SkipDecodeSkip(kind="skipdecode", max_layers=3, min_layers=1, horizon=12), LAYERS)
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(1, 40)),
    min_size=1,
    max_size=20,
)
ALIKE = st.lists(
    st.tuples(
        st.lists(st.sampled_from([(0,) * 20, (1,) * 7, (2,) * 40, (3,)]), min_size=1, max_size=3).map(
            lambda parts: [token for part in parts for token in part]
        ),
        st.integers(1, 30),
    ),
    min_size=4,
    max_size=20,
)
"""Rows with beginnings in common."""


def _sequence(number: int, prompt: list[int], tokens: int, full_depth: bool = True) -> Sequence:
    limit = len(prompt) + tokens
    return Sequence(
        number, Prompt(number, prompt, SamplingParams(max_tokens=tokens), 0), 0, limit, full_depth
    )


def _scheduler(
    waiting: deque[Sequence],
    max_rows: int,
    max_tokens: int,
    blocks: int = 1000,
    cohort: int = 1,
    policy: SkipPolicy = FULL,
    drafts: int = 0,
    size: int = SIZE,
) -> Scheduler:
    shared = Shared(BlockPool(blocks * LAYERS, size), waiting)
    return Scheduler(max_rows, max_tokens, shared, layer_order(policy, 0), policy, cohort, drafts)


@dataclass
class _Cache:
    """What each page of each layer holds, by position: the tokens of its row so far."""

    table: dict[tuple[int, int, int], int] = field(default_factory=dict)
    pages: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    size: int = SIZE

    def run(self, plan: StepPlan, policy: SkipPolicy) -> None:
        self.begin(plan)
        self.end(plan, policy)

    def begin(self, plan: StepPlan) -> None:
        for own in plan.assignments:
            for layer in range(LAYERS):
                self.table.pop((layer, own.row, own.block), None)
            self.table |= {
                (layer, own.row, own.block): page for layer, page in zip(own.layers, own.pages, strict=True)
            }

    def check(self, plan: StepPlan, policy: SkipPolicy) -> None:
        """Whether all that the plan takes over is there."""
        copied = {target for copy in plan.copies for _, target in copy.pages}
        for copy in plan.copies:
            for source, _ in copy.pages:
                assert set(range(copy.count)) <= self.pages[source].keys()
        for chunk in plan.chunks:
            row = chunk.sequence
            for layer in policy.layers(row.skip_position(chunk.start)):
                for position in range(chunk.start):
                    page = self.table[layer, row.table_row, position // self.size]
                    if page not in copied:
                        assert self.pages[page][position % self.size] == tuple(row.tokens(0, position + 1))

    def end(self, plan: StepPlan, policy: SkipPolicy) -> None:
        for page in plan.clears:
            self.pages[page] = {}
        for copy in plan.copies:
            for source, target in copy.pages:
                self.pages[target] = {at: self.pages[source][at] for at in range(copy.count)}
        for chunk in plan.chunks:
            row = chunk.sequence
            for position in range(chunk.start, chunk.stop):
                block, within = divmod(position, self.size)
                so_far = tuple(row.tokens(0, position + 1))
                for layer in policy.layers(row.skip_position(position)):
                    page = self.pages.setdefault(self.table[layer, row.table_row, block], {})
                    page[within] = so_far
                    for earlier in range(position):
                        at = self.pages[self.table[layer, row.table_row, earlier // self.size]]
                        assert at[earlier % self.size] == so_far[: earlier + 1]


@settings(deadline=None)
@given(ROWS, st.integers(1, 6), st.integers(4, 40), st.integers(1, 6), st.integers(8, 20), st.booleans())
def test_every_token_runs_once_within_the_limits(
    rows: list[tuple[list[int], int]],
    max_rows: int,
    max_tokens: int,
    cohort: int,
    blocks: int,
    skipping: bool,
) -> None:
    """Also where pages run out, and rows give theirs up and begin anew; and a layer has what a token that runs it
    sees."""
    policy = SKIPPING if skipping else FULL
    waiting = deque(_sequence(number, *row, full_depth=not skipping) for number, row in enumerate(rows))
    scheduler = _scheduler(waiting, max_rows, max_tokens, blocks, cohort, policy)
    cache, done = _Cache(), dict[int, int]()
    for _ in range(10_000):
        plan = scheduler.schedule(share=max_rows)
        if not plan.chunks:
            break
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= max(max_tokens, max_rows)
        table_rows = [row.table_row for row in scheduler.running]
        assert len(set(table_rows)) == len(table_rows) <= max_rows
        assert scheduler.pool.held <= blocks * LAYERS
        assert not any(chunk.sequence in plan.preempted for chunk in plan.chunks)
        cache.run(plan, policy)
        scheduler.settle(plan)
        for chunk in plan.chunks:
            if chunk.last:
                chunk.sequence.generated.append(len(chunk.sequence.generated) % 3)
        ended = [row for row in scheduler.running if len(row.generated) == row.params.max_tokens]
        for row in ended:
            done[row.request_id] = done.get(row.request_id, 0) + 1
        scheduler.retire(ended)
    assert not waiting
    assert not scheduler.running
    assert scheduler.pool.held == 0
    assert done == dict.fromkeys(range(len(rows)), 1)


@settings(deadline=None)
@given(ALIKE, st.integers(1, 4), st.integers(4, 60), st.integers(6, 16), st.booleans(), st.randoms())
def test_workers_that_share_their_pages_do_not_disturb_each_other(
    rows: list[tuple[list[int], int]],
    max_rows: int,
    max_tokens: int,
    blocks: int,
    skipping: bool,
    chance: Random,
) -> None:
    """What a step reads was there when it was planned, and still is when it ends, whatever the others' steps did
    meanwhile; and of workers that take each other's pages some goes on."""
    policy = SKIPPING if skipping else FULL
    waiting = deque(_sequence(number, *row, full_depth=not skipping) for number, row in enumerate(rows))
    size = 2 * SIZE  # a block whose beginning is worth copying
    shared = Shared(BlockPool(blocks * LAYERS, size), waiting)
    order = layer_order(policy, 0)
    schedulers = [Scheduler(max_rows, max_tokens, shared, order, policy, 1) for _ in range(3)]
    pages: dict[int, dict[int, tuple[int, ...]]] = {}
    caches = [_Cache({}, pages, size) for _ in schedulers]
    running: dict[int, StepPlan] = {}
    done, idle = dict[int, int](), 0
    for _ in range(10_000):
        for worker, scheduler in enumerate(schedulers):
            if worker not in running and (plan := scheduler.schedule(share=max_rows)).chunks:
                caches[worker].begin(plan)
                caches[worker].check(plan, policy)
                running[worker] = plan
        idle = 0 if running else idle + 1
        if idle > 1:
            break
        if not running:
            continue
        worker = chance.choice(list(running))
        plan, scheduler = running.pop(worker), schedulers[worker]
        caches[worker].end(plan, policy)
        scheduler.settle(plan)
        for chunk in plan.chunks:
            if chunk.last:
                chunk.sequence.generated.append(len(chunk.sequence.generated) % 3)
        ended = [row for row in scheduler.running if len(row.generated) == row.params.max_tokens]
        for row in ended:
            done[row.request_id] = done.get(row.request_id, 0) + 1
        scheduler.retire(ended, [row for row in ended if chance.random() < 0.5])
    assert not waiting
    assert not shared.running
    assert shared.pool.held == 0
    assert done == dict.fromkeys(range(len(rows)), 1)


def test_a_cohort_begins_to_decode_together() -> None:
    waiting = deque(_sequence(number, [number] * 30, 4) for number in range(6))
    scheduler = _scheduler(waiting, 6, 60, cohort=6)
    positions = []
    for _ in range(6):
        plan = scheduler.schedule(share=6)
        positions.append({len(chunk.sequence.generated) for chunk in plan.chunks})
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
            if chunk.last:
                chunk.sequence.generated.append(1)
    assert positions == [{0}, {0}, {0}, {1}, {2}, {3}]


def test_a_shared_prefix_is_prefilled_once_and_outlives_its_row() -> None:
    preamble = list(range(100))
    waiting = deque(_sequence(number, [*preamble, 200 + number], 1) for number in range(5))
    scheduler = _scheduler(waiting, 8, 1000)
    first = scheduler.schedule(share=8)
    assert [(chunk.start, chunk.stop) for chunk in first.chunks] == [(0, 101)]
    row = first.chunks[0].sequence
    row.computed = 101
    second = scheduler.schedule(share=8)
    whole = 100 // SIZE * SIZE  # what is left of the last block is too little to copy
    assert second.reused == 4 * whole
    assert [(chunk.start, chunk.stop) for chunk in second.chunks[-4:]] == [(whole, 101)] * 4
    held = scheduler.pool.held
    assert held == (100 // SIZE + 5) * LAYERS  # its blocks once, and a last one of each row
    scheduler.retire(list(scheduler.running))
    waiting.append(_sequence(9, [*preamble, 300], 1))
    third = scheduler.schedule(share=8)
    assert [(chunk.start, chunk.stop) for chunk in third.chunks] == [(whole, 101)]


def test_samples_of_one_prompt_copy_its_last_block() -> None:
    waiting = deque(_sequence(number, list(range(47)), 4) for number in range(3))
    scheduler = _scheduler(waiting, 8, 1000, size=64)
    (chunk,) = scheduler.schedule(share=8).chunks
    chunk.sequence.computed = 47
    plan = scheduler.schedule(share=8)
    assert plan.reused == 2 * 46
    assert [(len(copy.pages), copy.count) for copy in plan.copies] == [(LAYERS, 46)] * 2
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks[-2:]] == [(46, 47)] * 2


def test_a_long_limit_takes_no_places() -> None:
    """Rows are admitted by the pages that they need now, not by what they may come to have."""
    waiting = deque(_sequence(number, [number] * 10, 100_000) for number in range(8))
    scheduler = _scheduler(waiting, 8, 1000, blocks=16)
    assert len(scheduler.schedule(share=8).chunks) == 8


def test_layers_that_no_later_position_runs_take_no_pages() -> None:
    row = _sequence(0, [5] * SIZE, 5 * SIZE, full_depth=False)
    scheduler = _scheduler(deque([row]), 1, 100, policy=SKIPPING)
    while (plan := scheduler.schedule(share=1)).chunks:
        row.computed = plan.chunks[0].stop
        row.generated.append(1)
        if len(row.generated) == row.params.max_tokens:
            break
    assert [len(block.pages) for block in row.blocks] == [4, 1, 1, 1, 1, 1]  # the prompt's can still be found
    assert scheduler.pool.held == 6


def test_a_draft_gets_places_only_where_there_are_some_to_spare() -> None:
    waiting = deque(_sequence(number, [number] * SIZE, 40) for number in range(2))
    scheduler = _scheduler(waiting, 2, 100, blocks=5, drafts=SIZE)
    for _ in range(2):
        for chunk in scheduler.schedule(share=2).chunks:
            chunk.sequence.computed = chunk.stop
            chunk.sequence.generated.append(1)
    first, second = scheduler.running
    assert (first.places, second.places) == (3 * SIZE, 2 * SIZE)
    assert second.draft_places < SIZE


def test_a_prompt_of_which_a_row_runs_few_layers_is_found_again_until_its_pages_are_wanted() -> None:
    """SKIPPING goes from 3 layers to 1 within 12 tokens; a prompt's run all 4."""
    prompt = list(range(3 * SIZE + 1))
    first = _sequence(0, prompt, 20, full_depth=False)
    scheduler = _scheduler(deque([first]), 2, 100, blocks=8, policy=SKIPPING)
    for _ in range(20):
        for chunk in scheduler.schedule(share=2).chunks:
            chunk.sequence.computed = chunk.stop
            chunk.sequence.generated.append(1)
    assert scheduler.pool.held == len(first.blocks) == 5
    assert len(scheduler.pool.match(np.asarray(prompt)).blocks) == 3
    scheduler.waiting.append(_sequence(1, [7] * 70, 1))  # 20 pages, where 15 of 32 were never taken
    plan = scheduler.schedule(share=2)
    assert (plan.admitted, plan.preempted) == (1, [])
    assert len(scheduler.pool.match(np.asarray(prompt)).blocks) == 2
