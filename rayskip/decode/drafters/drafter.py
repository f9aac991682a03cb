"""What every drafter is to the decode loop."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rayskip.decode.batch import Chunk
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KVCache


@dataclass(frozen=True)
class States:
    """What a drafter has already computed of a step: x [M, d] of M tokens before layer `layer`.

    rows: (row, position) -> index into x, for all of the step's tokens, drafts included.
    """

    layer: int
    x: Tensor
    rows: dict[tuple[Sequence, int], int]


class Drafter(Protocol):
    """Proposes what may follow. One object per lane; its methods run on the lane's thread.

    Proposals may be wrong and may depend on anything: tokens never do.
    """

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        """Set `draft` of each of `rows`, which are those of `chunks` that decode, to at most its draft_room tokens.

        chunks: the step's tokens without drafts. Returns what verification need not compute again, if anything.
        """
        ...
