"""What the machine allows: the matrix products of a decode step at the rate measured for them, and the keys and
values that it reads at the measured bandwidth of memory.

The rest is counted as free (where layers run together, all but attention to earlier positions is in their time),
and the two as one after the other. Does not know how an engine shares out its work: everything runs on all threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from rayskip.model.cache.kv_cache import KVCache, key_blocks
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import Span, TokenBatch

REPEATS = 3
READ_BYTES = 1 << 29
"""Read to measure the bandwidth: much more than caches hold."""


@dataclass(frozen=True)
class Roofline:
    """rows: tokens in a decode step, one a row. layers_s, head_s: seconds of the products of all layers, and of
    what the head says of every row. read_bytes_s: bytes a second read from memory."""

    rows: int
    layers_s: float
    head_s: float
    read_bytes_s: float

    def tok_s(self, decoder: Decoder, length: float, mean_layers: float) -> float:
        """Most tokens a second for rows of `length` positions, of which a token runs `mean_layers` layers."""
        per_layer = KVCache.bytes_per_position(decoder.spec, 1, decoder.backend.dtype)
        positions = sum(min(length, window or length) for window in decoder.held.windows)
        layers_s = self.layers_s + self.rows * positions * per_layer / self.read_bytes_s
        return self.rows / (layers_s * mean_layers / decoder.depth + self.head_s)


def measure_roofline(decoder: Decoder, rows: int, greedy: bool) -> Roofline:
    """Medians of several measurements, on as many threads as torch has here.

    greedy: the highest logits are enough, which takes less than all of them (see Decoder.scores).
    The layers' products are timed one by one, and in a run of the layers over tokens that attend to themselves
    alone: where that is one call and rows are few it takes less, although norms and gates are in it, and so it does
    where layers have experts, each of which runs some of the rows there.
    """
    backend, layers = decoder.backend, decoder.layers.linears
    inputs = {
        width: torch.randn(rows, width, device=backend.device).to(backend.dtype)  # [rows, width]
        for width in {linear.in_features for linear in layers}
    }
    first = torch.zeros(rows, dtype=torch.long, device=backend.device)
    batch = TokenBatch(first, first, first, [Span(0, 1, first, key_blocks(1))], first)
    cache = decoder.new_cache()
    cache.fill(1, 1)
    states = inputs[decoder.spec.hidden]
    full = [] if greedy else range(rows)

    def products() -> Tensor:
        for linear in layers:
            y = linear(inputs[linear.in_features])
        return y

    def layers_together() -> Tensor:
        return decoder.run_layers(states.clone(), batch, cache, 0, decoder.depth)

    parts = (
        lambda: decoder.head_output(states, full).best,
        products,
        layers_together,
    )
    with torch.inference_mode(), backend.threads(torch.get_num_threads()):
        # in turns, so that a product finds its weights where a step does: not in a cache
        rounds = [[_seconds(part) for part in parts] for _ in range(REPEATS)]
    head_s, *layers_s = (median(own) for own in zip(*rounds, strict=True))
    return Roofline(rows, min(layers_s), head_s, read_bandwidth(backend.device))


def _seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run().flatten()[0].item()  # waits for the device
    return time.perf_counter() - began


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing up a tensor that lies in memory; the median of several times."""
    stored = torch.ones(READ_BYTES // 4, device=device)  # not zeros, which may be one page for all
    rates = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        stored.sum().item()
        rates.append(READ_BYTES / (time.perf_counter() - began))
    return median(rates)
