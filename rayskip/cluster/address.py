"""The Ray cluster that a job names: which address, whether a cluster answers there, and whether it lets us in.

Does not join it. Asks in a process of its own: Ray has no time limit for this, and may end the process that asks.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass

from rayskip.config import ClusterConfig
from rayskip.errors import ConfigError

_log = logging.getLogger(__name__)

CONNECT_S = 5.0
ASK_S = 5
"""Seconds for a cluster to take a connection, and then to say whether it lets us in."""

_ASK = """
import os, signal, sys
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient
from ray.exceptions import AuthenticationError

def let_in(mode):
    os.environ["RAY_AUTH_MODE"] = mode
    Config.initialize("")
    try:
        GcsClient(address=address)
    except AuthenticationError:
        return False
    return True

def has_token():
    try:
        return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError:  # of a file that cannot be read
        return False

signal.alarm(int(sys.argv[2]))
address = canonicalize_bootstrap_address_or_die(sys.argv[1])
if let_in("disabled"):
    said = "disabled"
elif not has_token():
    said = "missing"
else:
    said = "token" if let_in("token") else "wrong"
print(address, said)
"""


@dataclass(frozen=True)
class Address:
    """HOST:PORT or "auto". key: the config key or variable that says so."""

    value: str
    key: str

    @property
    def cluster(self) -> str:
        """How messages begin that are about the cluster there."""
        return f"{self.key}: the Ray cluster at {self.value}"


def named_address(cluster: ClusterConfig) -> Address | None:
    """The address in the config, else in the environment; None where a job is to have a Ray of its own."""
    if cluster.address:
        address = Address(cluster.address, "cluster.address")
    else:
        address = Address(os.environ.get("RAY_ADDRESS") or "local", "RAY_ADDRESS")
    return None if address.value == "local" else address


def find_cluster(address: Address) -> tuple[str, str]:
    """A cluster's HOST:PORT, and the RAY_AUTH_MODE that it lets us in by: "token", or "disabled" if it has none.

    Raises ConfigError when no cluster answers, when it does not take our token, and when it is open over a network.
    """
    host_port, said = _ask(address)
    if said in ("missing", "wrong"):
        problem = "there is none here" if said == "missing" else f"{_token_source()} holds another"
        raise ConfigError(
            f"{address.cluster} asks for its token, and {problem}; RAY_AUTH_TOKEN, or a file that "
            f"RAY_AUTH_TOKEN_PATH names, must hold it"
        )
    if said == "disabled":
        _warn_or_refuse(address, host_port)
    return host_port, said


def _ask(address: Address) -> tuple[str, str]:
    """The address as HOST:PORT, and what `_ASK` found out there. Raises ConfigError when no cluster answers."""
    _check_reachable(address)
    command = [sys.executable, "-c", _ASK, address.value, str(ASK_S)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode or len(said := asked.stdout.split()) < 2:
        late = asked.returncode < 0
        why = "something else may listen there" if late else (asked.stderr.strip() or "no answer")
        raise ConfigError(f"{_nobody(address)} ({why.splitlines()[-1]})")
    return said[-2], said[-1]


def _check_reachable(address: Address) -> None:
    """Raises ConfigError for what is no address, and where nothing listens."""
    if address.value == "auto":
        return
    if "://" in address.value:
        raise ConfigError(
            f"{address.key}: {address.value} is not where a cluster's nodes meet; name that HOST:PORT, or "
            f"hand the job over with `ray job submit`"
        )
    host, _, port = address.value.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f'{address.key}: {address.value!r} is neither HOST:PORT nor "auto" nor "local"')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a host that can be none
        raise ConfigError(f"{_nobody(address)} ({error})") from error


def _nobody(address: Address) -> str:
    return f"{address.key}: no Ray cluster answers at {address.value}"


def _token_source() -> str:
    """Where Ray takes its token from, in the order in which it looks."""
    named = (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name))
    return next(named, "~/.ray/auth_token")


def _warn_or_refuse(address: Address, host_port: str) -> None:
    """A cluster without a token is used from inside it or on this machine, and refused over a network."""
    open_to_all = f"{address.cluster} asks for no token: whoever reaches its ports runs code as you"
    inside = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # `ray job submit` runs this driver on the cluster
    if not inside and not _is_this_machine(host_port.rpartition(":")[0].strip("[]")):
        raise ConfigError(
            f"{open_to_all}. Start it with RAY_AUTH_MODE=token on every node (`ray get-auth-token "
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
