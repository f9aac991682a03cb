"""Medusa heads (arXiv 2401.10774, section 2.1): from the model's last state to its tokens two and more places on.

Head h is a residual block, x + silu(W_h x + b_h), before the decoder's own head, which all share and which scores
the tokens on a list alone (FR-Spec, arXiv 2502.14856).

Shapes: N rows, d hidden, H heads, V' listed tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.transfer import ToHost
from rayskip.model.decoder import Decoder
from rayskip.model.spec import Dense
from rayskip.model.trained import MedusaLabel, check_shapes, load_trained


class Medusa:
    """The heads on a decoder. Shared by workers: it holds no state between calls. heads: tokens drafted."""

    def __init__(self, decoder: Decoder, tensors: dict[str, Tensor]) -> None:
        self._backend = backend = decoder.backend
        own = {name: tensor.to(backend.device) for name, tensor in tensors.items()}
        weights, biases = own["weights"].to(backend.dtype), own["biases"].to(backend.dtype)
        self.heads = len(weights)
        self.token_ids = own["token_ids"].long()
        self._norm = decoder.weights.final_norm
        self._blocks = backend.linear(Dense(weights.flatten(0, 1), biases.flatten()))
        self._head = backend.head(Dense(decoder.weights.head.weight[self.token_ids]), None, exact=False)

    def propose(self, hidden: Tensor, count: int) -> list[list[list[int]]]:
        """Each head's `count` likeliest tokens after each of N rows, [N, H, count].

        hidden [N, d]: states after the last layer, where the rows' newest tokens were chosen.
        """
        x = self._backend.normalise(hidden, self._norm)
        blocks = F.silu(self._blocks(x)).view(len(x), -1, x.shape[1])
        best = self._head.logits((x.unsqueeze(1) + blocks).flatten(0, 1)).topk(count).indices
        tokens: list[list[list[int]]] = ToHost(self.token_ids[best].view(len(x), -1, count)).tolist()
        return tokens


def load_medusa(decoder: Decoder, folder: Path | None) -> Medusa:
    """Read heads; without a folder, those that ship for this model. Raises ModelError as `load_trained`."""
    label, tensors, found = load_trained(MedusaLabel, decoder.folder, folder)
    width = decoder.spec.hidden
    shapes = {"weights": (label.heads, width, width), "biases": (label.heads, width)}
    check_shapes(tensors, {**shapes, "token_ids": (label.tokens,)}, found)
    return Medusa(decoder, tensors)
