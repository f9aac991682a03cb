"""How long what a thread has a device do takes, by the clock of whoever does it."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Laps of what a thread has a device do, from now on: on a GPU by the device's own clock, as it gets there."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """End a lap, and begin the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each lap; on a GPU once the last one is over."""
        if self._cuda:
            self._events[-1].synchronize()
            return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(self._events)]
        return [stop - start for start, stop in pairwise(self._marks)]
