"""Dispatch, driven by hand and by hypothesis: no clock, no pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayskip.data.records import Shard
from rayskip.driver.retry import MAX_FAILED_STARTS, MAX_LOST_ROWS, Assign, Dispatch, Kill, Start
from rayskip.errors import JobFailed
from rayskip.pool import LOOK_AHEAD


def shards(count: int) -> list[Shard]:
    return [Shard(i, "/data/a.jsonl", "a.jsonl", i * 10, i * 10 + 10) for i in range(count)]


def dispatch(count: int, replicas: tuple[int, int] = (1, 1), attempts: int = 3) -> Dispatch:
    return Dispatch(shards(count), replicas, attempts, shard_timeout_s=60)


def begin(state: Dispatch, replicas: int) -> None:
    """Start replicas 0, 1, … and let them load."""
    assert state.decide(0) == [Start()] * replicas
    for replica in range(replicas):
        state.started(replica, 0)
        state.became_ready(replica, 0)


def assigned(state: Dispatch, now: float = 0) -> list[tuple[int, int]]:
    return [(x.replica, x.shard.index) for x in state.decide(now) if isinstance(x, Assign)]


def test_look_ahead_spreads_before_it_deepens() -> None:
    state = dispatch(3, replicas=(1, 2))
    begin(state, 2)
    assert assigned(state) == [(0, 0), (1, 1), (0, 2)]
    assert not state.finished
    for replica, shard in [(0, 0), (1, 1), (0, 2)]:
        state.done(replica, shard, 1)
    assert state.finished
    assert state.decide(1) == []


def test_look_ahead_leaves_a_loading_replica_its_first_shard() -> None:
    state = dispatch(3, replicas=(1, 2))
    assert state.decide(0) == [Start(), Start()]
    for replica in range(2):
        state.started(replica, 0)
    state.became_ready(0, 0)
    assert assigned(state) == [(0, 0), (0, 1)]
    assert assigned(state) == []
    state.became_ready(1, 1)
    assert assigned(state, 1) == [(1, 2)]


def test_no_replica_is_started_that_would_find_no_shard() -> None:
    assert dispatch(2, replicas=(1, 8)).decide(0) == [Start(), Start()]


def test_a_lost_replica_is_replaced_and_its_shards_run_last_and_alone() -> None:
    state = dispatch(4)
    begin(state, 1)
    assert assigned(state) == [(0, 0), (0, 1)]
    state.lost(0, "killed")
    assert state.decide(1) == [Start()]
    state.started(1, 1)
    state.became_ready(1, 1)
    assert assigned(state, 1) == [(1, 2), (1, 3)]
    state.done(1, 2, 1)
    assert assigned(state, 1) == []
    state.done(1, 3, 1)
    assert assigned(state, 1) == [(1, 0)]
    assert assigned(state, 1) == []
    state.done(1, 0, 1)
    assert assigned(state, 1) == [(1, 1)]
    assert state.retries == 2


def test_a_passing_fault_keeps_the_replica() -> None:
    state = dispatch(1, attempts=2)
    begin(state, 1)
    assert assigned(state) == [(0, 0)]
    state.failed(0, 0, "503", 1)
    assert assigned(state, 1) == [(0, 0)]
    with pytest.raises(JobFailed, match="503"):
        state.failed(0, 0, "503", 2)


def test_a_hanging_replica_is_killed_once_and_its_shard_redone() -> None:
    state = dispatch(1)
    begin(state, 1)
    assert assigned(state, 100) == [(0, 0)]
    assert state.decide(160) == []
    assert state.decide(161) == [Kill(0), Start()]
    state.started(1, 161)
    assert state.decide(162) == []
    assert state.decide(222) == [Kill(1), Start()]


def test_replicas_that_die_loading_fail_the_job_once_none_works() -> None:
    state = dispatch(9, replicas=(2, 3))
    assert state.decide(0) == [Start()] * 3
    for replica in range(3):
        state.started(replica, 0)
    state.became_ready(0, 0)
    state.became_ready(1, 0)
    for attempt in range(MAX_FAILED_STARTS):
        state.lost(2 + attempt, "no memory")
        if attempt + 1 < MAX_FAILED_STARTS:
            assert Start() in state.decide(0)
            state.started(3 + attempt, 0)
    assert Start() not in state.decide(0)
    state.lost(0, "preempted")
    assert Start() in state.decide(0)
    state.started(9, 0)
    state.lost(9, "no memory")
    state.lost(1, "preempted")
    assert Start() in state.decide(0)
    state.started(10, 0)
    with pytest.raises(JobFailed, match="no memory"):
        state.lost(10, "no memory")


def test_a_replica_that_generates_does_not_hang() -> None:
    state = dispatch(2)
    begin(state, 1)
    assert assigned(state)
    state.progressed(0, 50)
    assert Kill(0) not in state.decide(100)
    assert Kill(0) in state.decide(111)


def test_a_replica_with_room_for_many_shards_leaves_others_their_share() -> None:
    state = dispatch(9, replicas=(2, 2))
    for replica in (0, 1):
        state.started(replica, 0)
    state.became_ready(0, 0, places=7)
    assert assigned(state) == [(0, shard) for shard in range(5)]
    state.became_ready(1, 1, places=3)
    assert assigned(state) == [(1, 5), (1, 6), (1, 7)]
    state.done(0, 0, 2)
    assert assigned(state) == []  # eight are left, four of them here
    state.done(1, 5, 2)
    assert assigned(state) == [(1, 8)]


def test_after_stop_nothing_is_assigned_or_started() -> None:
    state = dispatch(5)
    begin(state, 1)
    assert len(assigned(state)) == LOOK_AHEAD
    state.stop()
    state.lost(0, "killed")
    assert state.decide(1) == []
    assert state.in_flight == 0


class Fleet:
    """Replicas that end over the rows of `poison`, as `Dispatch` sees them. killed: so many did."""

    def __init__(self, state: Dispatch, poison: set[int]) -> None:
        self.state, self.poison = state, poison
        self.killed = self.runs = 0
        self.lost: dict[int, set[int]] = {}  # committed shard -> the rows it leaves out

    def run(self) -> None:
        next_replica = 0
        while not self.state.finished:
            held: dict[int, list[Shard]] = {}
            for instruction in self.state.decide(0):
                match instruction:
                    case Start():
                        self.state.started(next_replica, 0)
                        self.state.became_ready(next_replica, 0)
                        next_replica += 1
                    case Assign(replica, shard):
                        held.setdefault(replica, []).append(shard)
            for replica, shards in held.items():
                self.generate(replica, shards)

    def generate(self, replica: int, shards: list[Shard]) -> None:
        for shard in shards:
            self.runs += 1
            left_out = {row for row, _ in shard.lost}
            if self.poison & set(range(shard.start, shard.stop)) - left_out:
                self.killed += 1
                self.state.lost(replica, "signal 11")
                return
            if not self.state.done(replica, shard.index, 0).probe:
                assert shard.index not in self.lost
                self.lost[shard.index] = left_out


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    attempts=st.integers(1, 4),
    replicas=st.integers(1, 3),
    data=st.data(),
)
def test_rows_that_end_replicas_are_found_and_only_they(
    sizes: list[int], attempts: int, replicas: int, data: st.DataObject
) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    cut = [
        Shard(index, "f", "f", start, start + size)
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    poison: set[int] = set()
    for shard in cut:
        rows = st.integers(shard.start, shard.stop - 1)
        poison |= data.draw(st.sets(rows, max_size=min(MAX_LOST_ROWS, 4)))
    fleet = Fleet(Dispatch(cut, (1, replicas), attempts, shard_timeout_s=60), poison)
    fleet.run()
    assert fleet.lost == {shard.index: poison & set(range(shard.start, shard.stop)) for shard in cut}
    longest = max(sizes)
    # Its own deaths are a shard's; its neighbour on the replica may add one to the first, that it was innocent of.
    assert fleet.killed <= len(poison) * (attempts + (longest - 1).bit_length()) + (attempts == 1) * len(
        poison
    )


def test_three_rows_of_one_shard_within_the_bound() -> None:
    fleet = Fleet(Dispatch([Shard(0, "f", "f", 0, 256)], (1, 1), 4, shard_timeout_s=60), {0, 100, 255})
    fleet.run()
    assert fleet.lost == {0: {0, 100, 255}}
    assert 4 < fleet.killed <= 4 + 8 + 2 * (1 + 8)
    assert fleet.runs <= 4 + 3 * (8 + 2)  # halves, and not one row after the other


def test_a_shard_of_which_every_row_ends_replicas_fails_the_job_after_all_others() -> None:
    state = dispatch(3, attempts=2)
    fleet = Fleet(state, set(range(10)))
    with pytest.raises(
        JobFailed, match=r"shard 0 \(rows 0 to 9 of a\.jsonl\) ends every replica; rows 0, 1, .* do"
    ):
        fleet.run()
    assert fleet.lost == {1: set(), 2: set()}


def test_deaths_that_no_row_is_to_blame_for_blame_none() -> None:
    """Machines that are taken away while a shard happens to run: the search ends in vain, and twice is enough."""
    state = dispatch(1, attempts=2)
    for replica in range(100):
        assert state.decide(0) == [Start()]
        state.started(replica, 0)
        state.became_ready(replica, 0)
        while (run := next(x.shard for x in state.decide(0) if isinstance(x, Assign))).probe:
            assert run.lost == ()
            state.done(replica, 0, 0)
        assert (run.start, run.stop, run.lost) == (0, 10, ())
        if replica == 4:
            break
        if replica == 3:
            with pytest.raises(JobFailed, match="none of its rows does so alone"):
                state.lost(replica, "preempted")
            return
        state.lost(replica, "preempted")
    raise AssertionError("the job went on for ever")


class Runs(RuleBasedStateMachine):
    """Any order of loading, finishing, failing and dying ends with every shard done exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 7
        self.state = Dispatch(shards(self.total), (1, 3), 10**6, shard_timeout_s=10**6)
        self.held: dict[int, list[int]] = {}
        self.loading: set[int] = set()
        self.done: list[int] = []
        self.next = 0

    @rule()
    def decide(self) -> None:
        for instruction in self.state.decide(0):
            match instruction:
                case Assign(replica, shard):
                    assert replica not in self.loading
                    self.held[replica].append(shard.index)
                    assert len(self.held[replica]) <= LOOK_AHEAD
                case Start():
                    self.state.started(self.next, 0)
                    self.held[self.next] = []
                    self.loading.add(self.next)
                    self.next += 1

    @precondition(lambda self: self.loading)
    @rule()
    def load(self) -> None:
        self.state.became_ready(self.loading.pop(), 0)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: st.DataObject, fails: bool) -> None:
        replica, shard = data.draw(st.sampled_from([(r, s) for r, held in self.held.items() for s in held]))
        self.held[replica].remove(shard)
        if fails:
            self.state.failed(replica, shard, "busy", 0)
        else:
            assert self.state.done(replica, shard, 0).index == shard
            self.done.append(shard)

    @precondition(lambda self: self.held.keys() - self.loading)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.held.keys() - self.loading)))
        del self.held[replica]
        self.state.lost(replica, "killed")

    @invariant()
    def a_shard_is_done_or_in_one_place(self) -> None:
        held = [shard for shards in self.held.values() for shard in shards]
        assert len(held) == len(set(held)) == self.state.in_flight
        assert not set(held) & set(self.done)
        assert len(self.done) == len(set(self.done))
        assert self.state.finished == (len(self.done) == self.total)

    def teardown(self) -> None:
        """From wherever it got to, the run can be finished."""
        while not self.state.finished:
            self.decide()
            while self.loading:
                self.load()
            for replica, held in self.held.items():
                for shard in list(held):
                    held.remove(shard)
                    self.state.done(replica, shard, 0)
                    self.done.append(shard)
        assert sorted(self.done) == list(range(self.total))


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
