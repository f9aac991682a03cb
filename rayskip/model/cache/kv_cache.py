"""Keys and values in pages of fixed size, and the block table that says which pages a row's positions lie in.

A page holds one layer's keys and values of some successive positions. Does not know who owns a page: rows that
share a prefix share its pages, and whoever hands pages out (blocks.py) says so with `assign`.

Shapes: L layers, B pages, R rows of the table, P positions per page, Hkv key-value heads, D head dim, N tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rayskip.model.spec import Spec

KEY_BLOCK = 64
"""Attention reads key positions in multiples of this. In torch, a sum over fewer than 16 positions takes
another kernel, with another order of addition; past one block, trailing masked positions change no bit."""

NULL = 0
"""Page that belongs to nobody: what a row does not have is said to lie there."""
TABLE_ROWS, TABLE_BLOCKS = 16, 8
"""The table grows by at least so much."""
ALL = slice(None)


def key_blocks(length: int) -> int:
    """Positions read for a row of `length` positions."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


@dataclass(frozen=True)
class Panels:
    """Positions as the kernels multiply them (backends/cpu/kernels/heads.h). columns: whose keys lie side by side.
    depth: dims of a key, and positions of values, whose products are added at once."""

    columns: int
    depth: int


@dataclass(frozen=True)
class Layout:
    """Of a page, as what reads it needs it. page: positions, a multiple of KEY_BLOCK and of the panels' sizes."""

    page: int = KEY_BLOCK
    panels: Panels | None = None

    def blocks(self, length: int) -> int:
        """Pages that hold `length` positions of one layer."""
        return -(-length // self.page)


@dataclass(frozen=True)
class Assignment:
    """Block `block` of row `row` of the table lies in `pages`, one for each of `layers`; other layers have none."""

    row: int
    block: int
    layers: Seq[int]
    pages: Seq[int]


class Memory(Protocol):
    """Where tensors lie, and how its pages are read there."""

    dtype: torch.dtype
    layout: Layout

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def tensor(self, values: Any, dtype: torch.dtype = torch.long) -> Tensor: ...


class Pages:
    """The memory of pages: see `KVCache`, whose keys and values these are. Caches of several threads may share it:
    each writes to pages that it was given, and none allocates others while another one uses these."""

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0)
        self.lock = threading.Lock()


