"""Keys and values of the rows in flight, in preallocated slots.

Does not know which row is in which slot.

Shapes: L layers, S slots, T positions per slot, Hkv key-value heads, D head dim, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayskip.model.spec import Spec

KEY_BLOCK = 64
"""Attention reads key positions in multiples of this. In torch, a sum over fewer than 16 positions takes
another kernel, with another order of addition; past one block, trailing masked positions change no bit."""


def key_blocks(length: int) -> int:
    """Positions read for a row of `length` positions."""
    return -(-length // KEY_BLOCK) * KEY_BLOCK


class KVCache:
    """Grows to what the rows in flight need; never shrinks.

    keys, values [L, S, Hkv, T, D].
    Positions past a row's length hold stale but finite numbers; attention masks them.
    """

    def __init__(self, spec: Spec, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(layers, 0, spec.kv_heads, 0, spec.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

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

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` positions; what is stored stays."""
        slots, length = max(slots, self.slots), max(key_blocks(length), self.length)
        if (slots, length) == (self.slots, self.length):
            return
        self.keys, self.values = (_enlarged(stored, slots, length) for stored in (self.keys, self.values))

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [N, Hkv, D] of N tokens at slots [N], positions [N]."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` positions of slots [R]: keys, values [R, Hkv, length, D]."""
        keys = self.keys[layer, :, :, :length].index_select(0, slots)
        return keys, self.values[layer, :, :, :length].index_select(0, slots)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another, in every layer."""
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]


def _enlarged(stored: Tensor, slots: int, length: int) -> Tensor:
    layers, old_slots, heads, old_length, dim = stored.shape
    larger = stored.new_zeros(layers, slots, heads, length, dim)
    larger[:, :old_slots, :, :old_length] = stored
    return larger
