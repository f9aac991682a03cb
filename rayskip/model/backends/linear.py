"""Matrix products by torch, and the rule under which a row's result does not depend on the other rows.

Invariant 3 (batch invariance) starts here: a library picks its kernel by the number of rows, and two kernels may
add in another order. `row_rule` measures, on the running machine and with the model's own weights, whether that
happens, and finds the cheapest rule under which it does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.base import Linear, RowRule
from rayskip.model.spec import Dense

TILE = 64
PROBE_ROWS = 128
PROBES = (1, 2, 3, 5, 7, 16, 33, 64, 100, 128)
"""Row counts whose products are compared, over every window of PROBE_ROWS rows."""
RULES = (RowRule(), RowRule(least=2), RowRule(least=16), RowRule(tile=TILE))
"""From the cheapest on. The last holds by construction: every product has the same shape."""


class TorchLinear(Linear):
    """On a CPU the weight is reordered once for oneDNN, where that has products for it, so that no call pays for
    the layout. rule: how rows are handed over."""

    def __init__(self, dense: Dense) -> None:
        self.rule = RowRule()
        self.out_features, self.in_features = dense.weight.shape
        self.device, self.dtype = dense.weight.device, dense.weight.dtype
        self._bias = dense.bias
        self._reordered = _reorders(self.device, self.dtype)
        self._weight = _reorder(dense.weight) if self._reordered else dense.weight

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, self.out_features)
        if padding := self.rule.padding(rows):
            x = F.pad(x, (0, 0, 0, padding))
        if self.rule.tile is None:
            return self.product(x)[:rows]
        return torch.cat([self.product(part) for part in torch.split(x, self.rule.tile)])[:rows]

    def product(self, x: Tensor) -> Tensor:
        """The library's, of all rows at once."""
        if not self._reordered:
            return F.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class TorchScores(TorchLinear):
    """In float32, whatever its weights and inputs are."""

    def __init__(self, dense: Dense) -> None:
        bias = None if dense.bias is None else dense.bias.float()
        super().__init__(Dense(dense.weight.float(), bias))

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.float())


def _reorders(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can reorder such a weight here; its bf16 needs AVX-512 or better."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _reorder(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILE)
    return reordered


def row_rule(linears: Iterable[TorchLinear]) -> RowRule:
    """The cheapest of RULES under which every probed row count gives the same bits on this machine.

    One product of each shape and type stands for all of that kind.
    """
    by_shape = {(linear.out_features, linear.in_features, linear.dtype): linear for linear in linears}
    least = max((_fewest_rows(linear) for linear in by_shape.values()), default=1)
    return next(rule for rule in RULES if rule.tile or rule.least >= least)


def _fewest_rows(linear: TorchLinear) -> int:
    """The smallest row count from which on the probed counts agree with tiles of TILE rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, linear.in_features, generator=generator).to(linear.device, linear.dtype)

    def windows(rows: int) -> Tensor:
        whole = PROBE_ROWS // rows * rows
        return torch.cat([linear.product(part) for part in torch.split(x[:whole], rows)])

    reference = windows(TILE)
    differing = [rows for rows in PROBES if not torch.equal(found := windows(rows), reference[: len(found)])]
    return max(differing, default=0) + 1
