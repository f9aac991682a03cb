"""Other libraries as child processes, to be timed in turns with the engine.

A peer runs a script of peers/ in an environment that has its library. Between two jobs it waits for a line of
input, and between the turns of one it is stopped: it takes memory then, but no time. Does not know what is timed
beside it.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import isinf
from pathlib import Path
from typing import IO, Any

from rayskip.config.evaluate import BenchPeer
from rayskip.errors import ConfigError

SCRIPTS = {
    "transformers": "transformers_generate.py",
    "transformers_batch": "transformers_generate_batch.py",
    "vllm": "vllm_generate.py",
}
FOLDER = Path(__file__).parent / "peers"

END_S = 10.0
"""Seconds that a peer has to end by itself."""
SHOWN_LINES = 5
"""Last lines of a failed peer's error output that are shown."""


@dataclass(frozen=True)
class PeerArguments:
    """What a script is told; see `Arguments` in peers/common.py."""

    model: str
    dtype: str
    batch_rows: int
    max_tokens: int
    ignore_eos: bool
    longest: int
    samples: int
    temperature: float


@contextmanager
def running_peer(peer: BenchPeer, arguments: PeerArguments) -> Iterator[PeerProcess]:
    """A peer that has loaded its model, until the block ends. Raises ConfigError when it cannot run."""
    python = peer.python or sys.executable
    command = [python, str(FOLDER / SCRIPTS[peer.kind]), json.dumps(asdict(arguments))]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        except OSError as error:
            raise ConfigError(f"peers: {peer.name}: {python} cannot be started ({error.strerror})") from error
        with process:
            try:
                yield PeerProcess(peer.name, python, process, errors)
            finally:
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Have it end with its input, or else kill it; safe to repeat."""
    assert process.stdin is not None
    process.send_signal(signal.SIGCONT)
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class PeerProcess:
    """load_s: seconds that its model took to load, imports included."""

    def __init__(self, name: str, python: str, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._name, self._python = name, python
        self._process, self._errors = process, errors
        self.load_s = float(self._answer()["load_s"])

    def begin(self, prompts: Sequence[list[int]]) -> None:
        """Have it generate."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead; there is no answer either
            self._process.stdin.write(json.dumps({"prompts": prompts}) + "\n")
            self._process.stdin.flush()

    def go_on(self, seconds: float) -> bool:
        """Let it run for so long, or until it has an answer; whether it has one, or died."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        answers, _, _ = select.select([self._process.stdout], [], [], None if isinf(seconds) else seconds)
        if not answers:
            self._process.send_signal(signal.SIGSTOP)
        return bool(answers)

    def token_ids(self) -> list[list[int]]:
        """Of each prompt's completion. Raises ConfigError when the peer died."""
        found: list[list[int]] = self._answer()["token_ids"]
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if (line := self._process.stdout.readline()).endswith("\n"):  # else it died, perhaps in mid-line
            answer: dict[str, Any] = json.loads(line)
            return answer
        _end(self._process)
        self._errors.seek(0)
        lines = [line.rstrip() for line in self._errors.read().decode(errors="replace").splitlines()]
        raise ConfigError(
            f"peers: {self._name}: {self._python} ended with code {self._process.returncode}; its last lines:\n  "
            + "\n  ".join([line for line in lines if line][-SHOWN_LINES:])
        )
