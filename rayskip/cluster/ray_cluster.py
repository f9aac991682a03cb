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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError, Interrupted, first_line

_log = logging.getLogger(__name__)

CONNECT_S = 5.0
ASK_S = 15.0
"""Seconds for a cluster to take a connection, and to say who it is (Python and Ray start for that)."""

JOIN_S = 5.0
"""Seconds that a cluster's nodes get to join before a replica that fits none of them is given up."""

_ASKED_TO_STOP = {signal.SIGTERM, signal.SIGHUP}

# Run in a process of its own, because Ray has no time limit for this, and reads its way to authenticate once.
_ASK = """
import sys
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
address = canonicalize_bootstrap_address_or_die(sys.argv[1])
try:
    GcsClient(address=address)
    print(address, "in")
except AuthenticationError:
    print(address, "out")
"""


class RayCluster:
    """Ray, attached to or started here. config: the job's section with cpus_per_replica filled in."""

    def __init__(self, cluster: ClusterConfig) -> None:
        """Attach to the cluster at `cluster.address` or RAY_ADDRESS, or start a local one.

        Raises ConfigError for an address where no usable cluster is, and for replicas that never fit.
        """
        self._processes: list[psutil.Process] = []
        self._environment: dict[str, str | None] = {}
        address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
        running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        if running:
            self.config = cluster.with_cpus(cluster.replica_range[1])
        elif address == "local":
            self.config = cluster.with_cpus(usable_cores())
            self._start()
        else:
            self.config = cluster.with_cpus(cluster.replica_range[1])
            self._attach(address)
        try:
            _check_fit(self.config, "this machine" if self._processes else "the cluster")
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """End what was started here; a cluster that was attached to goes on."""
        if not self._processes:
            return
        import ray

        # They do not heed SIGTERM, for which Ray's own end would wait a second each.
        started = [process for parent in self._processes for process in [parent, *_children(parent)]]
        threading.Thread(target=_end_when_disconnected, args=(ray, started), daemon=True).start()
        ray.shutdown()
        psutil.wait_procs(started, timeout=3)
        self._processes = []
        for name, value in self._environment.items():
            _set(name, value)

    def _start(self) -> None:
        environment = {  # which is all that Ray reads of this
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface
            "RAY_AUTH_TOKEN_PATH": str(_private_token()),
            "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_MODE": None,  # a local Ray asks for its token unless told otherwise
        }
        self._environment = {name: os.environ.get(name) for name in environment}
        for name, value in environment.items():
            _set(name, value)
        before = set(_children(psutil.Process()))
        most = self.config.replica_range[1] * (self.config.cpus_per_replica or 0)
        try:
            _init(
                address="local",
                num_cpus=max(usable_cores(), math.ceil(most)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        finally:
            self._processes = [child for child in _children(psutil.Process()) if child not in before]

    def _attach(self, address: str) -> None:
        resolved, let_in = _ask(address, "disabled")
        if let_in:
            _warn_or_refuse(address, resolved)
        elif _ask(address, "token")[1]:
            os.environ["RAY_AUTH_MODE"] = "token"
        else:
            raise ConfigError(
                f"cluster.address: the Ray cluster at {address} asks for its token: RAY_AUTH_TOKEN, or a file that "
                f"RAY_AUTH_TOKEN_PATH names, must hold it"
            )
        try:
            _init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cluster.address: the Ray cluster at {address}: {first_line(error)}"
            ) from error


def _ask(address: str, auth_mode: str) -> tuple[str, bool]:
    """A cluster's address as HOST:PORT, and whether it lets us in ("disabled": without a token).

    Raises ConfigError when none answers.
    """
    if "://" in address:
        raise ConfigError(
            f"cluster.address: {address} is not where a cluster's nodes meet; name that HOST:PORT, or "
            f"hand the job over with `ray job submit`"
        )
    nobody = f"cluster.address: no Ray cluster answers at {address}"
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or not port.isdigit():
            raise ConfigError(f'cluster.address: {address!r} is neither HOST:PORT nor "auto" nor "local"')
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{nobody} ({error})") from error
    command = [sys.executable, "-c", _ASK, address]
    environment = os.environ | {"RAY_AUTH_MODE": auth_mode}
    try:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{nobody} (something else may listen there)") from error
    if asked.returncode or len(said := asked.stdout.split()) < 2:
        raise ConfigError(f"{nobody} ({(asked.stderr.strip().splitlines() or ['no answer'])[-1]})")
    return said[-2], said[-1] == "in"


def _warn_or_refuse(address: str, resolved: str) -> None:
    """A cluster without a token is used from inside it or on this machine, and refused over a network."""
    open_to_all = (
        f"the Ray cluster at {address} asks for no token: whoever reaches its ports runs code as you"
    )
    inside = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # `ray job submit` runs this driver on the cluster
    if not inside and not _is_this_machine(resolved.rpartition(":")[0].strip("[]")):
        raise ConfigError(
            f"cluster.address: {open_to_all}. Start it with RAY_AUTH_MODE=token on every node (`ray get-auth-token "
            f"--generate` makes the token, RAY_AUTH_TOKEN hands it over), or reach it through a tunnel to 127.0.0.1"
        )
    _log.warning("%s", open_to_all)


def _is_this_machine(host: str) -> bool:
    """Whether an address is this machine's own: only its own can be listened on."""
    with suppress(OSError), socket.create_server((host, 0), family=_family(host)):
        return True
    return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _check_fit(cluster: ClusterConfig, where: str) -> None:
    """Raises ConfigError when the fewest replicas asked for never fit, and says when they do not fit yet."""
    import ray
    from ray._private.state import state

    wanted = {"CPU": cluster.cpus_per_replica or 0, "GPU": cluster.gpus_per_replica}
    least = cluster.replica_range[0]
    deadline = time.monotonic() + (0 if where == "this machine" else JOIN_S)
    while True:
        alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"] for node in alive if node["Alive"]]
        room = sum(_replicas_on(node, wanted) for node in nodes)
        if room >= least:
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(0.5)
    has = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in wanted}
    problem = (
        f"cluster.replicas: {least} with {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs each do not fit on "
        f"{where}: {len(nodes)} nodes have room for {room:g} "
        f"(at most {has['CPU']:g} CPUs and {has['GPU']:g} GPUs a node)"
    )
    if state.get_max_resources_from_cluster_config() is not None:  # it grows
        _log.warning("%s; waiting for nodes to join", problem)
        return
    raise ConfigError(f"{problem}; see cluster.replicas, cpus_per_replica, gpus_per_replica (0: on CPU)")


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


def _init(**options: Any) -> None:
    """ray.init without its signal handling: it turns SIGTERM into an exit that would lose our own code.

    What it starts does not heed SIGTERM and SIGHUP, as Ray itself does it for Ctrl-C: a scheduler sends them to all
    processes of a job, and replicas that died of them could finish nothing.
    """
    with _blocked(_ASKED_TO_STOP):  # which children inherit
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


def _end_when_disconnected(ray: Any, processes: list[psutil.Process]) -> None:
    """Kill processes of a local Ray as soon as this one has left it; before, their end would take it along."""
    while ray.is_initialized():
        time.sleep(0.01)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
