"""Keys and values of the rows in flight, in preallocated slots, laid out for what reads them.

Does not know which row is in which slot.

Shapes: L layers, S slots, T positions per slot, Hkv key-value heads, D head dim, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayskip.model.spec import Spec

KEY_BLOCK = 64
"""Attention reads key positions in multiples of this. In torch, a sum over fewer than 16 positions takes
another kernel, with another order of addition; past one block, trailing masked positions change no bit."""

LINE = 64
"""Bytes of a cache line."""
ALL = slice(None)


def key_blocks(length: int) -> int:
    """Positions read for a row of `length` positions."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


@dataclass(frozen=True)
class Panels:
    """Positions as the kernels multiply them (native/heads.h). columns: whose keys lie side by side. depth: dims of
    a key, and positions of values, whose products are added at once. A slot's length is a multiple of both."""

    columns: int
    depth: int


class KVCache:
    """What its owner resizes it to.

    keys, values [L, S, Hkv, T, D]; in panels, keys [L, S, Hkv, T / columns, D / depth, columns, depth] and values
    [L, S, Hkv, T / depth, D, depth].
    Positions past a row's length hold stale but finite numbers; attention masks them.
    """

    def __init__(
        self,
        spec: Spec,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        panels: Panels | None = None,
    ) -> None:
        heads, dim = spec.kv_heads, spec.head_dim
        self._panels = panels
        if panels is None:
            self.keys = self.values = _zeros((layers, 0, heads, 0, dim), dtype, device)
        else:
            depth, columns = panels.depth, panels.columns
            self.keys = _zeros((layers, 0, heads, 0, dim // depth, columns, depth), dtype, device)
            self.values = _zeros((layers, 0, heads, 0, dim, depth), dtype, device)

    @staticmethod
    def bytes_per_position(spec: Spec, layers: int, dtype: torch.dtype) -> int:
        """Memory of one position of one slot."""
        return 2 * layers * spec.kv_heads * spec.head_dim * dtype.itemsize

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[3] * self._blocks[0]

    @property
    def _blocks(self) -> tuple[int, int]:
        """Positions in one step along the tensors' fourth axis: of keys, and of values."""
        return (1, 1) if self._panels is None else (self._panels.columns, self._panels.depth)

    @property
    def _apart(self) -> tuple[Tensor, Tensor]:
        """Views of keys and of values whose fifth axis are the positions in one step of the fourth."""
        if self._panels is None:
            return self.keys.unsqueeze(4), self.values.unsqueeze(4)
        return self.keys.transpose(4, 5), self.values.transpose(4, 5)

    def _at(self, positions: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Views of keys and of values, and what to index their axes from the fourth on with for `positions`."""
        if self._panels is None:
            return [(self.keys, (positions,)), (self.values, (positions,))]
        return [
            (each, (positions // block, positions % block))
            for each, block in zip(self._apart, self._blocks, strict=True)
        ]

    def resize(self, slots: int, length: int, kept: list[int] | None = None) -> None:
        """Make it `slots` rows of `length` positions. kept: old slots that live on as the first ones."""
        if left := [block for block in self._blocks if length % block]:
            raise ValueError(f"slots of {length} positions; a multiple of {left[0]} is wanted")
        kept = kept or []
        shared = min(length, self.length)
        for name, block in zip(("keys", "values"), self._blocks, strict=True):
            old: Tensor = getattr(self, name)
            layers, _, heads, _, *rest = old.shape
            content = old[:, kept, :, : shared // block]
            setattr(self, name, content)  # lets go of the old one before the new one is taken
            del old
            new = _zeros((layers, slots, heads, length // block, *rest), content.dtype, content.device)
            new[:, : len(kept), :, : shared // block] = content
            setattr(self, name, new)

    def clear(self, slot: int, start: int = 0) -> None:
        """Forget a row's positions from `start` on, for numbers that are not finite: masked positions are read, and
        0 times NaN is NaN."""
        for stored, block in zip(self._apart, self._blocks, strict=True):
            whole = -(-start // block)
            stored[:, slot, :, whole:] = 0
            if start % block:
                stored[:, slot, :, start // block, start % block :] = 0

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [N, Hkv, D] of N tokens at slots [N], positions [N]."""
        for (stored, at), new in zip(self._at(positions), (keys, values), strict=True):
            own = stored[layer]
            own[_index(slots, ALL, *at)] = new.reshape(*new.shape[:2], *own.shape[2 + len(at) :])

    def read(self, layer: int, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` positions of slots [R], in panels a whole number of them: keys, values
        [R, Hkv, length, D]."""
        keys, values = (
            stored[layer, :, :, : length // block].index_select(0, slots)
            for stored, block in zip((self.keys, self.values), self._blocks, strict=True)
        )
        if self._panels is None:
            return keys, values
        shape = (*keys.shape[:2], length, -1)
        return keys.transpose(3, 4).reshape(shape), values.transpose(3, 4).reshape(shape)

    def read_places(self, layer: int, slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of places [R, T] of slots [R]: keys, values [R, Hkv, T, D]."""
        rows = slots.unsqueeze(1)
        keys, values = (
            stored[layer][_index(rows, ALL, *at)].flatten(3).transpose(1, 2)
            for stored, at in self._at(places)
        )
        return keys.contiguous(), values.contiguous()

    def move(self, slot: int, sources: list[int], target: int) -> None:
        """Copy a slot's positions `sources` to those from `target` on, in every layer. sources: ascending, and none
        before its target."""
        for stored, block in zip(self._apart, self._blocks, strict=True):
            for at, source in enumerate(sources, target):
                if at != source:
                    stored[:, slot, :, at // block, at % block] = stored[
                        :, slot, :, source // block, source % block
                    ]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot, and the rest of their panel, to another, in every layer."""
        for stored, block in zip((self.keys, self.values), self._blocks, strict=True):
            whole = -(-length // block)
            stored[:, target, :, :whole] = stored[:, source, :, :whole]


def _index(*parts: Tensor | slice) -> tuple[Tensor | slice, ...]:
    return parts


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that begin at a cache line. Another line follows: the kernels read whole vectors.

    On CPU they are numpy's, which leaves fresh memory untouched and asks for huge pages: a page is taken when a row
    reaches it, and a gigabyte costs a tenth of a second in place of one (measured on a virtual machine).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 2 * LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
