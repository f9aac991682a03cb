"""What the head says of a step's states: the highest logit of each, and all logits of those that need them.

A row that takes the likeliest token needs no other: on CPU no other is stored (cpu/kernels/outputs.h), and for a
few rows most are not computed (cpu/kernels/screen.h).

Shapes: R rows, V vocabulary, F of the rows with all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.cpu.ops import highest
from rayskip.model.backends.transfer import to_device

BLOCK = 256
"""Logits that are taken together before one of them is looked for."""


@dataclass(frozen=True)
class Scores:
    """best, at [R]: the highest logit of each row (not a number where one is none) and the first place it has.
    logits [F, V]: of the rows `full`."""

    best: Tensor
    at: Tensor
    logits: Tensor
    full: Sequence[int]

    @classmethod
    def of_all(cls, logits: Tensor) -> Scores:
        """Of rows whose logits [R, V] are all known."""
        return cls(*best_logits(logits), logits, range(len(logits)))

    def of(self, rows: Sequence[int]) -> Tensor:
        """Logits of some of the rows `full`, [len(rows), V]."""
        if rows == list(self.full):
            return self.logits
        at = {row: index for index, row in enumerate(self.full)}
        return self.logits[to_device([at[row] for row in rows], torch.long, self.logits.device)]


def best_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row [R] (not a number where one is none) and the first place it stands at.

    In torch block by block, since it finds a maximum many times faster than its place.
    """
    if (found := highest(logits)) is not None:
        return found
    if padding := -logits.shape[1] % BLOCK:
        logits = F.pad(logits, (0, padding), value=-torch.inf)
    blocks = logits.view(len(logits), logits.shape[1] // BLOCK, BLOCK)
    best, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks[torch.arange(len(blocks), device=block.device), block]
    return best, block * BLOCK + inside.argmax(dim=-1)
