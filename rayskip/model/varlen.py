"""Attention on CUDA: one call for all rows of a step, whatever their lengths, over the cache as it lies.

torch.nn.attention.varlen calls FlashAttention with a paged cache; a slot is one page. `num_splits=1` adds over a
row's keys in one order, whoever shares the batch. Does not know CUDA graphs, but does nothing that they forbid
where every row brings one token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import Group, Ops, TokenBatch
from rayskip.model.spec import Rope, Spec

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


def spans_of(batch: TokenBatch, count: int) -> Spans:
    """Those of the batch's first `count` tokens, which end with a group."""
    groups = [group for group in batch.groups if group.start < count]
    device, widest = batch.slots.device, max(group.width for group in groups)
    if widest == 1:
        starts = torch.arange(count + 1, device=device, dtype=torch.int32)
        newest, slots = batch.positions[:count], batch.slots[:count]
    else:
        begins = [start for group in groups for start in range(group.start, group.stop, group.width)]
        starts = torch.tensor([*begins, count], device=device, dtype=torch.int32)
        newest, slots = batch.positions[starts[1:] - 1], batch.slots[starts[:-1]]
    return Spans(starts, (newest + 1).int(), slots.int().unsqueeze(1), widest)


class VarlenOps(Ops):
    """Where drafts have branches, torch's attention serves: a token's keys then lie in no straight line."""

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
        if batch.paths is not None:
            return super().attention(q, k, v, rope, layer, window, batch, cache)
        q = self.turn_and_store(q, k, v, rope, layer, batch, cache)
        spans = batch.once(("spans", len(q)), lambda: spans_of(batch, len(q)))
        keys, values = (stored[layer].transpose(1, 2) for stored in (cache.keys, cache.values))
        out: Tensor = self._attend(
            q,
            keys,  # [slots, T, Hkv, D]
            values,
            spans.starts,
            None,
            spans.widest,
            cache.length,
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
    except (RuntimeError, NotImplementedError) as error:  # no kernel for this processor, or another interface
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
