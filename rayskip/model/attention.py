"""Softmax attention over cached keys, and whether it is batch-invariant on this machine.

A query's result must be the same bits whatever runs beside it (architecture invariant 3): masked positions add
exact zeros, and every query is its own row of each product. That rests on the library's kernels, so it is
measured in the model's own shapes; the answer goes into the job's report.

Shapes: R rows, Hkv key-value heads, M query rows per head, D head dim, T key positions.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rayskip.model.kv_cache import KEY_BLOCK
from rayskip.model.spec import Spec

POSITIONS = (0, 5, 31, 32, 77, 130)
WIDTHS = (1, 2, 7, 16, 33)
ROWS = (1, 3, 16)
LENGTH = 192


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None = None) -> Tensor:
    """q [R, Hkv, M, D] (already scaled), keys [R, Hkv, D, T], values [R, Hkv, T, D] -> [R, Hkv, M, D].

    mask: 0 or -inf, broadcast over heads, [R, 1, M, T]; cap: softcap on the scores (Gemma 2).
    """
    scores = torch.matmul(q, keys)
    if cap is not None:
        scores = softcap(scores, cap)
    share = torch.softmax(scores + mask, dim=-1, dtype=torch.float32)
    return torch.matmul(share.to(values.dtype), values)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): Gemma 2's bound on scores and logits."""
    return torch.tanh(x / cap) * cap


def causal_mask(positions: Tensor, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, -inf elsewhere; positions [R, M] of the queries -> [R, 1, M, keys]."""
    query = positions.unsqueeze(-1)
    key = torch.arange(keys, device=positions.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
    return mask.unsqueeze(1)


def is_batch_invariant(spec: Spec, dtype: torch.dtype, device: torch.device) -> bool:
    """True when a query's result is bit-equal alone, in a batch, in a prefill chunk and behind more padding."""
    return _measured(spec.heads // spec.kv_heads, spec.kv_heads, spec.head_dim, dtype, device)


@cache
def _measured(per_head: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = max(ROWS)
    queries = torch.randn(rows, kv_heads, LENGTH, per_head, dim, generator=generator).to(device, dtype)
    keys = torch.randn(rows, kv_heads, dim, LENGTH, generator=generator).to(device, dtype)
    values = torch.randn(rows, kv_heads, LENGTH, dim, generator=generator).to(device, dtype)

    def run(start: int, width: int, count: int, length: int) -> Tensor:
        q = queries[:count, :, start : start + width].flatten(2, 3) * dim**-0.5
        positions = torch.arange(start, start + width, device=device).repeat_interleave(per_head)
        mask = causal_mask(positions.expand(count, -1), length, None, dtype)
        out = attend(q, keys[:count, :, :, :length], values[:count, :, :length], mask)[0]
        return out.view(kv_heads, width, per_head, dim)

    for position in POSITIONS:
        alone = run(position, 1, 1, (position // KEY_BLOCK + 1) * KEY_BLOCK)[:, 0]
        for width in WIDTHS:
            start = max(0, position - width // 2)
            if not all(
                torch.equal(run(start, width, count, LENGTH)[:, position - start], alone) for count in ROWS
            ):
                return False
    return True
