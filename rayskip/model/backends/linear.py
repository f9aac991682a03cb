"""Matrix products whose result for a row does not depend on the other rows.

Invariant 3 (batch invariance) starts here: a library picks its kernel by the number of rows, and two
kernels may add in another order. `row_rule` measures, on the running machine and with the model's own
weights, whether that happens, and finds the cheapest rule under which it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.cpu.product import RoughProduct, native_product, rough_product
from rayskip.model.spec import Dense

TILE = 64
PROBE_ROWS = 128
PROBES = (1, 2, 3, 5, 7, 16, 33, 64, 100, 128)
"""Row counts whose products are compared, over every window of PROBE_ROWS rows."""


@dataclass(frozen=True)
class RowRule:
    """least: fewer rows are padded to so many. tile: rows run in tiles of exactly so many; None, all at once."""

    least: int = 1
    tile: int | None = None

    def padding(self, rows: int) -> int:
        """Rows computed in vain beside `rows`."""
        return -rows % self.tile if self.tile else max(0, self.least - rows)


RULES = (RowRule(), RowRule(least=2), RowRule(least=16), RowRule(tile=TILE))
"""From the cheapest on. The last holds by construction: every product has the same shape."""


class Linear:
    """y = x @ weight.T + bias over packed rows x [N, in], N any.

    On CPU the weight is repacked once, for the C kernels or, where those have no product, for oneDNN, so that no
    call pays for the layout.
    """

    def __init__(self, dense: Dense) -> None:
        self.bias = dense.bias
        self.rule = RowRule()
        self.out_features, self.in_features = dense.weight.shape
        self.device, self.dtype = dense.weight.device, dense.weight.dtype
        self.native = native_product(dense)
        self._packed = self.native is None and _packs(self.device, self.dtype)
        if self.native is None:
            self._weight = _pack(dense.weight) if self._packed else dense.weight

    @property
    def weights(self) -> int:
        """How many: a token takes a multiplication and an addition for each."""
        return self.in_features * self.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, self.out_features)
        if padding := self.rule.padding(rows):
            x = F.pad(x, (0, 0, 0, padding))
        if self.rule.tile is None:
            return self._product(x)[:rows]
        return torch.cat([self._product(part) for part in torch.split(x, self.rule.tile)])[:rows]

    def _product(self, x: Tensor) -> Tensor:
        if self.native is not None:
            return self.native(x)
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return y


def rough_linear(dense: Dense) -> RoughProduct | Linear:
    """A product for drafts, which may be wrong: with rounded weights, where the C kernels have products."""
    return rough_product(dense) or Linear(dense)


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can repack such a weight here; its bf16 needs AVX-512 or better."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILE)
    return packed


def row_rule(linears: Iterable[Linear]) -> RowRule:
    """The cheapest of RULES under which every probed row count gives the same bits on this machine.

    One product of each shape stands for all of that shape.
    """
    by_shape = {(linear.out_features, linear.in_features): linear for linear in linears}
    least = max((_fewest_rows(linear) for linear in by_shape.values()), default=1)
    return next(rule for rule in RULES if rule.tile or rule.least >= least)


def _fewest_rows(linear: Linear) -> int:
    """The smallest row count from which on the probed counts agree with tiles of TILE rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, linear.in_features, generator=generator).to(linear.device, linear.dtype)

    def windows(rows: int) -> Tensor:
        whole = PROBE_ROWS // rows * rows
        return torch.cat([linear._product(part) for part in torch.split(x[:whole], rows)])

    reference = windows(TILE)
    differing = [rows for rows in PROBES if not torch.equal(found := windows(rows), reference[: len(found)])]
    return max(differing, default=0) + 1
