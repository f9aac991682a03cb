"""A GPU's backend: attention is one call for all rows of a step, whatever their lengths, over the cache's pages;
steps whose rows bring one token are CUDA graphs; what lies between products and attention is compiled.

torch.nn.attention.varlen calls FlashAttention. `num_splits=1` adds over a row's keys in one order, whoever shares
the batch. Attention does nothing that graphs forbid where every row brings one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rayskip.model.backends.base import Head, Stack
from rayskip.model.backends.cuda.compiled import compile_pieces
from rayskip.model.backends.cuda.graphs import GraphedLayers, cuda_graphs
from rayskip.model.backends.torch import TorchBackend, TorchStack
from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache, Layout
from rayskip.model.spec import Attention, Dense, Layer, Spec, Weights
from rayskip.model.token_batch import Span, TokenBatch

PAGE = 256
"""A page's positions are a multiple of this (FlashAttention 2)."""
WIDEST_HEAD = 256
"""Elements of a head that FlashAttention has kernels for, at most."""
TOLERANCE = 4e-2
"""By how much attention may differ from torch's, in bfloat16, on numbers of size one."""
OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
"""What torch's call can be told. Where it cannot be told of splits or grouped heads (torch 2.11), it makes none,
and takes any heads."""
PAGED = "block_table" in OPTIONS
"""Whether it reads keys where they lie. Else they are first brought together, one row's after the other's."""


@dataclass(frozen=True)
class Segments:
    """Which queries belong together: starts [B + 1], where each row's begin; keys [B], positions that its last one
    sees; key_starts [B + 1], where each row's begin, one row's after the other's; all int32. rows [B]: of the block
    table. widest: most queries of a row; blocks: that any row's keys lie in, at most."""

    starts: Tensor
    keys: Tensor
    key_starts: Tensor
    rows: Tensor
    widest: int
    blocks: int

    @cached_property
    def each_key(self) -> tuple[Tensor, Tensor]:
        """Which of the rows, and position, of each key, one row's after the other's, [B * blocks * PAGE]: as many
        as there may be, since nothing here waits to know how many there are."""
        longest = self.blocks * PAGE
        index = torch.arange(len(self.keys) * longest, device=self.keys.device, dtype=torch.int32)
        row = torch.searchsorted(self.key_starts[1:-1], index, right=True)
        return row, (index - self.key_starts[row]).clamp(max=longest - 1)


def segments_of(batch: TokenBatch, spans: Sequence[Span]) -> Segments:
    """Those of some of the batch's spans that lie side by side."""
    first, stop = spans[0].start, spans[-1].stop
    device, widest = batch.table_rows.device, max(span.width for span in spans)
    positions, table_rows = batch.positions[first:stop], batch.table_rows[first:stop]
    if widest == 1:
        starts = torch.arange(stop - first + 1, device=device, dtype=torch.int32)
    else:
        begins = [start - first for span in spans for start in range(span.start, span.stop, span.width)]
        starts = to_device([*begins, stop - first], torch.int32, device)
        positions, table_rows = positions[starts[1:] - 1], table_rows[starts[:-1]]
    keys = (positions + 1).int()
    key_starts = F.pad(keys.cumsum(0, dtype=torch.int32), (1, 0))
    blocks = CudaBackend.layout.blocks(max(span.keys for span in spans))
    return Segments(starts, keys, key_starts, table_rows, widest, blocks)


