"""Where Ray comes from: a local one that is nobody else's, or one at an address that answers and may be trusted."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from rayskip.cluster import address
from rayskip.cluster.ray_cluster import RayCluster
from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError

LOCAL = """
import os, stat
import psutil
from rayskip.cluster.address import Address, find_cluster
from rayskip.cluster.ray_cluster import RayCluster
from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError

cluster = RayCluster(ClusterConfig())
import ray

@ray.remote
def answer():
    return 42

assert ray.get(answer.remote()) == 42
ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
listening = [c.laddr.ip for p in ours for c in p.net_connections() if c.status == "LISTEN"]
assert listening, "no port found: the test looks in the wrong place"
assert all(ip.endswith("127.0.0.1") for ip in listening), listening
mode = stat.S_IMODE(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode)
assert mode == 0o600, oct(mode)
address = ray.get_runtime_context().gcs_address
assert find_cluster(Address(address, "here")) == (address, "token")
try:
    RayCluster(ClusterConfig(gpus_per_replica=1, join_s=0))
except ConfigError as error:
    print(error)
assert ray.is_initialized()
cluster.close()
assert not psutil.Process().children(recursive=True)
assert "RAY_AUTH_TOKEN_PATH" not in os.environ and os.environ["RAY_AUTH_MODE"] == "disabled"
print("done")
"""


def test_a_local_ray_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    """Also where an address file tells of a Ray that is long dead, and without a home folder."""
    with tempfile.TemporaryDirectory(prefix="r") as temporary:  # Ray's sockets need a short path
        (Path(temporary) / "ray").mkdir()
        (Path(temporary) / "ray/ray_current_cluster").write_text("127.0.0.1:1")
        environment = os.environ | {
            "RAY_TMPDIR": temporary,
            "HOME": str(tmp_path / "none"),
            "RAY_AUTH_MODE": "disabled",
        }
        command = [sys.executable, "-c", LOCAL]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1:] == ["done"], found.stderr
    assert (
        "1 must fit, each with 1 CPU and 1 GPU, and the cluster has room for 0: 1 node with" in found.stdout
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is not where"),
        ("elsewhere", "'elsewhere' is neither HOST:PORT"),
    ],
)
@pytest.mark.parametrize("by", ["config", "RAY_ADDRESS"])
def test_an_address_where_no_cluster_is_is_said_at_once(
    named: str, said: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", named)
    with pytest.raises(ConfigError) as refused:
        RayCluster(ClusterConfig(address=named if by == "config" else None))
    key = "cluster.address" if by == "config" else "RAY_ADDRESS"
    assert str(refused.value).startswith(f"{key}: {said}")


def test_a_port_where_something_else_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "ASK_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {there} .something else"):
            RayCluster(ClusterConfig(address=there))


JOIN = """
import sys
from rayskip.cluster.ray_cluster import RayCluster
from rayskip.config import ClusterConfig

for address in [*sys.argv[1:], None]:  # None: another of its own
    cluster = RayCluster(ClusterConfig(address=address))
    import ray

    print(ray.get(ray.remote(lambda: 42).remote()))
    cluster.close()
"""


POOL = """
import os, sys
from rayskip.cluster.ray_pool import RayPool
from rayskip.config import JobConfig
from rayskip.data.sources import discover
from rayskip.errors import UserError

os.mkdir(".rayskip")
for name, text in ((".rayskip/job.json", ""), ("rows.jsonl", '{"prompt": "Hello"}')):
    with open(name, "w") as file:
        file.write(text)
for replicas in (1, 2):
    job = JobConfig.model_validate(
        {
            "name": "elsewhere",
            "model": {"path": "none"},
            "input": {"path": "rows.jsonl"},
            "cluster": {"address": sys.argv[1], "replicas": replicas, "cpus_per_replica": 1, "join_s": 1},
            "output": {"path": "."},
        }
    )
    if replicas == 1:
        source = discover(job.input)
        os.remove("rows.jsonl")
    pool = RayPool(job, source)
    if replicas == 1:
        pool.start()
    try:
        while True:
            pool.wait(0.5)
    except UserError as error:
        print(error)
    pool.close()
"""


@contextmanager
def heads(*environments: dict[str, str]) -> Iterator[list[str]]:
    """Ray heads of one CPU, as `ray start` makes them for users with these variables; their addresses."""
    with ExitStack() as started:
        ports = [str(free_port()) for _ in environments]
        processes = [started.enter_context(_head(*each)) for each in zip(environments, ports, strict=True)]
        for process in processes:
            assert process.stdout is not None
            assert any("Ray runtime started" in line for line in process.stdout)
        yield [f"127.0.0.1:{port}" for port in ports]


@contextmanager
def _head(environment: dict[str, str], port: str) -> Iterator[subprocess.Popen[str]]:
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", port]
        options = ["--num-cpus", "1", "--include-dashboard", "false", "--temp-dir", temporary]
        variables = os.environ | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*command, *options], env=variables, text=True, **pipes)
        try:
            yield process
        finally:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in tree:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(tree)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(code: str, *arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    variables = os.environ | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(command, env=variables, cwd=home, capture_output=True, text=True, check=False)


def test_clusters_with_and_without_a_token_are_joined_and_faults_there_told(tmp_path: Path) -> None:
    """Though a token lies in the home folder all the time, and a local one comes after them. A replica works in
    another directory than the driver."""
    token = tmp_path / "with" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("t" * 32)
    (tmp_path / "without").mkdir()
    home = token.parents[1]
    with heads({"HOME": str(tmp_path / "without")}, {"HOME": str(home)}) as (open_to_all, closed):
        joined = run(JOIN, open_to_all, closed, home=home)
        missing = run(JOIN, closed, home=tmp_path / "without")
        wrong = run(JOIN, closed, home=home, RAY_AUTH_TOKEN="x" * 32)
        faults = run(POOL, closed, home=home)
    assert joined.stdout.split() == ["42"] * 3, joined.stderr
    assert f"{open_to_all} asks for no token" in joined.stderr
    no_input, no_room = faults.stdout.splitlines()
    assert re.match(
        f"on node [0-9.]+: input.path: {home}/rows.jsonl is not here; name a folder that", no_input
    )
    room = "cluster.replicas: 2 must fit, each with 1 CPU and 0 GPUs, and the cluster has room for 1: 1 node with"
    assert no_room.startswith(room)
    asks = f"cluster.address: the Ray cluster at {closed} asks for its token, and"
    assert f"ConfigError: {asks} there is none here; RAY_AUTH_TOKEN" in missing.stderr
    assert f"ConfigError: {asks} RAY_AUTH_TOKEN holds another; RAY_AUTH_TOKEN" in wrong.stderr


def test_a_cluster_without_a_token_is_refused_over_a_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """192.0.2.1 is nobody's address. Inside a job that was submitted to the cluster there is no choice."""
    remote = address.Address("192.0.2.1:6379", "RAY_ADDRESS")
    with pytest.raises(
        ConfigError, match=r"^RAY_ADDRESS.*192\.0\.2\.1:6379 asks for no token.*RAY_AUTH_MODE=token"
    ):
        address._warn_or_refuse(remote, remote.value)
    assert not caplog.text
    address._warn_or_refuse(address.Address("auto", "RAY_ADDRESS"), "127.0.0.1:6379")
    assert "auto asks for no token" in caplog.text
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    address._warn_or_refuse(remote, remote.value)
    assert "192.0.2.1:6379 asks for no token" in caplog.text
