"""How long a forward takes on this machine: what sizes and drafts are chosen by."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.ops import TokenBatch

REPEATS = 3


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


def greedy_seconds(decoder: Decoder, batch: TokenBatch, cache: KVCache) -> float:
    """Seconds of the fastest of a few forwards over `batch`, the likeliest tokens of its outputs included."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        decoder.scores(decoder.hidden(batch, cache), []).best[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best
