"""Templates, rendered in a process of their own, which bounds what one may cost.

A template is not to be trusted: a model brings its own, and an expression as short as 10 ** 10 ** 9, or one over a
row's values, can take any time and memory. Knows no rows or tokenizers; `template_process.py` is what it runs.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayskip.errors import InputError, RowError

CPU_S = 5.0
"""Seconds of processor time that one rendering may take; not by the clock: a busy machine changes nothing."""

MEMORY = 1 << 30
"""Bytes that the process may take for it beyond what it needs itself (on Linux; elsewhere time alone bounds it)."""

_PROGRAM = Path(__file__).with_name("template_process.py")


class Templates:
    """Renders one template at a time, for any thread.

    Its process starts on first use and anew after one that had to be ended. It ends with this object, and with the
    process that this is in.
    """

    def __init__(self, cpu_s: float = CPU_S, memory: int = MEMORY) -> None:
        self._limits = cpu_s, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def prepare_chat(self) -> None:
        """Have the process import what chat templates need, for seconds; does not wait."""
        with self._lock:
            _send(self._running(), pickle.dumps(("prepare", 0)))

    def variables(self, source: str) -> list[str]:
        """Names that a job's template reads, sorted. Raises InputError for one with a fault."""
        fault, text = self._ask("variables", float("inf"), source)
        if fault is not None:
            raise InputError(f"input.template: {text}")
        return text.split(",") if text else []

    def plain(self, source: str, values: dict[str, Any], most: float) -> str:
        """A job's template over a row's values. most: characters that the text may have.

        Raises RowError when it fails, writes a null, or is past a limit.
        """
        return self._text("template_error", "input.template", "plain", most, source, values)

    def chat(
        self,
        source: str,
        messages: list[dict[str, Any]],
        values: dict[str, Any],
        goes_on: bool,
        most: float,
    ) -> str:
        """A model's chat template over a conversation. values: what else it may read. goes_on: the last message is
        to be continued, rather than answered. Raises RowError as above."""
        return self._text(
            "bad_messages", "the chat template", "chat", most, source, messages, values, goes_on
        )

    def _text(self, error_kind: str, what: str, kind: str, most: float, *arguments: object) -> str:
        fault, text = self._ask(kind, most, *arguments)
        match fault:
            case None:
                return text
            case "null":
                raise RowError(
                    "null_prompt", f"{what} writes a null; give it a default, as in {{{{ x or '' }}}}"
                )
            case "long":
                raise too_long(int(text), most)
        raise RowError(error_kind, f"{what}: {text}")

    def _ask(self, *request: object) -> tuple[str | None, str]:
        """What the process answers; for one that ended over it, a fault that says why."""
        try:
            data = pickle.dumps(request)
        except (RecursionError, ValueError, TypeError, AttributeError, pickle.PicklingError) as error:
            return "fault", f"the row's values: {type(error).__name__}: {error}"
        with self._lock:
            for _ in range(2):  # it may have been ended by something else
                # Out of reach until it has answered: no later request may get this one's answer.
                process, self._process = self._running(), None
                _send(process, data)
                assert process.stdout is not None
                if (line := process.stdout.readline()).endswith(b"\n"):
                    self._process = process
                    fault, text = json.loads(line)
                    return fault, text
                if (code := process.wait()) == -signal.SIGPROF:
                    return "fault", f"takes more than {self._limits[0]:g} s of processor time"
        return "fault", f"ends the process that renders it (exit code {code})"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-P", str(_PROGRAM), *map(str, self._limits)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            weakref.finalize(self, _end, self._process)
        return self._process


def too_long(characters: int, most: float) -> RowError:
    """Of a prompt that cannot fit whatever its tokens are, so that none are made."""
    return RowError(
        "prompt_too_long", f"the prompt has {characters:,} characters; the context holds at most {most:,.0f}"
    )


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended: the answer's end tells
        process.stdin.write(data)
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()
