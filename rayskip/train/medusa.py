"""Training Medusa heads (arXiv 2401.10774, section 2.1): from the model's last state to its tokens two, three and
more places on. The model is frozen (Medusa-1), and its head is shared, over the listed tokens.

Shapes: d hidden, A answer tokens of the batch, V' listed tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayskip.train.drafts import Guesses, Predictions, Targets, listed_head


class Heads(nn.Module):
    """As `rayskip.model.medusa` runs them, for autograd; they start as the model's own head."""

    head: Tensor

    def __init__(self, target: Any, count: int, token_ids: Tensor) -> None:
        super().__init__()
        head = listed_head(target, token_ids)
        width = head.shape[1]
        self.register_buffer("head", head, persistent=False)
        self.weights = nn.Parameter(torch.zeros(count, width, width))
        self.biases = nn.Parameter(torch.zeros(count, width))

    def forward(self, targets: Targets) -> dict[str, Predictions]:
        """Head h's, by the name "h" (from 1 on): from where token a is chosen, for token a + h."""
        found = {}
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), 1):
            reaches = (targets.offsets >= index).nonzero().squeeze(1)
            x = targets.final[reaches]
            hidden = x + F.silu(F.linear(x, weight, bias.to(x.dtype)))
            found[str(index)] = Predictions(F.linear(hidden, self.head), reaches + index)
        return found


def held_drafts(heads: Sequence[Guesses]) -> list[list[int]]:
    """For `tokens_per_round`: head h drafts token t + h - 1 from where token t - 1 was chosen.

    A head's guesses begin at its own first token, h places on.
    """
    held = []
    for rows in zip(*(own.right for own in heads), strict=True):
        length = len(rows[0]) + 1
        counts = []
        for at in range(length):
            count = 0
            while at > 0 and count < len(rows) and at - 1 < len(rows[count]) and rows[count][at - 1]:
                count += 1
            counts.append(count)
        held.append(counts)
    return held