class CudaBackend(TorchBackend):
    """Every step takes the same kernel, so that a row's sums do not change when another row's draft has branches:
    keys of tokens in branches are first brought together, in their order."""

    name = "varlen"
    layout = Layout(PAGE)

    def load(self, weights: Weights) -> tuple[Stack, Head]:
        loaded = super().load(weights)
        if reason := compile_pieces(self):
            self.warnings.append(reason)
        return loaded

    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        return GraphedStack(self, layers, stored_at, GraphedLayers(cuda_graphs()))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Attention,
        layer: int,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        q = self.turn_and_store(q, k, v, own.rope, layer, batch, cache)
        ran = [span for span in batch.spans if span.start < len(q)]
        if batch.paths is None:
            segments = batch.once(("segments", len(ran)), partial(segments_of, batch, ran))
            table = cache.table[layer, segments.rows, : segments.blocks]
            return self._attend_pages(q, cache.keys, cache.values, table, segments, own.window)
        parts = []
        for index, span in enumerate(ran):
            queries = q[span.start : span.stop]
            segments = batch.once(("segment", index), partial(segments_of, batch, [span]))
            keys, values = cache.keys, cache.values
            table = cache.table[layer, segments.rows, : segments.blocks]
            if span.width == 1:  # drafted tokens come one by one
                places = batch.paths.keys(batch.positions, span.start, span.stop, segments.blocks * PAGE)
                keys, values = (_in_pages(x) for x in cache.read_places(layer, span.table_rows, places))
                table = torch.arange(len(keys), device=q.device, dtype=torch.int32).view(span.rows, -1)
            parts.append(self._attend_pages(queries, keys, values, table, segments, own.window))
        return torch.cat(parts)

    def _attend_pages(
        self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, segments: Segments, window: int | None
    ) -> Tensor:
        """q [N, Hq, D], keys and values [pages, Hkv, PAGE, D], table [B, blocks] -> [N, Hq * D]."""
        options: dict[str, Any] = {"enable_gqa": self.spec.heads != self.spec.kv_heads, "num_splits": 1}
        if PAGED:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            options |= {"seqused_k": segments.keys, "block_table": table}
        else:
            row, position = segments.each_key
            pages, within = table[row, position // PAGE], position % PAGE
            keys, values = keys[pages, :, within], values[pages, :, within]
        out = varlen_attn(
            q,
            keys,
            values,
            segments.starts,
            segments.key_starts,
            segments.widest,
            segments.blocks * PAGE,
            scale=self.spec.scale,
            window_size=(-1 if window is None else window - 1, 0),
            **{name: value for name, value in options.items() if name in OPTIONS},
        )
        return cast(Tensor, out).flatten(1)


class GraphedStack(TorchStack):
    """Runs a step's layers as a CUDA graph, where there is one of its kind."""

    def __init__(
        self, backend: CudaBackend, layers: Sequence[Layer], stored_at: int, graphs: GraphedLayers
    ) -> None:
        super().__init__(backend, layers, stored_at)
        self._graphs = graphs

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        done = self._graphs.run(super().run, x, batch, cache, first, last)
        return super().run(x, batch, cache, first, last) if done is None else done


def _in_pages(stored: Tensor) -> Tensor:
    """[B, Hkv, blocks * PAGE, D] -> [B * blocks, Hkv, PAGE, D]."""
    rows, heads, length, dim = stored.shape
    return stored.view(rows, heads, length // PAGE, PAGE, dim).transpose(1, 2).flatten(0, 1)


def cuda_backend(spec: Spec, dtype: torch.dtype, device: torch.device) -> TorchBackend:
    """FlashAttention where it serves the model on this device and agrees with torch's attention, else that."""
    if reason := _unfit(spec, dtype):
        return _torchs(spec, dtype, device, f"FlashAttention has no {reason}")
    fast = CudaBackend(spec, dtype, device)
    try:
        expected, found = (_probe(backend) for backend in (TorchBackend(spec, dtype, device), fast))
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # no kernel for this processor, or another interface
        return _torchs(spec, dtype, device, f"its varlen_attn does not serve here ({error})")
    if torch.allclose(found, expected, atol=TOLERANCE):
        return fast
    most = float((found - expected).abs().max())
    return _torchs(spec, dtype, device, f"its varlen_attn is off by up to {most:.2g} here")


def _torchs(spec: Spec, dtype: torch.dtype, device: torch.device, reason: str) -> TorchBackend:
    return TorchBackend(spec, dtype, device, [f"attention is torch's, which is slower: {reason}"])


def _unfit(spec: Spec, dtype: torch.dtype) -> str | None:
    """What of a model FlashAttention has no kernel for."""
    if dtype not in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    if spec.head_dim % 8 or spec.head_dim > WIDEST_HEAD:
        return f"heads of {spec.head_dim} elements"
    return None if spec.attn_softcap is None else "softcap on scores"


def _probe(backend: TorchBackend) -> Tensor:
    """Attention of two rows of 70 positions, of which the first 67 run together and the rest one by one."""
    spec, dtype, device = backend.spec, backend.dtype, backend.device
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(spec, 1, backend)
    cache.fill(2, 70)
    table_rows = torch.arange(2, device=device)
    own = Attention(Dense(torch.empty(0)), Dense(torch.empty(0)), rope=None)
    found = []
    for start, stop in ((0, 67), (67, 68), (68, 69), (69, 70)):
        width = stop - start
        positions = torch.arange(start, stop, device=device).repeat(2)
        batch = TokenBatch(
            positions,
            positions,
            table_rows.repeat_interleave(width),
            [Span(0, width, table_rows, 128)],
            table_rows,
        )
        q, k, v = (
            torch.randn(2 * width, heads, spec.head_dim, generator=generator).to(device, dtype)
            for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
        )
        found.append(backend.attention(q, k, v, own, 0, batch, cache))
    return torch.cat(found).float()
