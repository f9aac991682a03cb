"""Replicas as Ray actors.

Does not know what shards are for or when a replica is to be replaced: Ray's own restarts and retries are
off, because they would stay bound to a broken actor and know nothing of attempts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayskip.cluster.paths import absolute
from rayskip.cluster.ray_cluster import RayCluster
from rayskip.config import JobConfig
from rayskip.data.records import Shard
from rayskip.errors import (
    InputError,
    Interrupted,
    JobFailed,
    ModelError,
    OutputError,
    RayskipError,
    ReplicaLost,
    Retryable,
)
from rayskip.pool import MOST_AHEAD, Alive, Done, Event, Failed, Lost, Ready

if TYPE_CHECKING:
    from rayskip.data.sources import Source

PROGRESS_EVERY_S = 1.0

CHECKED = InputError | ModelError | OutputError
"""What the driver has looked at too, from its own node."""


@dataclass(frozen=True)
class _Call:
    """What a pending object ref stands for; `shard` for "run" calls."""

    kind: str
    replica: int
    shard: int = -1


class RayPool:
    """A Pool of actors on the cluster at `cluster.address` or RAY_ADDRESS, or on a local one started here.

    Raises ConfigError for an address where no usable cluster is, and for replicas that never fit.
    """

    def __init__(self, job: JobConfig, source: Source) -> None:
        self._ray_cluster = RayCluster(job.cluster)
        self._cluster = self._ray_cluster.config
        import ray  # not before: a local one is told through the environment where to listen

        self._ray = ray
        self._job = absolute(job).model_copy(update={"cluster": self._cluster})
        self._source = ray.put(source)
        self._actors: dict[int, Any] = {}
        self._ask_at: dict[int, float] = {}  # replica -> when to ask for its progress next
        self._calls: dict[Any, _Call] = {}
        self._started = 0

    def start(self) -> int:
        from rayskip.cluster.replica import Replica

        replica, self._started = self._started, self._started + 1
        actor: Any = (
            self._ray.remote(Replica)
            .options(
                num_cpus=self._cluster.cpus_per_replica,
                num_gpus=self._cluster.gpus_per_replica,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=MOST_AHEAD + 1,  # + 1: progress answers while shards run
            )
            .remote(self._job, self._source)
        )
        self._actors[replica] = actor
        self._calls[actor.ready.remote()] = _Call("ready", replica)
        self._ask_at[replica] = time.monotonic()
        return replica

    def submit(self, replica: int, shard: Shard) -> None:
        self._calls[self._actors[replica].run.remote(shard)] = _Call("run", replica, shard.index)

    def wait(self, timeout_s: float) -> list[Event]:
        self._ray_cluster.check_room()
        self._ask_progress()
        try:
            first, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        except SystemError as error:
            # what Ray's compiled code makes of an exception out of a signal's handler
            if isinstance(error.__cause__, Interrupted):
                raise error.__cause__ from None
            raise
        if not first:
            return []
        refs = list(self._calls)
        finished, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [event for ref in finished if ref in self._calls and (event := self._event(ref))]

    def kill(self, replica: int) -> None:
        self._ray.kill(self._actors.pop(replica))
        self._ask_at.pop(replica, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.replica != replica}

    def close(self) -> None:
        for replica in list(self._actors):
            self.kill(replica)
        self._ray_cluster.close()

    def _ask_progress(self) -> None:
        now = time.monotonic()
        for replica, due in self._ask_at.items():
            if now >= due:
                self._calls[self._actors[replica].progress.remote()] = _Call("progress", replica)
                self._ask_at[replica] = math.inf

    def _event(self, ref: Any) -> Event | None:
        """The event of a finished call. Raises what a replica's loading raised."""
        exceptions = self._ray.exceptions
        call = self._calls.pop(ref)
        try:
            value = self._ray.get(ref)
        except (
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        ) as error:
            # An actor that is only out of reach may still run: it must not go on beside its replacement.
            reason = self._node(call.replica) + str(error).strip().splitlines()[-1][:300]
            self.kill(call.replica)
            return Lost(call.replica, reason)
        except exceptions.RayTaskError as error:
            cause = self._located(error.cause, call)
            if isinstance(cause, ReplicaLost) or (call.kind != "run" and isinstance(cause, Retryable)):
                self.kill(call.replica)
                return Lost(call.replica, str(cause))
            if call.kind != "run":
                raise cause from error
            return Failed(call.replica, call.shard, cause)
        if call.kind == "run":
            return Done(call.replica, value)
        self._ask_at[call.replica] = time.monotonic() + PROGRESS_EVERY_S
        return Ready(call.replica, value) if call.kind == "ready" else Alive(call.replica, value)

    def _located(self, error: Exception, call: _Call) -> Exception:
        """What a replica raised, with its node. What the system refused it is no defect, and needs no traceback."""
        if isinstance(error, OSError | MemoryError):
            error = JobFailed(f"a replica failed: {type(error).__name__}: {error}")
        if isinstance(error, RayskipError) and (node := self._node(call.replica)):
            elsewhere = (
                "; the driver found no fault" if call.kind == "ready" and isinstance(error, CHECKED) else ""
            )
            error.args = (f"{node}{error}{elsewhere}",)
        return error

    def _node(self, replica: int) -> str:
        """How messages begin that are about a replica: with its address, where there may be several."""
        if not self._ray_cluster.joined:
            return ""
        from ray._private.state import actors

        node = actors(self._actors[replica]._actor_id.hex())["Address"]["IPAddress"]
        return f"on node {node}: " if node else ""  # it may have got none
