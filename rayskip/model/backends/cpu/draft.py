"""One step of Kangaroo's draft as one C call: see library.py.

Each of its operations takes about as long as calling it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from rayskip.model.backends.base import DraftStep, Head, Stack
from rayskip.model.backends.cpu.library import LANES, DraftTask
from rayskip.model.backends.cpu.product import Int8Linear
from rayskip.model.backends.cpu.stack import CpuStack
from rayskip.model.backends.torch import TorchHead
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.spec import Norm
from rayskip.model.token_batch import TokenBatch


class CpuDraftStep(DraftStep):
    """Bit-equal to its parts, one after the other."""

    def __init__(
        self,
        layers: CpuStack,
        exit_layer: int,
        adapter: CpuStack,
        head: Head,
        norm: Norm,
        linear: Int8Linear,
    ) -> None:
        super().__init__(layers, exit_layer, adapter, head)
        self._layers, self._adapter, self._norm, self._linear = layers, adapter, norm, linear

    @classmethod
    def of(cls, layers: Stack, exit_layer: int, adapter: Stack, head: Head) -> CpuDraftStep | None:
        """None where one of the parts is not the kernels'."""
        if not isinstance(layers, CpuStack) or not isinstance(adapter, CpuStack):
            return None
        if not isinstance(head, TorchHead) or not isinstance(head.linear, Int8Linear):
            return None
        if head.norm is None or head.norm.kind != "rms" or head.linear.out_features % LANES:
            return None
        return cls(layers, exit_layer, adapter, head, head.norm, head.linear)

    def run(
        self, x: Tensor, batch: TokenBatch, cache: KVCache, after: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        if batch.active is not None or not all(0 <= at < len(x) for at in after):
            raise ValueError(f"a draft runs every layer, and goes on after some of its {len(x)} tokens")
        own = torch.empty_like(x)
        layers = self._layers.task(x, batch, cache, 0, self.exit_layer)
        adapter = self._adapter.task(own, batch, cache, 0, 1)
        rows = (ctypes.c_int64 * len(after))(*after)
        places = torch.zeros(len(after), count, dtype=torch.long)
        chances = torch.empty(len(after), count)
        task = DraftTask(
            ctypes.pointer(layers),
            ctypes.pointer(adapter),
            self._norm.weight.data_ptr(),
            self._norm.eps,
            ctypes.pointer(self._linear.struct),
            ctypes.addressof(rows),
            len(after),
            count,
            places.data_ptr(),
            chances.data_ptr(),
        )
        if self._linear.library.draft(ctypes.byref(task)):
            raise MemoryError(f"no memory for a draft of {len(x)} tokens")
        return places, chances
