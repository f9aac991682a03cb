"""Which replica runs which shard, and what happens when one dies: events in, instructions out.

Pure decisions. Does not know pools, storage or signals, and never reads a clock: times are handed in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rayskip.data.records import Shard
from rayskip.errors import JobFailed, counted
from rayskip.pool import LOOK_AHEAD

# Replicas that may die while loading, one after the other, before the job does without them.
MAX_FAILED_STARTS = 3

# Rows of one shard that may each end replicas before it is held to be the model or the machine.
MAX_LOST_ROWS = 8


@dataclass(frozen=True)
class Start:
    """Start a replica, then tell `started`."""


@dataclass(frozen=True)
class Assign:
    """Hand this shard to this replica."""

    replica: int
    shard: Shard


@dataclass(frozen=True)
class Kill:
    """End this replica: it hangs."""

    replica: int


Instruction = Start | Assign | Kill


@dataclass
class _Replica:
    """since: when it last started or finished something, or was given its first shard; seconds. places: shards that
    it holds at most."""

    since: float
    places: int = LOOK_AHEAD
    ready: bool = False
    shards: list[Shard] = field(default_factory=list)


@dataclass
class _Search:
    """For the rows of a shard that end replicas, one after the other, by halves.

    lost: those found, and how each ended the last one. start, stop: where the next one is; known by the death of
    a replica that ran these rows, or because the rest of such rows was survived. vain: searches that found none.
    """

    whole: Shard
    start: int
    stop: int
    lost: dict[int, str] = field(default_factory=dict)
    vain: int = 0

    def probe(self) -> Shard:
        """The next to run: half of the rows, or the last one, which is to blame only if it ends a replica alone."""
        stop = max(self.start + 1, (self.start + self.stop) // 2)
        return replace(self.all_but_lost(), start=self.start, stop=stop, probe=True)

    def all_but_lost(self) -> Shard:
        """The shard without the rows found."""
        return replace(self.whole, lost=tuple(sorted(self.lost.items())))


class Dispatch:
    """The state of a run's shards and replicas.

    A shard that was on a replica when it died is a suspect: it runs last and alone, so that a shard that
    kills replicas takes no others with it, and what never was in doubt is finished first. One that has had all its
    attempts is searched for the row at fault: with n rows, k attempts and m such rows, it ends at most
    m (k + ceil(log2 n)) replicas. Then it runs without them.
    """

    def __init__(
        self, shards: Iterable[Shard], replicas: tuple[int, int], max_attempts: int, shard_timeout_s: float
    ) -> None:
        self._pending = deque(shards)
        self._suspects: deque[Shard] = deque()
        self._replicas: dict[int, _Replica] = {}
        self._least, self._most = replicas
        self._max_attempts = max_attempts
        self._timeout_s = shard_timeout_s
        self._deaths: Counter[int] = Counter()  # of replicas, per shard that they ran
        self._faults: Counter[int] = Counter()
        self._searches: dict[int, _Search] = {}
        self._failed_starts = 0
        self._stopped = False
        self.retries = 0

    @property
    def in_flight(self) -> int:
        """Shards that replicas hold now."""
        return sum(len(replica.shards) for replica in self._replicas.values())

    @property
    def _left(self) -> int:
        return len(self._pending) + len(self._suspects) + self.in_flight

    @property
    def finished(self) -> bool:
        """No shard is left to run."""
        return not self._left

    @property
    def ready(self) -> int:
        """Replicas that have loaded."""
        return sum(replica.ready for replica in self._replicas.values())

    def stop(self) -> None:
        """Assign nothing more; what is in flight may finish."""
        self._stopped = True

    def decide(self, now: float) -> list[Instruction]:
        """What to do at time `now` (seconds, any origin). Raises JobFailed when there is no way on."""
        instructions: list[Instruction] = [Kill(replica) for replica in self._hanging(now)]
        for instruction in instructions:
            assert isinstance(instruction, Kill)
            self.lost(instruction.replica, self._why_hanging(instruction.replica))
        if not self._stopped:
            instructions += [Start()] * self._missing()
            instructions += self._assign(now)
        return instructions

    def started(self, replica: int, now: float) -> None:
        """A replica has been started, under this id."""
        self._replicas[replica] = _Replica(since=now)

    def became_ready(self, replica: int, now: float, places: int = LOOK_AHEAD) -> None:
        """A replica has loaded, and may hold so many shards."""
        self._failed_starts = 0
        self._replicas[replica].ready = True
        self._replicas[replica].places = places
        self._replicas[replica].since = now

    def progressed(self, replica: int, now: float) -> None:
        """A replica generates: it does not hang."""
        if replica in self._replicas:
            self._replicas[replica].since = now

    def done(self, replica: int, shard: int, now: float) -> Shard:
        """A replica finished a shard; returns it. Of a probe there is nothing to commit."""
        self._replicas[replica].since = now
        done = self._take_back(replica, shard)
        if done.probe:
            self._suspects.append(self._after_survived(done))
        else:
            self._searches.pop(shard, None)
        return done

    def failed(self, replica: int, shard: int, reason: str, now: float) -> None:
        """A shard failed in a way worth another attempt; its replica lives on. Raises JobFailed after too many."""
        self._replicas[replica].since = now
        failed = self._take_back(replica, shard)
        self._faults[shard] += 1
        if self._faults[shard] >= self._max_attempts:
            raise self._gave_up(
                failed, f"failed {counted(self._max_attempts, 'time')} (retry.max_shard_attempts)", reason
            )
        self.retries += 1
        (self._suspects if failed.probe else self._pending).append(failed)

    def lost(self, replica: int, reason: str) -> None:
        """A replica is gone; its shards go back. Raises JobFailed when there is no way on."""
        gone = self._replicas.pop(replica)
        if not gone.ready:
            self._failed_starts += 1
            if (
                self._failed_starts >= MAX_FAILED_STARTS
                and not self.ready
                and len(self._replicas) < min(self._least, self._left)
            ):
                raise JobFailed(
                    f"{counted(self._failed_starts, 'replica')} in a row died loading; the last: {reason}"
                )
        alone = len(gone.shards) == 1
        self.retries += len(gone.shards)
        self._suspects.extend(self._after_death(shard, alone, reason) for shard in gone.shards)

    def _after_death(self, shard: Shard, alone: bool, reason: str) -> Shard:
        """What to run after a shard that was on a replica when it died."""
        self._deaths[shard.index] += 1
        search = self._searches.get(shard.index)
        if search is None:
            if self._deaths[shard.index] < self._max_attempts:
                return shard
            search = self._searches[shard.index] = _Search(shard, shard.start, shard.stop)
        if search.vain >= self._max_attempts:
            raise self._gave_up(search.whole, "ends replicas, and none of its rows does so alone", reason)
        search.start, search.stop = shard.start, shard.stop
        if shard.rows > 1 or not alone:
            return search.probe()
        if shard.start in search.lost or len(search.lost) == MAX_LOST_ROWS:
            rows = ", ".join(map(str, sorted({*search.lost, shard.start})))
            raise self._gave_up(search.whole, f"ends every replica; rows {rows} do, each alone", reason)
        search.lost[shard.start] = reason
        return search.all_but_lost()

    def _after_survived(self, probe: Shard) -> Shard:
        """What to run after a probe that no replica died of: it is in the other half, or was no single row."""
        search = self._searches[probe.index]
        if probe.stop < search.stop:
            search.start = probe.stop
            return search.probe()
        search.vain += 1
        return search.all_but_lost()

    def _gave_up(self, shard: Shard, what: str, reason: str) -> JobFailed:
        return JobFailed(
            f"shard {shard.index} (rows {shard.start} to {shard.stop - 1} of {shard.name}) {what}; "
            f"the last: {reason}"
        )

    def _take_back(self, replica: int, index: int) -> Shard:
        held = self._replicas[replica].shards
        shard = next(shard for shard in held if shard.index == index)
        held.remove(shard)
        return shard

    def _hanging(self, now: float) -> list[int]:
        return [
            replica
            for replica, state in self._replicas.items()
            if (state.shards or not state.ready) and now - state.since > self._timeout_s
        ]

    def _why_hanging(self, replica: int) -> str:
        if self._replicas[replica].ready:
            return f"no progress in {self._timeout_s:g} s (retry.shard_timeout_s)"
        return (
            f"not ready after {self._timeout_s:g} s (retry.shard_timeout_s); "
            "does the cluster have the CPUs and GPUs that cluster asks for?"
        )

    def _missing(self) -> int:
        """Replicas to start: none that would find no shard, and after failed starts only the least."""
        wanted = self._most if self._failed_starts < MAX_FAILED_STARTS else self._least
        return max(0, min(wanted, self._left) - len(self._replicas))

    def _assign(self, now: float) -> list[Instruction]:
        """Fill every replica's first place before any second, so that the last shards spread out; of one that still
        loads, the first shard is kept for it, and of all no one gets more than its share."""
        assigned: list[Instruction] = []
        loading = len(self._replicas) - self.ready
        for place in range(max((state.places for state in self._replicas.values()), default=0)):
            for replica, state in self._replicas.items():
                if place and (len(self._pending) <= loading or place * len(self._replicas) >= self._left):
                    break
                room = state.ready and len(state.shards) == place < state.places
                if room and (shard := self._next_for(state)):
                    if not state.shards:
                        state.since = now
                    state.shards.append(shard)
                    assigned.append(Assign(replica, shard))
        return assigned

    def _next_for(self, state: _Replica) -> Shard | None:
        if any(self._deaths[shard.index] for shard in state.shards):
            return None
        if self._pending:
            return self._pending.popleft()
        return self._suspects.popleft() if self._suspects and not state.shards else None
