"""Matrix products with C kernels, where kernels.c has products of its own: see kernels.py."""

from __future__ import annotations

import ctypes

import torch.nn.functional as F
from torch import Tensor

from rayskip.model.native.kernels import DEFINES, Product, kernels, threads
from rayskip.model.spec import Dense


class NativeProduct:
    """y = x @ weight.T + bias for x [N, in], N any. A row's result does not depend on the other rows."""

    def __init__(self, dense: Dense, library: ctypes.CDLL) -> None:
        self.out_features, self.in_features = dense.weight.shape
        self.library = library
        weight = dense.weight.contiguous()
        filling = -self.out_features % library.panel_columns()
        self._panels = weight.new_empty((self.out_features + filling) * self.in_features)
        library.pack(weight.data_ptr(), self._panels.data_ptr(), *weight.shape)
        self._bias = None if dense.bias is None else F.pad(dense.bias, (0, filling))
        bias = None if self._bias is None else self._bias.data_ptr()
        self.struct = Product(self._panels.data_ptr(), bias, *weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._panels.dtype or x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"{x.dtype} {tuple(x.shape)} for {self._panels.dtype} [N, {self.in_features}]")
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features)
        if self.library.product(ctypes.byref(self.struct), x.data_ptr(), out.data_ptr(), len(x), threads()):
            raise MemoryError("no memory for a matrix product's threads")
        return out


def native_product(dense: Dense) -> NativeProduct | None:
    """None where kernels.c has no product for such weights, or a library's is faster."""
    weight = dense.weight
    if weight.device.type != "cpu" or weight.dtype not in DEFINES or weight.shape[1] % 2:
        return None
    library = kernels(weight.dtype)
    return NativeProduct(dense, library) if library is not None and library.panel_columns() else None
