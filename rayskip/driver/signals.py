"""SIGTERM, SIGHUP and Ctrl-C as a question that the loop asks. Does not know what is to be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rayskip.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """The signals that stop a run: not SIGHUP under nohup, which has it ignored."""
    hang_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [number for number in SIGNALS if hang_up or number is not signal.SIGHUP]


class StopSignal:
    """While entered, the first signal sets `asked`; the second raises Interrupted at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Interrupted("stopped at once; what was committed stays, the same command resumes")
        self.asked = True
