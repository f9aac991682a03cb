"""Attention over the cache's pages as one Triton kernel, for prompts, generated tokens and drafts alike.

A query's sums are made in an order that its own position decides: tiles of TILE keys from the first on, within
stretches of CHUNK keys that run side by side and are added up in their order. Tiles and stretches past what it sees
change no bit, and every product has one shape, however many queries there are. So its result depends on nothing
else: not on the batch, nor on how a prompt is cut. Query heads that share keys are rows of one product, so that a
key is read once for all of them.

Does not know layers or what a graph is. Runs on CPU under TRITON_INTERPRET=1, to test it.

Shapes: N queries, Hq = Hkv * G query heads, D head dim, T tiles of queries, S stretches.
"""

# Triton compiles what is written here, and knows types of its own.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KEY_BLOCK

ROWS = 64
"""Of a product: queries times the heads that share keys, each to a power of two."""
TILE = KEY_BLOCK
"""Keys of a product; a page holds a multiple."""
CHUNK = 1024
"""Keys that are added up one after another; a row that sees more has several multiprocessors work for it."""
VARYING = ["count", "table_row"]
"""Numbers, and addresses, that change from step to step: a kernel of its own for each kind of them would be
compiled in mid-run."""
ANYWHERE = ["table", "rows", "firsts", "widths", "positions"]


@dataclass(frozen=True)
class Tiles:
    """Successive queries of one row each. rows [T]: of the block table. firsts, widths [T], int32: the first query,
    and how many; None where each query is a tile. blocks: that any row's keys lie in, at most."""

    rows: Tensor
    firsts: Tensor | None
    widths: Tensor | None
    blocks: int


def queries_of_a_tile(shared: int) -> int:
    """How many, where so many heads share keys."""
    return ROWS // int(triton.next_power_of_2(shared))


