"""How long a forward takes on this machine: what sizes and drafts are chosen by."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict

from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import TokenBatch
from rayskip.user_cache import fact_file, keep_fact, read_fact

_chance = random.Random()
"""Not the user's, whose seed it would change."""

REPEATS, ENOUGH_S = 3, 0.1
"""A forward is run so often, or until it ran so long: of long ones, the first tells enough."""
AGAIN_S = 0.01
"""Seconds of a forward whose time is known, by which it is measured again: a long one once in a while."""
AGED = 1.05
"""By how much a time grows, at most, whenever it is measured again."""


class Timings:
    """Seconds of forwards of one kind by their size, kept in the user's cache from one process to the next.

    What else runs on a machine makes a forward slower and never faster, so the least that was measured counts; and
    each is measured again now and then, so that no bad hour decides for good. A figure that is not reached again
    ages, so that a machine which has become slower is seen as such.
    """

    def __init__(self, decoder: Decoder, threads: int, kind: str) -> None:
        """kind: what the sizes are sizes of. threads: that a forward takes."""
        held = decoder.held
        model = json.dumps([asdict(decoder.spec), decoder.depth, held.size, held.total])
        self._file = fact_file("timings", [decoder.backend.machine, model, str(threads), kind])
        self._seconds: dict[str, float] = read_fact(self._file) or {}

    def seconds(self, size: int, measure: Callable[[], float]) -> float:
        """Of a forward of that size, which `measure` measures."""
        known = self._seconds.get(str(size))
        if known is None:
            self._seconds[str(size)] = measure()
        elif _chance.random() < AGAIN_S / known:
            self._seconds[str(size)] = min(known * AGED, measure())
        return self._seconds[str(size)]

    def keep(self) -> None:
        keep_fact(self._file, self._seconds)


def greedy_seconds(decoder: Decoder, batch: TokenBatch, cache: KVCache) -> float:
    """Seconds of the fastest of a few forwards over `batch`, the argmax of its outputs included."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH_S:
        start = time.perf_counter()
        decoder.head_output(decoder.hidden(batch, cache), []).best[0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return min(taken)
