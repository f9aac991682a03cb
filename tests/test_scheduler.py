"""The scheduler without a model: every token once, limits kept, prefixes copied, slots never shared."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from rayskip.config import SamplingParams
from rayskip.data.records import Prompt
from rayskip.decode.sequence import Sequence
from rayskip.engine.scheduler import Scheduler

ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 6)),
    min_size=1,
    max_size=20,
)


def _sequence(number: int, prompt: list[int], tokens: int) -> Sequence:
    return Sequence(number, Prompt(number, prompt, SamplingParams(max_tokens=tokens), 0), 0, 128, 128)


@settings(deadline=None)
@given(ROWS, st.integers(1, 6), st.integers(4, 40), st.integers(1, 6))
def test_every_token_runs_once_within_the_limits(
    rows: list[tuple[list[int], int]], max_rows: int, max_tokens: int, cohort: int
) -> None:
    waiting = deque(_sequence(number, *row) for number, row in enumerate(rows))
    every = list(waiting)
    scheduler = Scheduler(max_rows, max_tokens, 4 * 128, cohort, waiting)
    cache: dict[int, list[int]] = {}  # what each slot holds
    for _ in range(10_000):
        plan = scheduler.schedule(share=max_rows)
        if not plan.chunks:
            break
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks) <= max(max_tokens, max_rows)
        slots = [row.slot for row in scheduler.running]
        assert len(set(slots)) == len(slots) <= min(max_rows, 4)
        for copy in plan.copies:
            cache[copy.target] = cache[copy.source][: copy.length]
        for chunk in plan.chunks:
            row = chunk.sequence
            held = cache.get(row.slot, [])[: chunk.start]
            cache[row.slot] = held + row.tokens(chunk.start, chunk.stop)
            assert cache[row.slot] == row.tokens(0, chunk.stop)
            row.computed = chunk.stop
        for chunk in plan.chunks:
            if chunk.last:
                chunk.sequence.generated.append(1)
        ended = [row.slot for row in scheduler.running if len(row.generated) == row.params.max_tokens]
        scheduler.retire(set(ended))
    assert not waiting
    assert not scheduler.running
    assert all(len(row.generated) == row.params.max_tokens for row in every)


def test_a_cohort_begins_to_decode_together() -> None:
    waiting = deque(_sequence(number, [number] * 30, 4) for number in range(6))
    scheduler = Scheduler(6, 60, 6 * 128, 6, waiting)
    positions = []
    for _ in range(6):
        plan = scheduler.schedule(share=6)
        positions.append({len(chunk.sequence.generated) for chunk in plan.chunks})
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
            if chunk.last:
                chunk.sequence.generated.append(1)
    assert positions == [{0}, {0}, {0}, {1}, {2}, {3}]


def test_a_shared_prefix_is_prefilled_once() -> None:
    preamble = list(range(100))
    waiting = deque(_sequence(number, [*preamble, 200 + number], 1) for number in range(5))
    scheduler = Scheduler(8, 1000, 10_000, 1, waiting)
    first = scheduler.schedule(share=8)
    assert [(chunk.start, chunk.stop) for chunk in first.chunks] == [(0, 101)]
    first.chunks[0].sequence.computed = 101
    second = scheduler.schedule(share=8)
    assert second.reused == 4 * 100
    assert [(chunk.start, chunk.stop) for chunk in second.chunks[-4:]] == [(100, 101)] * 4


def test_the_cache_keeps_its_limit_when_a_long_row_joins_short_ones() -> None:
    """A shape of many short rows gives way to one of few long ones, and comes back."""

    def sequence(number: int, reserved: int, tokens: int) -> Sequence:
        return Sequence(
            number, Prompt(number, [number], SamplingParams(max_tokens=tokens), 0), 0, reserved, reserved
        )

    limit = 8 * 128
    rows = [sequence(number, 128, 2 + number % 3) for number in range(8)]
    rows += [sequence(8, 512, 3), *(sequence(number, 128, 2) for number in range(9, 30))]
    waiting = deque(rows)
    scheduler = Scheduler(8, 100, limit, 1, waiting)
    shapes, held = [], {}
    while (plan := scheduler.schedule(share=8)).chunks:
        if plan.resize:
            shapes.append((plan.resize.slots, plan.resize.length))
            assert plan.resize.slots * plan.resize.length <= limit
            held = {new: held[old] for new, old in enumerate(plan.resize.kept)}
        for chunk in plan.chunks:
            row = chunk.sequence
            assert held.setdefault(row.slot, row.request_id) == row.request_id
            assert row.slot < shapes[-1][0]
            assert row.reserved <= shapes[-1][1]
            row.computed = chunk.stop
            row.generated.append(1)
        ended = {row.slot for row in scheduler.running if len(row.generated) == row.params.max_tokens}
        held = {slot: row for slot, row in held.items() if slot not in ended}
        scheduler.retire(ended)
    assert shapes == [(8, 128), (2, 512), (8, 128)]
    assert all(len(row.generated) == row.params.max_tokens for row in rows)
