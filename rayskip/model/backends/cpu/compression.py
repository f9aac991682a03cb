"""Weights of bfloat16 in twelve bits, without loss: what compressed.h reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXPONENTS = 16
"""Of a panel, that have a number."""
NONE = 255
"""In place of a number."""


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


def compress(panels: Tensor, depth: int) -> CompressedWeights:
    """panels [P, L, 2, H] bfloat16: L lines of `depth` inputs each, in two halves."""
    count, lines = panels.shape[:2]
    raw = panels.view(torch.int16)
    exponents = raw.bitwise_right_shift(7).bitwise_and(255).to(torch.uint8).flatten(1)
    seen = torch.stack([torch.bincount(own, minlength=256) for own in exponents])
    known = seen.topk(EXPONENTS, dim=1).indices
    numbers = torch.full((count, 256), NONE, dtype=torch.uint8)
    numbers.scatter_(1, known, torch.arange(EXPONENTS, dtype=torch.uint8).expand(count, -1))
    number = torch.stack([table[own.int()] for table, own in zip(numbers, exponents, strict=True)]).view(
        panels.shape
    )
    panel, line = (number == NONE).flatten(2).any(dim=2).nonzero(as_tuple=True)
    each = torch.bincount(panel, minlength=count)
    odd_from = torch.cumsum(each, 0) - each + torch.arange(count)
    odd = torch.full((len(panel) + count,), lines * depth)
    odd[torch.arange(len(panel)) + panel] = line * depth
    lows = raw.bitwise_right_shift(8).bitwise_and(128) | raw.bitwise_and(127)
    highs = number[:, :, 0].bitwise_and(15) | number[:, :, 1].bitwise_and(15) * 16
    return CompressedWeights(
        lows.to(torch.uint8),
        highs,
        (known.repeat(1, 2) * 128).to(torch.int16),
        odd,
        odd_from,
        raw[panel, line],
    )
