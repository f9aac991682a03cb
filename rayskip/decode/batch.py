"""Tokens of a step as packed tensors. Knows neither queues nor how tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import key_blocks
from rayskip.model.ops import Group, TokenBatch
from rayskip.skip import SkipPolicy


@dataclass(frozen=True)
class Chunk:
    """Run tokens [start, stop) of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether its last token is the newest one or a draft, so that a choice follows it."""
        return self.stop >= self.sequence.length

    @property
    def generated(self) -> bool:
        """Whether it is a generated token that runs."""
        return self.start >= len(self.sequence.prompt.token_ids)


def token_batch(chunks: Seq[Chunk], policy: SkipPolicy, device: torch.device) -> TokenBatch:
    """Chunks as packed tensors. Those of one depth and width that read equally many key blocks attend as one group.

    chunks: in the order of their groups, see `group_key`.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    groups: list[Group] = []
    skip_positions: list[int] = []
    for (skip_position, width, keys), members in groupby(chunks, group_key):
        start = len(ids)
        for chunk in members:
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            slots += [chunk.sequence.slot] * width
            skip_positions += [skip_position] * width
            if chunk.last:
                outputs.append(len(ids) - 1)
        groups.append(Group(start, width, torch.tensor(slots[start::width], device=device), keys))
    packed = torch.tensor([ids, positions, slots], device=device)
    logits_of = torch.tensor(outputs, dtype=torch.long, device=device)
    active = None if policy.is_full else np.searchsorted(skip_positions, policy.until).tolist()
    return TokenBatch(packed[0], packed[1], packed[2], groups, logits_of, active)


def group_key(chunk: Chunk) -> tuple[int, int, int]:
    """(generated position, tokens, key positions read): depends on nothing but the row itself.

    A chunk is either prompt or one generated token, so its tokens share a depth. Sorted, the deepest come first.
    """
    skip_position = chunk.sequence.skip_position(chunk.start)
    return skip_position, chunk.stop - chunk.start, key_blocks(chunk.stop)


def draft_chunks(row: Sequence) -> list[Chunk]:
    """The row's draft, token by token: each has its own depth, and attends as it would without a drafter."""
    return [Chunk(row, at, at + 1) for at in range(row.length, row.length + len(row.draft))]
