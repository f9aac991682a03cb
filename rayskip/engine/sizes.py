"""How many rows and tokens a replica runs at once, from memory and measured steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from rayskip.config import EngineConfig
from rayskip.model.forward import Decoder, Group, TokenBatch
from rayskip.model.kv_cache import KEY_BLOCK, KVCache

CANDIDATES = (16, 32, 64, 128, 256)
WORTH = 1.05
"""A batch twice as large must make this many times the tokens per second: past that it only adds memory and a
longer tail."""
MEMORY_SHARE = 0.4
"""Share of the free memory that the KV cache may take when kv_cache_gb is not set."""
MODEL_LENGTH = 4096


@dataclass(frozen=True)
class Sizes:
    """batch_rows: rows in flight; batch_tokens: tokens in one forward; cache_positions: rows x positions cached."""

    batch_rows: int
    batch_tokens: int
    cache_positions: int


def choose_sizes(decoder: Decoder, config: EngineConfig) -> Sizes:
    """The configured sizes; what is left out is chosen here."""
    per_position = KVCache.bytes_per_position(decoder.spec, len(decoder.layers), decoder.dtype)
    budget = int(config.kv_cache_gb * 1e9) if config.kv_cache_gb else int(_free_bytes(decoder.device) * MEMORY_SHARE)
    rows = config.max_batch_rows or best_rows(decoder)
    tokens = config.max_batch_tokens or max(1024 if decoder.device.type == "cpu" else 8192, rows)
    return Sizes(rows, tokens, max(budget // per_position, KEY_BLOCK))


def best_rows(decoder: Decoder) -> int:
    """The smallest candidate that no larger one beats by enough, by timed decode steps."""
    chosen, rate = 0, 0.0
    for rows in CANDIDATES:
        measured = rows / _step_seconds(decoder, rows)
        if measured < rate * WORTH:
            break
        chosen, rate = rows, measured
    return chosen


def _step_seconds(decoder: Decoder, rows: int) -> float:
    """Fastest of three decode steps of `rows` rows at one key block."""
    cache = decoder.new_cache()
    cache.reserve(rows, KEY_BLOCK)
    index = torch.arange(rows, device=decoder.device)
    batch = TokenBatch(torch.zeros_like(index), torch.zeros_like(index), index, [Group(0, rows, 1, 0, KEY_BLOCK)], index)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        decoder.forward(batch, cache)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
