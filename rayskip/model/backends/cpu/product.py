"""Matrix products by the C kernels, where kernels.c has products of its own: see library.py."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.base import Linear
from rayskip.model.backends.cpu.compression import CompressedWeights, compress
from rayskip.model.backends.cpu.library import DEFINES, Int8Weights, Library, Product, kernels, threads
from rayskip.model.spec import Dense

HUGE = 1e15
"""Sums of products of less are finite; int8_product.h takes it for inputs."""


class CpuLinear(Linear):
    """A row's result does not depend on the other rows, however many."""

    def __init__(self, dense: Dense, library: Library) -> None:
        self.out_features, self.in_features = dense.weight.shape
        self.library = library
        weight = dense.weight.contiguous()
        filling = -self.out_features % library.panel_columns()
        self._panels = weight.new_empty((self.out_features + filling) * self.in_features)
        library.to_panels(weight.data_ptr(), self._panels.data_ptr(), *weight.shape)
        self._bias = None if dense.bias is None else F.pad(dense.bias, (0, filling))
        bias = None if self._bias is None else self._bias.data_ptr()
        self.struct = Product(self._panels.data_ptr(), bias, *weight.shape)
        self._compressed: CompressedWeights | None = None

    def compress(self) -> None:
        """Store the weights a second time, in three quarters of the memory, for products of a few rows, which take
        as long as reading them. Results are the same bits. Where the kernels read none such, nothing is done."""
        if self._compressed is None and self.library.compressed_rows():
            columns, depth = self.library.panel_columns(), self.library.panel_depth()
            lines = self._panels.view(-1, self.in_features // depth, 2, columns * depth // 2)
            self._compressed = compress(lines, self.library)
            for name, part in self._compressed._asdict().items():
                setattr(self.struct, name, part.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        self.check(x)
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features)
        if self.library.product(ctypes.byref(self.struct), x.data_ptr(), out.data_ptr(), len(x), threads()):
            raise MemoryError("no memory for a matrix product's threads")
        return out

    def check(self, x: Tensor) -> None:
        """Raises ValueError for what is no input of this product."""
        _check_input(x, self._panels.dtype, self.in_features)


class CpuScores(CpuLinear):
    """A router's product, whose outputs are floats."""

    def __call__(self, x: Tensor) -> Tensor:
        self.check(x)
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features, dtype=torch.float32)
        task = ctypes.byref(self.struct), x.data_ptr(), out.data_ptr(), len(x), threads()
        if self.library.unrounded_product(*task):
            raise MemoryError("no memory for a matrix product's threads")
        return out


class Int8Linear(Linear):
    """Weights rounded to eight bits, output by output, without a bias: half as much to read, and not exact.

    Each weight is off by up to 1/254 of its output's largest; inputs are rounded to 15 bits, fewer from 500 on.
    """

    def __init__(self, dense: Dense, library: Library) -> None:
        self.out_features, self.in_features = dense.weight.shape
        self.library = library
        self._dtype = dense.weight.dtype
        weight = dense.weight.contiguous()
        filled = self.out_features + -self.out_features % library.panel_columns()
        self._panels = torch.empty(filled * library.int8_width(self.in_features), dtype=torch.int8)
        self._columns = torch.empty(3, filled)
        places = (self._panels.data_ptr(), *(own.data_ptr() for own in self._columns))
        library.to_int8_panels(weight.data_ptr(), *places, *weight.shape)
        self.struct = Int8Weights(*places, *weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        _check_input(x, self._dtype, self.in_features)
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features)
        if self.library.int8_product(
            ctypes.byref(self.struct), x.data_ptr(), out.data_ptr(), len(x), threads()
        ):
            raise MemoryError("no memory for a matrix product's inputs")
        return out


class ArgmaxLinear:
    """The highest output of a product for each row of x [N, in]: outputs are not stored and, for a few rows, most
    are not even computed (see bounded_argmax.h).

    The values are those of `product`, bit by bit.
    """

    def __init__(self, product: CpuLinear, rounded: Int8Linear) -> None:
        self._product, self._rounded = product, rounded
        self.bounded_rows: int = product.library.bounded_rows(False)
        """Of more, all outputs are computed."""
        self.bounded_beside: int = product.library.bounded_rows(True)
        """As many beside rows that need all outputs are worth a call of their own."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(highest outputs, the first place each stands at), both [N]; place -1: the row may have outputs that are
        not finite, and nothing is known of it."""
        product, library = self._product, self._product.library
        product.check(x)
        x = x.contiguous()
        values, places = torch.empty(len(x)), torch.empty(len(x), dtype=torch.long)
        weights = ctypes.byref(product.struct)
        task = weights, x.data_ptr(), len(x), threads(), values.data_ptr(), places.data_ptr()
        if len(x) <= self.bounded_rows:
            failed = library.bounded_argmax(ctypes.byref(self._rounded.struct), *task)
        else:
            failed = library.product_argmax(*task)
        if failed:
            raise MemoryError("no memory to look for the highest outputs")
        return values, places


def _check_input(x: Tensor, dtype: torch.dtype, width: int) -> None:
    """The kernels read memory as what they are told it is."""
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{x.dtype} {tuple(x.shape)} for {dtype} [N, {width}]")


def cpu_linear(dense: Dense) -> CpuLinear | None:
    """None where kernels.c has no product for such weights, or a library's is faster."""
    library = _library(dense.weight)
    return None if library is None else CpuLinear(dense, library)


def cpu_scores(dense: Dense) -> CpuScores | None:
    """None where `cpu_linear` has none."""
    library = _library(dense.weight)
    return None if library is None else CpuScores(dense, library)


def int8_linear(dense: Dense) -> Int8Linear | None:
    """None where `cpu_linear` has none, or there is a bias."""
    library = _library(dense.weight)
    return None if library is None or dense.bias is not None else Int8Linear(dense, library)


def argmax_linear(product: Linear, dense: Dense) -> ArgmaxLinear | None:
    """None where the product is not the kernels', with a bias, or where a weight is not finite or so large that
    outputs may not be."""
    if not isinstance(product, CpuLinear) or not bool((dense.weight.abs() < HUGE).all()):
        return None
    rounded = int8_linear(dense)
    return None if rounded is None else ArgmaxLinear(product, rounded)


def _library(weight: Tensor) -> Library | None:
    if weight.device.type != "cpu" or weight.dtype not in DEFINES or weight.shape[1] % 2:
        return None
    library = kernels(weight.dtype)
    return library if library is not None and library.has_products() else None
