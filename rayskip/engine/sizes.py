"""How many workers, rows and tokens a replica runs at once, from its threads, memory and measured steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from rayskip.config import EngineConfig
from rayskip.model.cache.kv_cache import KEY_BLOCK, KVCache
from rayskip.model.clock import Timings, greedy_seconds
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import Span, TokenBatch
from rayskip.skip import SkipPolicy

CANDIDATES = (32, 64, 128, 256, 512, 1024)
WORTH = 1.1
"""A batch twice as large must make this many times the tokens per second: past that it only adds memory and a
longer tail."""
WORKER_ROWS = 32
"""Fewest rows worth a worker of their own. With fewer, workers that each read all weights take longer than threads
that share them (two cores: 16 rows are 4% and 32 rows 8% faster on one worker, 64 rows 4% slower)."""
COHORT = 0.25
"""Share of the batch that joins together where depth depends on the position. On a GPU, or in a library's tiles, a
layer that few rows run costs nearly what it costs for all, so rows of one position are cheaper; larger cohorts
leave more places empty. With the C kernels' products it makes no difference (BENCHMARKS.md, Refill)."""


@dataclass(frozen=True)
class Sizes:
    """Of the engine: workers, pages (of the KV cache, each of one layer), least_pages (that the longest row takes).
    Of each worker: threads, batch_rows (rows in flight), batch_tokens (tokens in one forward), cohort (rows that
    join together), plans_ahead (whether the next step is planned, and sent to the device, while one
    runs)."""

    workers: int
    threads_per_worker: int
    batch_rows: int
    batch_tokens: int
    pages: int
    least_pages: int
    cohort: int
    plans_ahead: bool


def choose_sizes(
    decoder: Decoder,
    config: EngineConfig,
    policy: SkipPolicy,
    max_model_len: int,
    cache_layers: int = 0,
    own_layers: int = 0,
) -> Sizes:
    """The configured sizes, rows and tokens shared out among the workers; what is left out is chosen here.

    max_model_len: positions of the longest row. cache_layers: of the KV cache, beside the model's own. own_layers:
    memory of other caches that grow with it, in layers.
    """
    cohort = config.cohort
    if cohort is None:
        cohort = COHORT if policy.depends_on_position else 0.0
    threads = torch.get_num_threads()
    backend, traits = decoder.backend, decoder.backend.traits
    workers = _workers(traits.worker_threads, threads, config.max_batch_rows)
    layout, layers = backend.layout, decoder.depth + cache_layers
    page_bytes = layout.page * KVCache.bytes_per_position(decoder.spec, 1, backend.dtype)
    share = config.memory_fraction or traits.memory_fraction
    room = config.kv_cache_gb * 1e9 if config.kv_cache_gb else share * backend.free_bytes()
    rows = (
        -(-config.max_batch_rows // workers)
        if config.max_batch_rows
        else best_rows(decoder, threads // workers)
    )
    tokens = config.max_batch_tokens or traits.step_tokens
    least = (layout.blocks(max_model_len) + 1) * layers  # and a block that it copies from
    return Sizes(
        workers=workers,
        threads_per_worker=threads // workers,
        batch_rows=rows,
        batch_tokens=max(tokens // workers, rows),
        pages=max(int(room / page_bytes * layers / (layers + own_layers)), least),
        least_pages=least,
        cohort=max(1, round(cohort * rows)),
        plans_ahead=traits.plans_ahead,
    )


def _workers(worker_threads: bool, threads: int, max_batch_rows: int | None) -> int:
    if not worker_threads:
        return 1
    return threads if max_batch_rows is None else max(1, min(threads, max_batch_rows // WORKER_ROWS))


def best_rows(decoder: Decoder, threads: int) -> int:
    """The smallest candidate that the next one does not beat by enough, by timed decode steps of one worker."""
    timings = Timings(decoder, threads, f"decode step at {KEY_BLOCK} positions")
    with decoder.backend.threads(threads):
        chosen, rate = 0, 0.0
        for rows in CANDIDATES:
            if rows > decoder.backend.traits.most_rows:
                break
            measured = rows / timings.seconds(rows, partial(_step_seconds, decoder, rows))
            if measured < rate * WORTH:
                break
            chosen, rate = rows, measured
    timings.keep()
    return chosen


def _step_seconds(decoder: Decoder, rows: int) -> float:
    """Of a greedy decode step of `rows` rows at one key block, with tokens of different ids: experts are chosen by
    them."""
    cache = decoder.new_cache()
    cache.fill(rows, KEY_BLOCK)
    index = torch.arange(rows, device=decoder.backend.device)
    zeros = torch.zeros_like(index)
    batch = TokenBatch(index % decoder.spec.vocab, zeros, index, [Span(0, 1, index, KEY_BLOCK)], index)
    return greedy_seconds(decoder, batch, cache)
