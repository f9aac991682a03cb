"""One step of Kangaroo's draft as one C call: see library.py.

Each of its operations takes about as long as calling it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from rayskip.model.backends.cpu.layers import NativeLayers
from rayskip.model.backends.cpu.library import LANES, DraftTask
from rayskip.model.backends.cpu.product import RoughProduct
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.ops import TokenBatch
from rayskip.model.spec import Norm


class NativeDraft:
    """A model's first layers, the adapter after them, and the head for drafts; bit-equal to one after the other."""

    def __init__(
        self, layers: NativeLayers, exit_layer: int, adapter: NativeLayers, norm: Norm, head: RoughProduct
    ) -> None:
        """norm: before the head, an RMSNorm. head: its outputs a multiple of LANES."""
        if norm.kind != "rms" or head.out_features % LANES:
            raise ValueError(
                f"a {norm.kind} norm and {head.out_features} tokens; rms and a multiple of {LANES}"
            )
        self._layers, self._exit_layer, self._adapter = layers, exit_layer, adapter
        self._norm, self._head = norm, head

    def run(
        self, x: Tensor, batch: TokenBatch, cache: KVCache, after: Seq[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """See Kangaroo.step. x [N, d]: states before the first layer, which become those after the exit layer.
        Places on the head's list, and chances, [len(after), count]."""
        if batch.active is not None or not all(0 <= at < len(x) for at in after):
            raise ValueError(f"a draft runs every layer, and goes on after some of its {len(x)} tokens")
        own = torch.empty_like(x)
        layers = self._layers.task(x, batch, cache, 0, self._exit_layer)
        adapter = self._adapter.task(own, batch, cache, 0, 1)
        rows = (ctypes.c_int64 * len(after))(*after)
        places = torch.zeros(len(after), count, dtype=torch.long)
        chances = torch.empty(len(after), count)
        task = DraftTask(
            ctypes.pointer(layers),
            ctypes.pointer(adapter),
            self._norm.weight.data_ptr(),
            self._norm.eps,
            ctypes.pointer(self._head.struct),
            ctypes.addressof(rows),
            len(after),
            count,
            places.data_ptr(),
            chances.data_ptr(),
        )
        if self._head.library.draft(ctypes.byref(task)):
            raise MemoryError(f"no memory for a draft of {len(x)} tokens")
        return places, chances
