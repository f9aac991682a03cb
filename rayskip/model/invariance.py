"""Whether a row's logits are the same bits whatever runs beside it, measured on this machine.

Architecture invariant 3 rests on the kernels that libraries pick by shape, so it is tried out, on the model's
first layer and head; the answer goes into the job's report.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import key_blocks
from rayskip.model.ops import Group, TokenBatch

LENGTH = 131
POSITIONS = (0, 5, 31, 32, 77, 130)
"""Positions whose logits are compared."""
VARIANTS = ((1, 33), (3, 1), (3, LENGTH), (8, 7))
"""(rows, tokens of a row in one forward), each against one row, token by token."""


def is_batch_invariant(decoder: Decoder) -> bool:
    """True when a row's logits are bit-equal alone, in a batch and in a prefill chunk of any width."""
    shallow = decoder.first_layers(1)
    length = min(LENGTH, decoder.spec.max_positions)
    generator = torch.Generator().manual_seed(0)
    rows = max(rows for rows, _ in VARIANTS)
    tokens = torch.randint(decoder.spec.vocab, (rows, length), generator=generator).to(decoder.device)
    alone = _logits(shallow, tokens[:1], 1)
    return all(torch.equal(_logits(shallow, tokens[:rows], width), alone) for rows, width in VARIANTS)


def _logits(decoder: Decoder, tokens: Tensor, width: int) -> Tensor:
    """Logits of row 0 at POSITIONS when the rows [R, T] run in chunks of `width` tokens."""
    rows, length = tokens.shape
    device = tokens.device
    cache = decoder.new_cache()
    cache.resize(rows, decoder.ops.slot_length(length))
    slots = torch.arange(rows, device=device)
    found = []
    for start in range(0, length, width):
        chunk = tokens[:, start : start + width]
        size = chunk.shape[1]
        wanted = [position - start for position in POSITIONS if start <= position < start + size]
        batch = TokenBatch(
            token_ids=chunk.flatten(),
            positions=torch.arange(start, start + size, device=device).repeat(rows),
            slots=slots.repeat_interleave(size),
            groups=[Group(0, size, slots, key_blocks(start + size))],
            outputs=torch.tensor(wanted, dtype=torch.long, device=device),
        )
        found.append(decoder.forward(batch, cache))
    return torch.cat(found)
