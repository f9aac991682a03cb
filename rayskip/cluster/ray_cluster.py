"""A Ray to run on: one that runs already, at an address, or one started here for this job alone.

Does not know replicas or jobs. A local one is reachable from this machine only, asks for a token that only this
process and its children know, never meets another Ray of this machine, and goes without a trace.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rayskip.cluster.address import Address, find_cluster, named_address
from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError, Interrupted, counted

_log = logging.getLogger(__name__)

_ASKED_TO_STOP = {signal.SIGTERM, signal.SIGHUP}


class RayCluster:
    """Ray, attached to or started here. config: the job's section with cpus_per_replica filled in. joined: whether
    it was there before, perhaps with other nodes than this machine."""

    def __init__(self, cluster: ClusterConfig) -> None:
        """Attach to the cluster at `cluster.address` or RAY_ADDRESS, or start a local one.

        Raises ConfigError for an address where no usable cluster is, and for replicas that never fit here.
        """
        self._processes: list[psutil.Process] = []
        self._environment: dict[str, str | None] = {}
        self._ours = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        address = named_address(cluster) if self._ours else None
        local = self._ours and address is None
        self.joined = not local
        self.config = cluster.with_cpus(usable_cores() if local else cluster.replica_range[1])
        found = address and find_cluster(address)
        try:
            if address and found:
                self._attach(address, *found)
            elif local:
                self._start()
            self._misfit: str | None = _misfit(self.config, "this machine" if local else "the cluster")
            self._joined_by = time.monotonic() + (0 if local else self.config.join_s)
            self.check_room()
        except Exception:
            self.close()
            raise
        if self._misfit:
            _log.warning("waiting up to %g s for nodes to join (cluster.join_s)", self.config.join_s)

    def check_room(self) -> None:
        """Look whether the fewest replicas fit, until they once did.

        Raises ConfigError when they do not, and nodes have had their time to join. Replicas that wait for room are
        what has a cluster grow, so this is asked while they do.
        """
        if self._misfit is None:
            return
        if time.monotonic() < self._joined_by:
            self._misfit = _misfit(self.config, "the cluster")
        else:
            raise ConfigError(self._misfit)

    def close(self) -> None:
        """End what was started here, and leave what was joined."""
        if not self._ours:
            return
        import ray

        started = [process for parent in self._processes for process in [parent, *_children(parent)]]
        ray.shutdown()  # first: their end would take this process along
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=3)
        self._processes = []
        _set_environment(self._environment)
        self._environment = {}

    def _start(self) -> None:
        self._environment = _set_environment(
            {  # which is all that Ray reads of this
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface
                "RAY_AUTH_TOKEN_PATH": str(_private_token()),
                "RAY_AUTH_TOKEN": None,
                "RAY_AUTH_MODE": "token",
            }
        )
        before = set(_children(psutil.Process()))
        most = self.config.replica_range[1] * (self.config.cpus_per_replica or 0)
        try:
            with _starting_ray():
                address = _start_node(max(usable_cores(), math.ceil(most)))
                _connect(address, logging.ERROR)
        finally:
            self._processes = [child for child in _children(psutil.Process()) if child not in before]

    def _attach(self, address: Address, host_port: str, auth_mode: str) -> None:
        self._environment = _set_environment({"RAY_AUTH_MODE": auth_mode})
        try:
            with _starting_ray():
                _connect(host_port, logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{address.cluster}: {' '.join(str(error).split())}") from error


def _misfit(cluster: ClusterConfig, where: str) -> str | None:
    """Why the fewest replicas asked for do not fit on the nodes that are there; None when they do."""
    import ray

    wanted = {"CPU": cluster.cpus_per_replica or 0, "GPU": cluster.gpus_per_replica}
    least = cluster.replica_range[0]
    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive if node["Alive"]]
    room = sum(_replicas_on(node, wanted) for node in nodes)
    if room >= least:
        return None
    has = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in wanted}
    wait = ", or give nodes longer to join (cluster.join_s)" if where == "the cluster" else ""
    return (
        f"cluster.replicas: {least} must fit, each with {_amounts(wanted)}, and {where} has room for {room:g}: "
        f"{counted(len(nodes), 'node')} with at most {_amounts(has)} each; lower cluster.replicas, "
        f"cpus_per_replica or gpus_per_replica (0: on CPU){wait}"
    )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(counted(amount, kind) for kind, amount in resources.items())


def _replicas_on(node: dict[str, float], wanted: dict[str, float]) -> float:
    """How many replicas a node has room for."""
    return min((node.get(kind, 0) // each for kind, each in wanted.items() if each), default=math.inf)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (parts := quota.read_text().split())[0].isdigit():
        cores = min(cores, max(1, int(parts[0]) // int(parts[1])))
    return cores


@contextmanager
def _starting_ray() -> Iterator[None]:
    """Within it Ray is started and joined, as the environment now says, without Ray's signal handling: it turns
    SIGTERM into an exit that would lose our own code.

    What is started does not heed SIGTERM and SIGHUP, as Ray itself does it for Ctrl-C: a scheduler sends them to
    all processes of a job, and replicas that died of them could finish nothing.
    """
    with _blocked(_ASKED_TO_STOP):  # which children inherit
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")  # it may have read the variables of this before, for another Ray
        AuthenticationTokenLoader.instance().reset_cache()
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        except SystemExit as error:
            raise Interrupted("stopped by a signal while Ray started; the same command resumes") from error
        finally:
            if in_main:
                signal.signal(signal.SIGTERM, before)


def _connect(address: str, level: int) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=level)


def _start_node(cpus: int) -> str:
    """Start the processes of a Ray of one machine, as ray.init does; returns its address.

    Without those that serve no job, which ray.init starts whatever it is told, and waits for: autoscaler, log
    monitor and the dashboard's server.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Lean(Node):
        def start_api_server(self, **options: Any) -> None:
            """Start none."""

    asked = RayParams(
        num_cpus=cpus,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]
        no_monitor=True,
    )
    return str(Lean(asked, head=True, shutdown_at_exit=False, ray_init_cluster=True).gcs_address)


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _private_token() -> Path:
    """A file with the token of this process's local Rays, in a folder that only this user reads.

    One for the process's life, which is as long as Ray remembers it. Not in the home folder: there it would have
    every other Ray of this user ask for it.
    """
    folder = tempfile.TemporaryDirectory(prefix="rayskip-", ignore_cleanup_errors=True)
    _folders.append(folder)
    path = Path(folder.name) / "ray_token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Deleted when the process ends."""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=process.pid != os.getpid())
    except psutil.NoSuchProcess:
        return []


def _set_environment(environment: dict[str, str | None]) -> dict[str, str | None]:
    """Set variables, or delete them (None); returns what they were."""
    before = {name: os.environ.get(name) for name in environment}
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before
