"""What the driver asks of a pool of replicas, and what it hears back.

Does not know how replicas run: Ray actors (`cluster/ray_pool.py`) and in-process threads
(`cluster/local_pool.py`) are both pools. Sits below cluster/ and driver/, which may not import each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rayskip.data.records import Shard, ShardResult

LOOK_AHEAD = 2
"""Fewest shards a replica holds at once: one is read, tokenized or written while another generates, so that the
batch never drains at a shard's end."""

MOST_AHEAD = 32
"""Most of them, where it takes several to fill the batch."""


@dataclass(frozen=True)
class ReplicaInfo:
    """A replica that has loaded. load_s: seconds its engine took. hardware, engine: facts for the report.
    batch_rows: generations that its engine has room for at once."""

    load_s: float
    hardware: dict[str, Any]
    engine: dict[str, Any]
    batch_rows: int = 1


@dataclass(frozen=True)
class ReplicaProgress:
    """What a replica did since it started: input rows finished and tokens generated, committed or not; while it
    loads, what it is at."""

    rows: int
    completion_tokens: int
    loading: str = ""


@dataclass(frozen=True)
class Ready:
    """A replica has loaded and takes shards."""

    replica: int
    info: ReplicaInfo


@dataclass(frozen=True)
class Alive:
    """A replica's counters moved on, or at least it answered."""

    replica: int
    progress: ReplicaProgress


@dataclass(frozen=True)
class Done:
    """A shard's output file is there."""

    replica: int
    result: ShardResult


@dataclass(frozen=True)
class Failed:
    """A shard raised; the replica lives. A Retryable error is worth another attempt, any other is not."""

    replica: int
    shard: int
    error: Exception


@dataclass(frozen=True)
class Lost:
    """A replica is gone with all its shards: its process died, or a call of it raised ReplicaLost."""

    replica: int
    reason: str


Event = Ready | Alive | Done | Failed | Lost


class Replica(Protocol):
    """A replica as a pool sees it; `cluster.replica.Replica` is the real one."""

    def ready(self) -> ReplicaInfo:
        """Load the engine. Raises ModelError for a checkpoint that cannot be loaded."""

    def run(self, shard: Shard) -> ShardResult:
        """Generate a shard and write its output file. Up to MOST_AHEAD threads call it at once.

        Raises ReplicaLost when the engine died: the replica is of no more use.
        """

    def progress(self) -> ReplicaProgress:
        """Counters since the start; answers while `ready` or `run` is under way."""


class Pool(Protocol):
    """A set of replicas, each with an id that is never used twice."""

    def start(self) -> int:
        """Start a replica and return its id at once; Ready or Lost follows."""

    def submit(self, replica: int, shard: Shard) -> None:
        """Hand a ready replica a shard; Done, Failed or Lost follows."""

    def wait(self, timeout_s: float) -> list[Event]:
        """Events since the last call; blocks up to `timeout_s` for the first. Lost is a replica's last.

        Raises the error of a replica that could not load for a reason no other replica would escape
        (a UserError, or a defect).
        """

    def kill(self, replica: int) -> None:
        """End a replica now, whatever it does; no event of it follows."""

    def close(self) -> None:
        """End all replicas and free what the pool holds."""
