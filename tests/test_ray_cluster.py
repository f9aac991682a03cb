"""Where Ray comes from: a local one that is nobody else's, or one at an address that answers and may be trusted."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayskip.cluster import ray_cluster
from rayskip.cluster.ray_cluster import RayCluster
from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError

LOCAL = """
import os, stat, sys
import psutil
from rayskip.cluster import ray_cluster
from rayskip.cluster.ray_cluster import RayCluster, _ask
from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError

ray_cluster.JOIN_S = 0
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
assert _ask(address, "disabled") == (address, False)
assert _ask(address, "token") == (address, True)
try:
    RayCluster(ClusterConfig(gpus_per_replica=1))
except ConfigError as error:
    print(error)
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
    assert "1 CPUs and 1 GPUs each do not fit on the cluster: 1 nodes have room for 0" in found.stdout
    assert not (tmp_path / "none").exists()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"127.0.0.1:{closed_port()}", "no Ray cluster answers at 127.0.0.1:"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is not where"),
        ("elsewhere", "'elsewhere' is neither HOST:PORT"),
    ],
)
@pytest.mark.parametrize("by", ["config", "RAY_ADDRESS"])
def test_an_address_where_no_cluster_is_is_said_at_once(
    address: str, said: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as refused:
        RayCluster(ClusterConfig(address=address if by == "config" else None))
    assert said in str(refused.value)


def test_a_port_where_something_else_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "ASK_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
            RayCluster(ClusterConfig(address=address))


def test_a_cluster_without_a_token_is_refused_over_a_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """192.0.2.1 is nobody's address. Inside a job that was submitted to the cluster there is no choice."""
    remote = "192.0.2.1:6379"
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:6379 asks for no token.*RAY_AUTH_MODE=token"):
        ray_cluster._warn_or_refuse(remote, remote)
    assert not caplog.text
    ray_cluster._warn_or_refuse("127.0.0.1:6379", "127.0.0.1:6379")
    assert "127.0.0.1:6379 asks for no token" in caplog.text
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    ray_cluster._warn_or_refuse(remote, remote)
    assert "192.0.2.1:6379 asks for no token" in caplog.text
