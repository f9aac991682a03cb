"""CUDA graphs of the layers: one launch for what would be hundreds of them, for steps whose rows bring one token.

A graph is of fixed shapes and addresses: tokens are padded to a few sizes, and a cache that is resized loses its
graphs. Does not know what the layers compute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import Group, TokenBatch

SIZES = (1, 2, 4, 8, *range(16, 128, 16), *range(128, 513, 32))
"""Tokens that graphs are made for; what lies between runs as the next larger one. More are worth no graph: they
keep a GPU busy for longer than their launches take."""
WARMUPS = 2
"""Runs before a graph is recorded: libraries choose kernels and take memory at first."""

Layers = Callable[[Tensor, TokenBatch, KVCache, int, int], Tensor]
"""Decoder.run_layers."""
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Runs something once and returns where its result lies, and what runs the same again, into the same place."""


def cuda_graphs() -> Record:
    """`Record` that makes CUDA graphs, all in one pool of memory: of each, only the newest result is wanted."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            out = work()
        return out, graph.replay

    return record


@dataclass(frozen=True)
class _Graph:
    """x [N, d] and tokens [3, N] (ids, positions, slots) are its inputs, out [N, d] its result after `replay`."""

    x: Tensor
    tokens: Tensor
    out: Tensor
    replay: Callable[[], None]


@dataclass
class _OfCache:
    """Graphs over a cache's tensors where they lie now, by tokens, layers and which of those run."""

    at: tuple[int, torch.Size]
    graphs: dict[tuple[int, int, int, tuple[bool, ...]], _Graph] = field(default_factory=dict)


class GraphedLayers:
    """Layers [first, last) of steps that have a graph."""

    def __init__(self, layers: Layers, record: Record) -> None:
        self._layers = layers
        self._record = record
        self._by_cache: WeakKeyDictionary[KVCache, _OfCache] = WeakKeyDictionary()

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor | None:
        """The tokens' states [N, d] after the layers; None where the step has no graph.

        That is where rows bring several tokens or drafts have branches, where there are too many tokens, or where a
        layer runs some of them and not the others.
        """
        count, active = len(x), None if batch.active is None else batch.active[first:last]
        one_each = all(group.width == 1 for group in batch.groups) and batch.paths is None
        if not 0 < count <= SIZES[-1] or not one_each or not set(active or ()) <= {0, count}:
            return None
        runs = tuple(bool(own) for own in active) if active is not None else (True,) * (last - first)
        at = cache.keys.data_ptr(), cache.keys.shape
        own = self._by_cache.get(cache)
        if own is None or own.at != at:
            own = self._by_cache[cache] = _OfCache(at)
        size = SIZES[bisect_left(SIZES, count)]
        key = size, first, last, runs
        if key not in own.graphs:
            own.graphs[key] = self._new(size, x, batch, cache, first, last, runs)
        graph = own.graphs[key]
        _fill(graph, x, batch)
        graph.replay()
        x.copy_(graph.out[:count])
        return x

    def _new(
        self,
        size: int,
        x: Tensor,
        batch: TokenBatch,
        cache: KVCache,
        first: int,
        last: int,
        runs: tuple[bool, ...],
    ) -> _Graph:
        inputs, tokens = x.new_empty(size, x.shape[1]), batch.slots.new_empty(3, size)
        ids, positions, slots = tokens
        active = [0] * first + [size * own for own in runs]
        group = Group(0, 1, slots, cache.length)
        graph = _Graph(inputs, tokens, inputs, lambda: None)
        _fill(graph, x, batch)  # what is recorded runs, too, and writes to the cache

        def work() -> Tensor:
            step = TokenBatch(ids, positions, slots, [group], slots, None if all(runs) else active)
            return self._layers(inputs.clone(), step, cache, first, last)

        return _Graph(inputs, tokens, *self._record(work))


def _fill(graph: _Graph, x: Tensor, batch: TokenBatch) -> None:
    """The step's tokens; the last one again in the places left over, which writes to the cache what it wrote."""
    count = len(x)
    graph.x[:count] = x
    graph.x[count:] = x[-1:]
    for own, given in zip(graph.tokens, (batch.token_ids, batch.positions, batch.slots), strict=True):
        own[:count] = given
        own[count:] = given[-1:]
