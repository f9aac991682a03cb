"""How long a forward takes on this machine: what sizes and drafts are chosen by."""

from __future__ import annotations

import time

from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import TokenBatch

REPEATS = 3


def greedy_seconds(decoder: Decoder, batch: TokenBatch, cache: KVCache) -> float:
    """Seconds of the fastest of a few forwards over `batch`, the argmax of its outputs included."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        decoder.head_output(decoder.hidden(batch, cache), []).best[0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best
