"""CUDA graphs of the layers: one launch for what would be hundreds of them, for steps whose rows bring one token.

A graph is of fixed shapes and addresses: tokens are padded to a few sizes, and a cache whose block table grows
loses its graphs. Does not know what the layers compute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.token_batch import Span, TokenBatch

SIZES = (1, 2, 4, 8, *range(16, 128, 16), *range(128, 513, 32))
"""Tokens that graphs are made for; what lies between runs as the next larger one. More are worth no graph: they
keep a GPU busy for longer than their launches take."""
WARMUPS = 2
"""Runs before a graph is recorded: libraries choose kernels and take memory at first."""
MOST = 64
"""Graphs of a cache: a step of another kind then runs without one."""

Layers = Callable[[Tensor, TokenBatch, KVCache, int, int], Tensor]
"""Runs layers operation by operation: see `Stack.run`."""
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


Kind = tuple[int, int, int, tuple[bool, ...]]
"""Of a step: tokens, first and last layer, and which of the layers in between run."""


@dataclass(frozen=True)
class _Inputs:
    """x [N, d]: states; tokens [2, N]: positions and rows of the block table."""

    x: Tensor
    tokens: Tensor

    def fill(self, x: Tensor, batch: TokenBatch) -> None:
        """The step's tokens; in the places left over the last one again, which writes what it wrote already."""
        for own, given in (
            (self.x, x),
            (self.tokens[0], batch.positions),
            (self.tokens[1], batch.table_rows),
        ):
            own[: len(x)] = given
            own[len(x) :] = given[-1:]


@dataclass
class _OfCache:
    """Steps over a cache's tensors where they lie now: kinds seen, and graphs of those seen twice."""

    at: tuple[int, int, int, torch.Size]
    seen: set[Kind] = field(default_factory=set)
    graphs: dict[Kind, tuple[_Inputs, Tensor, Callable[[], None]]] = field(default_factory=dict)


class GraphedLayers:
    """Layers [first, last) of steps that have a graph."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._by_cache: WeakKeyDictionary[KVCache, _OfCache] = WeakKeyDictionary()

    def run(
        self, layers: Layers, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int
    ) -> Tensor | None:
        """The tokens' states [N, d] after the layers, in place; None where the step has no graph.

        That is where rows bring several tokens or drafts have branches, where there are too many tokens, where a
        layer runs some of them and not the others, or at the first step of a kind.
        """
        count, active = len(x), None if batch.active is None else batch.active[first:last]
        one_each = all(span.width == 1 for span in batch.spans) and batch.paths is None
        if not 0 < count <= SIZES[-1] or not one_each or not set(active or ()) <= {0, count}:
            return None
        at = cache.keys.data_ptr(), cache.values.data_ptr(), cache.table.data_ptr(), cache.table.shape
        own = self._by_cache.get(cache)
        if own is None or own.at != at:
            own = self._by_cache[cache] = _OfCache(at)
        runs = tuple(bool(tokens) for tokens in active) if active is not None else (True,) * (last - first)
        kind = SIZES[bisect_left(SIZES, count)], first, last, runs
        if kind not in own.graphs:
            if kind not in own.seen or len(own.graphs) == MOST:
                own.seen.add(kind)
                return None
            own.graphs[kind] = self._new(kind, layers, x, batch, cache)
        inputs, out, replay = own.graphs[kind]
        inputs.fill(x, batch)
        replay()
        return x.copy_(out[:count])

    def _new(
        self, kind: Kind, layers: Layers, x: Tensor, batch: TokenBatch, cache: KVCache
    ) -> tuple[_Inputs, Tensor, Callable[[], None]]:
        size, first, last, runs = kind
        inputs = _Inputs(x.new_empty(size, x.shape[1]), batch.table_rows.new_empty(2, size))
        positions, table_rows = inputs.tokens
        active = None if all(runs) else [0] * first + [size * own for own in runs]
        inputs.fill(x, batch)  # recording runs the layers a few times, and they write to the cache

        most = cache.table.shape[2] * cache.layout.page

        def work() -> Tensor:
            step = TokenBatch(
                table_rows[:0], positions, table_rows, [Span(0, 1, table_rows, most)], table_rows, active
            )
            return layers(inputs.x.clone(), step, cache, first, last)

        return inputs, *self._record(work)
