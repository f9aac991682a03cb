"""Attention on CUDA: one call for all rows of a step, whatever their lengths, over the cache as it lies.

torch.nn.attention.varlen calls FlashAttention with a paged cache; a slot is one page. `num_splits=1` adds over a
row's keys in one order, whoever shares the batch. Does not know CUDA graphs, but does nothing that they forbid
where every row brings one token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import Group, Ops, TokenBatch
from rayskip.model.spec import Rope, Spec
from rayskip.model.transfer import to_device

PAGE = 256
"""A page's positions are a multiple of this (FlashAttention 2)."""
WIDEST_HEAD = 256
"""Elements of a head that FlashAttention has kernels for, at most."""
TOLERANCE = 4e-2
"""By how much attention may differ from torch's, in bfloat16, on numbers of size one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spans:
    """Which queries belong together: starts [B + 1], where each row's begin; keys [B], positions that its last one
    sees; pages [B, 1]; widest: most queries of a row. All int32."""

    starts: Tensor
    keys: Tensor
    pages: Tensor
    widest: int


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
    return Spans(starts, (positions + 1).int(), slots.int().unsqueeze(1), widest)


class VarlenOps(Ops):
    """Every step takes the same kernel, so that a row's sums do not change when another row's draft has branches:
    keys of tokens in branches are first brought together, in their order."""

    name = "varlen"

    def __init__(self, spec: Spec, attend: Callable[..., Any] = varlen_attn) -> None:
        """attend: what does as `varlen_attn` is documented to."""
        super().__init__(spec)
        self._attend = attend

    def slot_length(self, length: int) -> int:
        return -(-length // PAGE) * PAGE

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
            return self._attend_pages(q, cache.keys[layer], cache.values[layer], spans, window)
        parts = []
        for index, group in enumerate(ran):
            own = q[group.start : group.stop]
            spans = batch.once(("span", index), partial(spans_of, batch, [group]))
            keys, values = cache.keys[layer], cache.values[layer]
            if group.width == 1:  # drafted tokens come one by one
                places = batch.paths.keys(
                    batch.positions, group.start, group.stop, self.slot_length(group.keys)
                )
                keys, values = cache.read_places(layer, group.slots, places.clamp(max=cache.length - 1))
                spans = replace(spans, pages=torch.arange(group.rows, device=q.device).int().unsqueeze(1))
            parts.append(self._attend_pages(own, keys, values, spans, window))
        return torch.cat(parts)

    def _attend_pages(
        self, q: Tensor, keys: Tensor, values: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """q [N, Hq, D], keys and values [pages, Hkv, T, D] -> [N, Hq * D]."""
        out: Tensor = self._attend(
            q,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            spans.starts,
            None,
            spans.widest,
            keys.shape[2],
            scale=self.spec.scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=self.spec.heads != self.spec.kv_heads,
            seqused_k=spans.keys,
            block_table=spans.pages,
            num_splits=1,
        )
        return out.flatten(1)


def varlen_ops(spec: Spec, dtype: torch.dtype, device: torch.device) -> Ops:
    """FlashAttention where it serves the model on this device and agrees with torch's attention, else that."""
    plain = Ops(spec)
    fits = (
        dtype in (torch.bfloat16, torch.float16) and spec.head_dim % 8 == 0 and spec.head_dim <= WIDEST_HEAD
    )
    if not fits or spec.attn_softcap is not None:
        return plain
    fast = VarlenOps(spec)
    try:
        expected, found = (_probe(ops, dtype, device) for ops in (plain, fast))
    except (RuntimeError, TypeError) as error:  # no kernel for this processor, or another interface
        _log.warning("torch's varlen_attn does not serve here (%s); attention is torch's, and slower", error)
        return plain
    if torch.allclose(found, expected, atol=TOLERANCE):
        return fast
    _log.warning(
        "torch's varlen_attn and torch's attention give other numbers here; the latter serves, slowly"
    )
    return plain


def _probe(ops: Ops, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two rows of 70 positions, of which the first 67 run together and the rest one by one."""
    spec, generator = ops.spec, torch.Generator().manual_seed(0)
    cache = KVCache(spec, 1, dtype, device)
    cache.resize(2, ops.slot_length(70))
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
