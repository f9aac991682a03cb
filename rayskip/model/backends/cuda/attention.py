"""Attention on CUDA: one call for all rows of a step, whatever their lengths, over the cache's pages.

torch.nn.attention.varlen calls FlashAttention. `num_splits=1` adds over a row's keys in one order, whoever shares
the batch. Does not know CUDA graphs, but does nothing that they forbid where every row brings one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache, Layout
from rayskip.model.ops import Group, Ops, TokenBatch
from rayskip.model.spec import Rope, Spec

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
class Spans:
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


def spans_of(batch: TokenBatch, groups: Seq[Group]) -> Spans:
    """Those of some of the batch's groups that lie side by side."""
    first, stop = groups[0].start, groups[-1].stop
    device, widest = batch.slots.device, max(group.width for group in groups)
    positions, slots = batch.positions[first:stop], batch.slots[first:stop]
    if widest == 1:
        starts = torch.arange(stop - first + 1, device=device, dtype=torch.int32)
    else:
        begins = [start - first for group in groups for start in range(group.start, group.stop, group.width)]
        starts = to_device([*begins, stop - first], torch.int32, device)
        positions, slots = positions[starts[1:] - 1], slots[starts[:-1]]
    keys = (positions + 1).int()
    key_starts = F.pad(keys.cumsum(0, dtype=torch.int32), (1, 0))
    blocks = VarlenOps.layout.blocks(max(group.keys for group in groups))
    return Spans(starts, keys, key_starts, slots, widest, blocks)


class VarlenOps(Ops):
    """Every step takes the same kernel, so that a row's sums do not change when another row's draft has branches:
    keys of tokens in branches are first brought together, in their order."""

    name = "varlen"
    layout = Layout(PAGE)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rope | None,
        layer: int,
        window: int | None,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        q = self.turn_and_store(q, k, v, rope, layer, batch, cache)
        ran = [group for group in batch.groups if group.start < len(q)]
        if batch.paths is None:
            spans = batch.once(("spans", len(ran)), partial(spans_of, batch, ran))
            table = cache.table[layer, spans.rows, : spans.blocks]
            return self._attend_pages(q, cache.keys, cache.values, table, spans, window)
        parts = []
        for index, group in enumerate(ran):
            own = q[group.start : group.stop]
            spans = batch.once(("span", index), partial(spans_of, batch, [group]))
            keys, values, table = cache.keys, cache.values, cache.table[layer, spans.rows, : spans.blocks]
            if group.width == 1:  # drafted tokens come one by one
                places = batch.paths.keys(batch.positions, group.start, group.stop, spans.blocks * PAGE)
                keys, values = (_in_pages(own) for own in cache.read_places(layer, group.slots, places))
                table = torch.arange(len(keys), device=q.device, dtype=torch.int32).view(group.rows, -1)
            parts.append(self._attend_pages(own, keys, values, table, spans, window))
        return torch.cat(parts)

    def _attend_pages(
        self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """q [N, Hq, D], keys and values [pages, Hkv, PAGE, D], table [B, blocks] -> [N, Hq * D]."""
        options: dict[str, Any] = {"enable_gqa": self.spec.heads != self.spec.kv_heads, "num_splits": 1}
        if PAGED:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            options |= {"seqused_k": spans.keys, "block_table": table}
        else:
            row, position = spans.each_key
            pages, within = table[row, position // PAGE], position % PAGE
            keys, values = keys[pages, :, within], values[pages, :, within]
        out = varlen_attn(
            q,
            keys,
            values,
            spans.starts,
            spans.key_starts,
            spans.widest,
            spans.blocks * PAGE,
            scale=self.spec.scale,
            window_size=(-1 if window is None else window - 1, 0),
            **{name: value for name, value in options.items() if name in OPTIONS},
        )
        return cast(Tensor, out).flatten(1)


def _in_pages(stored: Tensor) -> Tensor:
    """[B, Hkv, blocks * PAGE, D] -> [B * blocks, Hkv, PAGE, D]."""
    rows, heads, length, dim = stored.shape
    return stored.view(rows, heads, length // PAGE, PAGE, dim).transpose(1, 2).flatten(0, 1)


def varlen_ops(spec: Spec, dtype: torch.dtype, device: torch.device) -> Ops:
    """FlashAttention where it serves the model on this device and agrees with torch's attention, else that."""
    if reason := _unfit(spec, dtype):
        return Ops(spec, f"attention is torch's, which is slower: FlashAttention has no {reason}")
    fast = VarlenOps(spec)
    try:
        expected, found = (_probe(ops, dtype, device) for ops in (Ops(spec), fast))
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # no kernel for this processor, or another interface
        return Ops(
            spec, f"attention is torch's, which is slower: its varlen_attn does not serve here ({error})"
        )
    if torch.allclose(found, expected, atol=TOLERANCE):
        return fast
    most = float((found - expected).abs().max())
    return Ops(
        spec, f"attention is torch's, which is slower: its varlen_attn is off by up to {most:.2g} here"
    )


def _unfit(spec: Spec, dtype: torch.dtype) -> str | None:
    """What of a model FlashAttention has no kernel for."""
    if dtype not in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    if spec.head_dim % 8 or spec.head_dim > WIDEST_HEAD:
        return f"heads of {spec.head_dim} elements"
    return None if spec.attn_softcap is None else "softcap on scores"


def _probe(ops: Ops, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two rows of 70 positions, of which the first 67 run together and the rest one by one."""
    spec, generator = ops.spec, torch.Generator().manual_seed(0)
    cache = KVCache(spec, 1, dtype, device, ops.layout)
    cache.fill(2, 70)
    slots = torch.arange(2, device=device)
    found = []
    for start, stop in ((0, 67), (67, 68), (68, 69), (69, 70)):
        width = stop - start
        positions = torch.arange(start, stop, device=device).repeat(2)
        batch = TokenBatch(
            positions, positions, slots.repeat_interleave(width), [Group(0, width, slots, 128)], slots
        )
        q, k, v = (
            torch.randn(2 * width, heads, spec.head_dim, generator=generator).to(device, dtype)
            for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
        )
        found.append(ops.attention(q, k, v, None, 0, None, batch, cache))
    return torch.cat(found).float()