class KVCache:
    """keys, values [B, Hkv, P, D]; in panels, keys [B, Hkv, P / columns, D / depth, columns, depth] and values
    [B, Hkv, P / depth, D, depth]. table [L, R, blocks], int32: the page of each block of each row.

    Positions past a row's length hold stale but finite numbers; attention masks them.
    """

    def __init__(self, spec: Spec, layers: int, memory: Memory) -> None:
        self.layout = memory.layout
        self.layers = layers
        self._heads, self._dim = spec.kv_heads, spec.head_dim
        self._memory = memory
        self._stored = Pages()
        self.table = memory.zeros((layers, 0, 0), torch.int32)

    def with_own_table(self) -> KVCache:
        """A cache of the same pages with an empty block table, for rows of another thread."""
        other = copy(self)
        other.table = self._memory.zeros((self.layers, 0, 0), torch.int32)
        return other

    @property
    def keys(self) -> Tensor:
        return self._stored.keys

    @property
    def values(self) -> Tensor:
        return self._stored.values

    @staticmethod
    def bytes_per_position(spec: Spec, layers: int, dtype: torch.dtype) -> int:
        """Memory of one position of so many layers."""
        return 2 * layers * spec.kv_heads * spec.head_dim * dtype.itemsize

    @property
    def pages(self) -> int:
        """How many there are, NULL not among them."""
        return max(self.keys.shape[0] - 1, 0)

    def allocate(self, pages: int) -> None:
        """Have so many pages, numbered from 1: all zero, if there were not as many. 0 gives all memory back."""
        with self._stored.lock:
            if pages == self.pages:
                return
            self._stored.keys = self._stored.values = torch.empty(0)  # lets go of the old ones first
            if not pages:
                return
            count, page, panels = pages + 1, self.layout.page, self.layout.panels
            keys: tuple[int, ...] = (count, self._heads, page, self._dim)
            values = keys
            if panels is not None:
                columns, depth = panels.columns, panels.depth
                keys = (count, self._heads, page // columns, self._dim // depth, columns, depth)
                values = (count, self._heads, page // depth, self._dim, depth)
            new = self._zeros(keys), self._zeros(values)
            self._stored.keys, self._stored.values = new

    def fill(self, rows: int, length: int) -> None:
        """Give each of `rows` rows pages of its own for `length` positions in every layer, and have no others."""
        blocks = self.layout.blocks(length)
        count = self.layers * rows * blocks
        self.allocate(count)
        own = torch.arange(1, count + 1, dtype=torch.int32).view(self.layers, rows, blocks)
        self.table = self._memory.zeros((self.layers, rows, blocks), torch.int32)
        self.table.copy_(own)

    def assign(self, assignments: Seq[Assignment]) -> None:
        """Enter blocks into the table, in the order given."""
        if not assignments:
            return
        self._grow(
            1 + max(own.row for own in assignments),
            1 + max(own.block for own in assignments),
        )
        newest = {(own.row, own.block): own for own in assignments}
        places = np.array([*newest]).T
        entries = np.full((self.layers, len(newest)), NULL, np.int32)
        for at, own in enumerate(newest.values()):
            entries[own.layers, at] = own.pages
        rows, blocks = self._memory.tensor(places)
        self.table[:, rows, blocks] = self._memory.tensor(entries, torch.int32)

    def clear(self, pages: Seq[int]) -> None:
        """Zeros in place of numbers that are not finite: masked positions are read, and 0 times NaN is NaN."""
        if pages:
            at = self._memory.tensor(list(pages))
            self.keys[at] = 0
            self.values[at] = 0

    def clear_row(self, row: int, start: int, stop: int) -> None:
        """`clear` for a row's positions [start, stop) in every layer."""
        size = self.layout.page
        for block in range(start // size, -(-stop // size)):
            first = block * size
            within = torch.arange(max(start - first, 0), min(stop - first, size), device=self.table.device)
            pages = self.table[:, row, block].long().unsqueeze(1)
            for stored, at in self._at(within):
                stored[_index(pages, ALL, *at)] = 0

    def write(self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [N, Hkv, D] of N tokens at positions [N] of rows [N]."""
        pages = self.table[layer, rows, positions // self.layout.page].long()
        for (stored, at), new in zip(self._at(positions % self.layout.page), (keys, values), strict=True):
            stored[_index(pages, ALL, *at)] = new.reshape(*new.shape[:2], *stored.shape[2 + len(at) :])

    def read(self, layer: int, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` positions of rows [R]: keys, values [R, Hkv, length, D]."""
        blocks = self.layout.blocks(length)
        pages = self.table[layer, rows, :blocks].long()  # [R, blocks]
        panels = self.layout.panels
        keys, values = self.keys[pages], self.values[pages]  # [R, blocks, Hkv, ...]
        if panels is not None:
            keys, values = keys.transpose(4, 5), values.transpose(4, 5)
        shape = (len(rows), blocks, self._heads, self.layout.page, self._dim)
        keys, values = (
            stored.reshape(shape).transpose(1, 2).reshape(len(rows), self._heads, -1, self._dim)
            for stored in (keys, values)
        )
        return keys[:, :, :length], values[:, :, :length]

    def read_places(self, layer: int, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of places [R, T] of rows [R]: keys, values [R, Hkv, T, D]."""
        pages = self.table[layer, rows.unsqueeze(1), places // self.layout.page].long()
        keys, values = (
            stored[_index(pages, ALL, *at)].flatten(3).transpose(1, 2)
            for stored, at in self._at(places % self.layout.page)
        )
        return keys.contiguous(), values.contiguous()

    def move(self, moves: Seq[tuple[int, int, int]]) -> None:
        """Copy positions of rows to others in every layer: (row, from, to). All are read before any is written."""
        if not moves:
            return
        size = self.layout.page
        rows, sources, targets = self._memory.tensor(moves).T
        old, new = (self.table[:, rows, places // size].long() for places in (sources, targets))  # [L, M]
        places = (self._at(places % size) for places in (sources, targets))
        for (stored, from_at), (_, to_at) in zip(*places, strict=True):
            stored[_index(new, ALL, *to_at)] = stored[_index(old, ALL, *from_at)]

    def copy(self, pairs: Seq[tuple[int, int]], count: int) -> None:
        """Copy the first `count` positions of pages, each from one to another. (What is behind them somebody may be
        writing.)"""
        within = torch.arange(count, device=self.table.device)
        old, new = self._memory.tensor(pairs).T.unsqueeze(2)
        for stored, at in self._at(within):
            stored[_index(new, ALL, *at)] = stored[_index(old, ALL, *at)]

    def _at(self, within: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Keys and values, and what to index their axes from the third on with for positions of a page."""
        panels = self.layout.panels
        if panels is None:
            return [(self.keys, (within,)), (self.values, (within,))]
        columns, depth = panels.columns, panels.depth
        return [
            (self.keys.transpose(3, 4), (within // columns, within % columns)),
            (self.values.transpose(3, 4), (within // depth, within % depth)),
        ]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return self._memory.zeros(shape, self._memory.dtype)

    def _grow(self, rows: int, blocks: int) -> None:
        _, had_rows, had_blocks = self.table.shape
        if rows <= had_rows and blocks <= had_blocks:
            return
        if rows > had_rows:
            rows = max(rows, had_rows + TABLE_ROWS)
        if blocks > had_blocks:
            blocks = max(blocks, had_blocks + TABLE_BLOCKS)
        shape = (self.layers, max(rows, had_rows), max(blocks, had_blocks))
        old, self.table = self.table, self._memory.zeros(shape, torch.int32)
        self.table[:, :had_rows, :had_blocks] = old


def _index(*parts: Tensor | slice) -> tuple[Tensor | slice, ...]:
    return parts
