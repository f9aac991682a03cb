"""A GPU's backends: attention is one call for all rows of a step, whatever their lengths, over the cache's pages;
steps whose rows bring one token are CUDA graphs; what lies between products and attention is compiled.

Attention is FlashAttention's, by torch.nn.attention.varlen, where that reads pages; `num_splits=1` adds over a
row's keys in one order, whoever shares the batch. Else it is a kernel of our own (paged.py). Neither does what
graphs forbid where every row brings one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rayskip.model.backends.base import Head, Stack
from rayskip.model.backends.cuda import paged
from rayskip.model.backends.cuda.compiled import compile_pieces
from rayskip.model.backends.cuda.graphs import GraphedLayers, cuda_graphs
from rayskip.model.backends.torch import TorchBackend, TorchStack
from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache, Layout
from rayskip.model.spec import Attention, Dense, Experts, Layer, Spec, Weights
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
"""Whether it reads keys where they lie. Else they are first brought together, one row's after the other's, and our
own kernel goes before it."""


@dataclass(frozen=True)
class Stored:
    """What some tokens attend to: keys, values [pages, Hkv, page, D]. table: pages [rows, blocks], of the block
    table's rows; of the tokens, one by one, where their keys were `gathered`."""

    keys: Tensor
    values: Tensor
    table: Tensor
    gathered: bool = False


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
        if any(isinstance(layer.mlp, Experts) for layer in layers):
            return TorchStack(self, layers, stored_at)  # how many rows an expert runs is no graph's to know
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
        stored = Stored(cache.keys, cache.values, cache.table[layer])
        if batch.paths is None:
            return self.attend(q, batch, ran, stored, own.window)
        parts = []
        for span in ran:
            read = stored
            if span.width == 1:  # drafted tokens come one by one
                length = self.layout.blocks(span.keys) * self.layout.page
                places = batch.paths.keys(batch.positions, span.start, span.stop, length)
                keys, values = (
                    _in_pages(x, self.layout.page) for x in cache.read_places(layer, span.table_rows, places)
                )
                pages = torch.arange(len(keys), device=q.device, dtype=torch.int32)
                read = Stored(keys, values, pages.view(span.rows, -1), gathered=True)
            parts.append(self.attend(q[span.start : span.stop], batch, [span], read, own.window))
        return torch.cat(parts)

    def attend(
        self, q: Tensor, batch: TokenBatch, spans: Sequence[Span], stored: Stored, window: int | None
    ) -> Tensor:
        """q [N, Hq, D], the tokens of some spans side by side -> [N, Hq * D]."""
        segments = batch.once(
            ("segments", spans[0].start, spans[-1].stop), partial(segments_of, batch, spans)
        )
        table = stored.table if stored.gathered else stored.table[segments.rows, : segments.blocks]
        return self._attend_pages(q, stored.keys, stored.values, table, segments, window)

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

    @staticmethod
    def unfit(spec: Spec, dtype: torch.dtype) -> str | None:
        """What of a model it has no kernel for."""
        if dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention has no {str(dtype).removeprefix('torch.')}"
        if spec.head_dim % 8 or spec.head_dim > WIDEST_HEAD:
            return f"FlashAttention has no heads of {spec.head_dim} elements"
        if spec.attn_sinks:
            return "FlashAttention has no attention sinks"
        return None if spec.attn_softcap is None else "FlashAttention has no softcap on scores"


class PagedBackend(CudaBackend):
    """By our own kernel, which has softcaps, and heads of any size."""

    name = "triton"
    layout = Layout()

    def attend(
        self, q: Tensor, batch: TokenBatch, spans: Sequence[Span], stored: Stored, window: int | None
    ) -> Tensor:
        first, stop = spans[0].start, spans[-1].stop

        def tiles() -> paged.Tiles:
            starts, widths = [span.start - first for span in spans], [span.width for span in spans]
            shared, blocks = (
                self.spec.heads // self.spec.kv_heads,
                self.layout.blocks(max(span.keys for span in spans)),
            )
            return paged.tiles_of(batch.table_rows[first:stop], starts, widths, stop - first, shared, blocks)

        own = batch.once(("tiles", first, stop), tiles)
        if stored.gathered:
            own = replace(own, rows=torch.arange(stop - first, device=q.device))
        scale, cap = self.spec.scale, self.spec.attn_softcap
        positions = batch.positions[first:stop]
        out = paged.attend_pages(
            q, stored.keys, stored.values, stored.table, own, positions, scale, window, cap
        )
        return out.flatten(1)

    @staticmethod
    def unfit(spec: Spec, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return CudaBackend.unfit(spec, dtype)
        if spec.attn_sinks:
            return "our kernel has no attention sinks"
        fits = spec.heads // spec.kv_heads <= paged.ROWS and spec.head_dim <= WIDEST_HEAD
        return None if fits else f"our kernel has no {spec.heads} heads of {spec.head_dim} elements"


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


def _in_pages(stored: Tensor, page: int) -> Tensor:
    """[B, Hkv, blocks * page, D] -> [B * blocks, Hkv, page, D]."""
    rows, heads, length, dim = stored.shape
    return stored.view(rows, heads, length // page, page, dim).transpose(1, 2).flatten(0, 1)


def cuda_backend(spec: Spec, dtype: torch.dtype, device: torch.device) -> TorchBackend:
    """The first whose attention serves the model on this device and agrees with torch's, else torch's."""
    kinds = (CudaBackend, PagedBackend) if PAGED else (PagedBackend, CudaBackend)
    reasons = []
    for kind in kinds:
        if (reason := kind.unfit(spec, dtype)) is None:
            fast = kind(spec, dtype, device)
            if (reason := _fault(fast)) is None:
                return fast
        reasons.append(reason)
    said = "; ".join(dict.fromkeys(reasons))
    return TorchBackend(spec, dtype, device, [f"attention is torch's, which is slower: {said}"])


def _fault(fast: CudaBackend) -> str | None:
    """Why a backend's attention does not serve here, if it does not."""
    what = {"varlen": "torch's varlen_attn", "triton": "our kernel"}[fast.name]
    try:
        expected, found = (_probe(own) for own in (TorchBackend(fast.spec, fast.dtype, fast.device), fast))
    except (
        Exception
    ) as error:  # no kernel for this processor, another interface, whatever a compiler may raise
        return f"{what} does not serve here ({error})"
    if torch.allclose(found, expected, atol=TOLERANCE):
        return None
    return f"{what} is off by up to {float((found - expected).abs().max()):.2g} here"


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
