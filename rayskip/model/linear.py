"""Matrix products whose result for a row does not depend on the other rows.

Invariant 3 (batch invariance) starts here: a library picks its kernel by the number of rows, and two
kernels may add in another order. `row_tile` measures, on the running machine and with the model's own
weights, whether that happens; where it does, products run over tiles of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.spec import Dense

TILE = 64
PROBE_ROWS = (1, 2, 3, 7, 16, 33, 64, 100, 128, 200, 256, 511)


class Linear:
    """y = x @ weight.T + bias over packed rows x [N, in], N any.

    On CPU the weight is repacked once for oneDNN, so that no call pays for the layout.
    """

    def __init__(self, dense: Dense, tile: int | None = None) -> None:
        self.bias = dense.bias
        self.tile = tile
        self.out_features, self.in_features = dense.weight.shape
        self._packed = dense.weight.device.type == "cpu" and dense.weight.dtype != torch.float16
        self._weight = _pack(dense.weight) if self._packed else dense.weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        if self.tile is None:
            return self._product(x)
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % self.tile))
        return torch.cat([self._product(part) for part in padded.split(self.tile)])[:rows]

    def _product(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return y


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILE)
    return packed


def row_tile(linears: Iterable[Linear]) -> int | None:
    """The tile these products need on this machine: None when every probed row count gives the same bits.

    One product of each shape stands for all of that shape.
    """
    by_shape = {(linear.out_features, linear.in_features): linear for linear in linears}
    return None if all(map(_rows_are_independent, by_shape.values())) else TILE


def _rows_are_independent(linear: Linear) -> bool:
    weight = linear._weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(PROBE_ROWS), linear.in_features, generator=generator).to(weight.device, weight.dtype)
    reference = torch.cat([linear._product(part) for part in F.pad(x, (0, 0, 0, -len(x) % TILE)).split(TILE)])
    return all(torch.equal(linear._product(x[:rows]), reference[:rows]) for rows in PROBE_ROWS)
