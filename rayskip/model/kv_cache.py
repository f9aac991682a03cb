"""Keys and values of the rows in flight, in preallocated slots.

Does not know which row is in which slot.

Shapes: L layers, S slots, T positions per slot, Hkv key-value heads, D head dim, N tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rayskip.model.spec import Spec

KEY_BLOCK = 64
"""Attention reads key positions in multiples of this. In torch, a sum over fewer than 16 positions takes
another kernel, with another order of addition; past one block, trailing masked positions change no bit."""

LINE = 64
"""Bytes of a cache line."""


def key_blocks(length: int) -> int:
    """Positions read for a row of `length` positions."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


class KVCache:
    """What its owner resizes it to.

    keys, values [L, S, Hkv, T, D].
    Positions past a row's length hold stale but finite numbers; attention masks them.
    """

    def __init__(self, spec: Spec, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = self.values = _zeros((layers, 0, spec.kv_heads, 0, spec.head_dim), dtype, device)

    @staticmethod
    def bytes_per_position(spec: Spec, layers: int, dtype: torch.dtype) -> int:
        """Memory of one position of one slot."""
        return 2 * layers * spec.kv_heads * spec.head_dim * dtype.itemsize

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def resize(self, slots: int, length: int, kept: list[int] | None = None) -> None:
        """Make it `slots` rows of `length` positions. kept: old slots that live on as the first ones."""
        kept = kept or []
        shared = min(length, self.length)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            layers, _, heads, _, dim = old.shape
            content = old[:, kept, :, :shared]
            setattr(self, name, content)  # lets go of the old one before the new one is taken
            del old
            new = _zeros((layers, slots, heads, length, dim), content.dtype, content.device)
            new[:, : len(kept), :, :shared] = content
            setattr(self, name, new)

    def clear(self, slot: int, start: int = 0) -> None:
        """Forget a row's positions from `start` on, for numbers that are not finite: masked positions are read, and
        0 times NaN is NaN."""
        self.keys[:, slot, :, start:] = 0
        self.values[:, slot, :, start:] = 0

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [N, Hkv, D] of N tokens at slots [N], positions [N]."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` positions of slots [R]: keys, values [R, Hkv, length, D]."""
        keys = self.keys[layer, :, :, :length].index_select(0, slots)
        return keys, self.values[layer, :, :, :length].index_select(0, slots)

    def read_places(self, layer: int, slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of places [R, T] of slots [R]: keys, values [R, Hkv, T, D]."""
        rows = slots.unsqueeze(1)
        keys, values = (stored[layer][rows, :, places].transpose(1, 2) for stored in (self.keys, self.values))
        return keys.contiguous(), values.contiguous()

    def move(self, slot: int, sources: list[int], target: int) -> None:
        """Copy a slot's positions `sources` to those from `target` on, in every layer."""
        for stored in (self.keys, self.values):
            stored[:, slot, :, target : target + len(sources)] = stored[:, slot][:, :, sources]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another, in every layer."""
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that begin at a cache line.

    On CPU they are numpy's, which leaves fresh memory untouched and asks for huge pages: a page is taken when a row
    reaches it, and a gigabyte costs a tenth of a second in place of one (measured on a virtual machine).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