def split_spans(starts: list[int], widths: list[int], stop: int, most: int) -> tuple[Any, Any]:
    """First query and number of queries of tiles of at most `most`. starts, widths: of spans whose rows bring so
    many queries each; stop: where the last one ends."""
    firsts, sizes = [], []
    for start, width, end in zip(starts, widths, [*starts[1:], stop], strict=True):
        within = np.arange(0, width, most)
        firsts.append((np.arange(start, end, width)[:, None] + within).ravel())
        sizes.append(np.tile(np.minimum(width - within, most), (end - start) // width))
    return np.concatenate(firsts), np.concatenate(sizes)


def tiles_of(
    table_rows: Tensor, starts: list[int], widths: list[int], stop: int, shared: int, blocks: int
) -> Tiles:
    """Those of spans of queries from the first on. table_rows [N]: of the queries."""
    if max(widths) == 1:
        return Tiles(table_rows, None, None, blocks)
    cut = split_spans(starts, widths, stop, queries_of_a_tile(shared))
    firsts, sizes = to_device(np.stack(cut), torch.int32, table_rows.device)
    return Tiles(table_rows[firsts], firsts, sizes, blocks)


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    tiles: Tiles,
    positions: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """q [N, Hq, D], keys and values [pages, Hkv, page, D], table [rows, blocks], positions [N] -> [N, Hq, D].

    A query sees the keys up to its position, or the last `window` of them; cap: softcap on scores.
    """
    count, heads, dim = q.shape
    _, kv_heads, page, _ = keys.shape
    stretches = -(-tiles.blocks * page // CHUNK)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, tops, totals = out, out, out
    if stretches > 1:
        parts = q.new_empty(stretches, count, heads, dim, dtype=torch.float32)
        tops, totals = q.new_empty(2, stretches, count, heads, dtype=torch.float32)
    shape = {
        "HEADS": heads,
        "SHARED": heads // kv_heads,
        "DIM": dim,
        "DIMS": max(triton.next_power_of_2(dim), 16),
        "WINDOW": window or 0,
        "CHUNK_KEYS": CHUNK,
        "SINGLE": stretches == 1,
    }
    wide = tiles.firsts is not None
    _attend[(len(tiles.rows), kv_heads, stretches)](
        q,
        keys,
        values,
        table,
        tiles.rows,
        tiles.firsts if wide else tiles.rows,
        tiles.widths if wide else tiles.rows,
        positions,
        out,
        parts,
        tops,
        totals,
        count,
        q.stride(0),
        q.stride(1),
        table.stride(0),
        scale,
        cap or 0.0,
        **shape,
        SHARED_ROWS=triton.next_power_of_2(heads // kv_heads),
        KV_HEADS=kv_heads,
        PAGE=page,
        ROWS_=ROWS,
        TILE_KEYS=TILE,
        WIDE=wide,
        CAPPED=cap is not None,
        num_warps=4,
        num_stages=2 if dim <= 128 else 1,
    )
    if stretches > 1:
        names = ("HEADS", "DIM", "DIMS", "WINDOW", "CHUNK_KEYS")
        _add_up[(count, heads)](
            positions, out, parts, tops, totals, count, **{name: shape[name] for name in names}, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def _attend(
    q,
    keys,
    values,
    table,
    rows,
    firsts,
    widths,
    positions,
    out,
    parts,
    tops,
    totals,
    count,
    q_token,
    q_head,
    table_row,
    scale,
    cap,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINGLE: tl.constexpr,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One tile of queries, one key-value head, one stretch of keys."""
    tile, kv_head, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, width = tile, 1
    if WIDE:
        first, width = tl.load(firsts + tile), tl.load(widths + tile)
    row = tl.load(rows + tile).to(tl.int64)
    at = tl.arange(0, ROWS_)
    query, member = at // SHARED_ROWS, at % SHARED_ROWS
    runs = query < width
    token = (first + query).to(tl.int64)
    position = tl.load(positions + token, mask=runs, other=-1).to(tl.int32)
    begin = stretch * CHUNK_KEYS
    end = tl.minimum(begin + CHUNK_KEYS, tl.max(position, 0) + 1)
    if WINDOW > 0:
        lowest = tl.min(tl.where(runs, position, 2147483647), 0) - (WINDOW - 1)
        begin = tl.maximum(begin, lowest // TILE_KEYS * TILE_KEYS)
    if begin < end:
        dims = tl.arange(0, DIMS)
        real = runs & (member < SHARED)
        head = kv_head * SHARED + member
        inside = dims < DIM
        own = tl.load(
            q + token[:, None] * q_token + head[:, None] * q_head + dims[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        top = tl.full([ROWS_], float("-inf"), tl.float32)
        total = tl.zeros([ROWS_], tl.float32)
        sums = tl.zeros([ROWS_, DIMS], tl.float32)
        for place in range(begin, end, TILE_KEYS):
            page = tl.load(table + row * table_row + place // PAGE).to(tl.int64)
            base = (page * KV_HEADS + kv_head) * (PAGE * DIM)
            key = tl.arange(0, TILE_KEYS)
            within = place % PAGE + key
            k = tl.load(keys + base + within[None, :] * DIM + dims[:, None], mask=inside[:, None], other=0.0)
            scores = tl.dot(own, k, input_precision="ieee") * scale
            if CAPPED:
                scores = cap * (2 / (1 + tl.exp(-2 * (scores / cap))) - 1)  # tanh
            distance = position[:, None] - (place + key)[None, :]
            seen = distance >= 0
            if WINDOW > 0:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - finite[:, None])
            keep = tl.exp(top - finite)
            total = total * keep + tl.sum(weights, 1)
            v = tl.load(
                values + base + within[:, None] * DIM + dims[None, :], mask=inside[None, :], other=0.0
            )
            sums = sums * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        line = token * HEADS + head
        stored = real[:, None] & inside[None, :]
        if SINGLE:
            result = sums / total[:, None]
            tl.store(out + line[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=stored)
        else:
            line += stretch.to(tl.int64) * count * HEADS
            tl.store(parts + line[:, None] * DIM + dims[None, :], sums, mask=stored)
            tl.store(tops + line, top, mask=real)
            tl.store(totals + line, total, mask=real)


@triton.jit(do_not_specialize=VARYING[:1], do_not_specialize_on_alignment=ANYWHERE[-1:])
def _add_up(
    positions,
    out,
    parts,
    tops,
    totals,
    count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
):
    """One query's head: its stretches in their order."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - (WINDOW - 1), 0) // CHUNK_KEYS
    dims = tl.arange(0, DIMS)
    inside = dims < DIM
    top = float("-inf")
    total = 0.0
    sums = tl.zeros([DIMS], tl.float32)
    for stretch in range(begin, position // CHUNK_KEYS + 1):
        line = (stretch * count + token) * HEADS + head
        own_top = tl.load(tops + line)
        higher = tl.maximum(top, own_top)
        keep, share = tl.exp(top - higher), tl.exp(own_top - higher)
        total = total * keep + tl.load(totals + line) * share
        sums = sums * keep + tl.load(parts + line * DIM + dims, mask=inside, other=0.0) * share
        top = higher
    tl.store(out + (token * HEADS + head) * DIM + dims, (sums / total).to(out.dtype.element_ty), mask=inside)
