"""Replicas as Ray actors; the only file that imports ray for the job path.

Does not know what shards are for or when a replica is to be replaced: Ray's own restarts and retries are
off, because they would stay bound to a broken actor and know nothing of attempts.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.config import ClusterConfig, JobConfig
from rayskip.data.records import Shard
from rayskip.errors import ConfigError, Interrupted, ReplicaLost
from rayskip.pool import LOOK_AHEAD, Alive, Done, Event, Failed, Lost, Ready

if TYPE_CHECKING:
    from rayskip.data.sources import Source

PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class _Call:
    """What a pending object ref stands for; `shard` for "run" calls."""

    kind: str
    replica: int
    shard: int = -1


class RayPool:
    """A Pool of actors on the cluster at `cluster.address` or RAY_ADDRESS, or on a local one started here.

    Raises ConfigError when a local cluster can never hold the replicas asked for.
    """

    def __init__(self, job: JobConfig, source: Source) -> None:
        import ray

        self._ray = ray
        self._owns_cluster, self._cluster = _connect(job.cluster)
        self._job = job.model_copy(update={"cluster": self._cluster})
        self._source = ray.put(source)
        self._actors: dict[int, Any] = {}
        self._ready: dict[int, float] = {}  # replica -> when to ask for its progress next
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
                max_concurrency=LOOK_AHEAD + 1,  # + 1: progress answers while shards run
            )
            .remote(self._job, self._source)
        )
        self._actors[replica] = actor
        self._calls[actor.ready.remote()] = _Call("ready", replica)
        return replica

    def submit(self, replica: int, shard: Shard) -> None:
        self._calls[self._actors[replica].run.remote(shard)] = _Call("run", replica, shard.index)

    def wait(self, timeout_s: float) -> list[Event]:
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
        self._ready.pop(replica, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.replica != replica}

    def close(self) -> None:
        for replica in list(self._actors):
            self.kill(replica)
        if self._owns_cluster:
            self._ray.shutdown()

    def _ask_progress(self) -> None:
        now = time.monotonic()
        for replica, due in self._ready.items():
            if now >= due:
                self._calls[self._actors[replica].progress.remote()] = _Call("progress", replica)
                self._ready[replica] = math.inf

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
            self.kill(call.replica)
            return Lost(call.replica, str(error).strip().splitlines()[-1][:300])
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ReplicaLost):
                self.kill(call.replica)
                return Lost(call.replica, str(error.cause))
            if call.kind != "run":
                raise error.cause from error
            return Failed(call.replica, call.shard, error.cause)
        if call.kind == "run":
            return Done(call.replica, value)
        self._ready[call.replica] = time.monotonic() + PROGRESS_EVERY_S
        return Ready(call.replica, value) if call.kind == "ready" else Alive(call.replica, value)


def _connect(cluster: ClusterConfig) -> tuple[bool, ClusterConfig]:
    """Attach to the cluster, or start a local one; whether it was started here and ends with the job, and the
    config with its cpus_per_replica filled in."""
    import ray

    most = cluster.replica_range[1]
    if ray.is_initialized():
        return False, cluster.with_cpus(most)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        _init(address=address, log_to_driver=False)
        return False, cluster.with_cpus(most)
    _make_private_token()
    cores = usable_cores()
    cluster = cluster.with_cpus(cores)
    _init(
        num_cpus=max(cores, math.ceil(most * (cluster.cpus_per_replica or 0))),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    gpus: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if cluster.gpus_per_replica * cluster.replica_range[0] > gpus:
        ray.shutdown()
        raise ConfigError(
            f"cluster.gpus_per_replica: {cluster.replica_range[0]} replicas with "
            f"{cluster.gpus_per_replica:g} GPUs each do not fit on this machine, which has {gpus:g}; "
            f"0 runs on its CPU, cluster.address names a larger cluster"
        )
    return True, cluster


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (parts := quota.read_text().split())[0].isdigit():
        cores = min(cores, max(1, int(parts[0]) // int(parts[1])))
    return cores


def _init(**options: Any) -> None:
    """ray.init without its signal handling: it turns SIGTERM into an exit that would lose our own code."""
    import ray

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:
        raise Interrupted("stopped by a signal while Ray started; the same command resumes") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _make_private_token() -> None:
    """Make the token that a local cluster asks for, in a file that only this user reads (Ray's is 0644)."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        return
    aside = path.with_name(f"auth_token.{os.getpid()}")
    aside.touch(mode=0o600, exist_ok=True)
    aside.write_text(secrets.token_hex(32))
    with suppress(FileExistsError):  # another driver was first; a half-written token is never seen
        os.link(aside, path)
    aside.unlink()
