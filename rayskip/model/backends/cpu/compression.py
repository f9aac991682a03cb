"""Weights of bfloat16 in twelve bits, without loss: what compressed.h reads."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from rayskip.model.backends.cpu.library import Compression, Library, threads

TABLE = 32
"""Entries of a panel's table: sixteen exponents, twice."""


class CompressedWeights(NamedTuple):
    """See Packed and Product in the kernels.

    lows [P, L, 2, H] uint8: signs and mantissas. highs [P, L, H] uint8: numbers of two exponents. tables [P, 32]
    int16: exponents by number, twice. odd: inputs at which lines begin that have other exponents, panel by panel,
    after each panel's one past the last; odd_from [P]: where a panel's begin. whole [-1, 2, H] int16: those lines.
    """

    lows: Tensor
    highs: Tensor
    tables: Tensor
    odd: Tensor
    odd_from: Tensor
    whole: Tensor


def compress(panels: Tensor, library: Library) -> CompressedWeights:
    """panels [P, L, 2, H] bfloat16: L lines, in two halves."""
    count, lines, _, half = panels.shape
    each = torch.empty(count, dtype=torch.long)
    tables = torch.empty(count, TABLE, dtype=torch.int16)
    task = Compression(panels.data_ptr(), count, lines, tables.data_ptr(), each.data_ptr())
    if library.exponent_tables(ctypes.byref(task), threads()):
        raise MemoryError("no memory to compress weights")
    odd_from = torch.cumsum(each, 0) - each + torch.arange(count)
    lows = torch.empty(count, lines, 2, half, dtype=torch.uint8)
    highs = torch.empty(count, lines, half, dtype=torch.uint8)
    odd = torch.empty(int(each.sum()) + count, dtype=torch.long)
    whole = torch.empty(len(odd) - count, 2, half, dtype=torch.int16)
    task.odd_from = odd_from.data_ptr()
    task.lows, task.highs = lows.data_ptr(), highs.data_ptr()
    task.odd, task.whole = odd.data_ptr(), whole.data_ptr()
    if library.compress(ctypes.byref(task), threads()):
        raise MemoryError("no memory to compress weights")
    return CompressedWeights(lows, highs, tables, odd, odd_from, whole)
