"""What every drafter is to the decode loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from rayskip.decode.batch import Chunk
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache

MISSED = 512
"""Tokens of all rows together that a step may catch up on in a drafter's own cache; a row that has missed more
drafts later."""


@dataclass(frozen=True)
class States:
    """What a drafter has already computed of a step: x [M, d] of M tokens before layer `layer`.

    rows: (row, place) -> index into x, for all of the step's tokens, drafts included.
    """

    layer: int
    x: Tensor
    rows: dict[tuple[Sequence, int], int]


class Drafter(ABC):
    """Proposes what may follow. One object per worker; its methods run on the worker's thread.

    Proposals may be wrong and may depend on anything: tokens never do.
    reads_tokens: whether it must know a step's tokens before the next one begins. most_tokens: of a row's draft,
    about: it gets places for so many where there are some to spare.
    """

    reads_tokens = True
    most_tokens = 0

    @abstractmethod
    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States | None:
        """Fill the `draft` of those of `rows` that get a proposal: no path longer than their draft_room, no more
        tokens than their draft_places.

        chunks: the step's tokens without drafts; rows: those of them that decode, none where the step has no room
        for drafts. Returns what verification need not compute again, if anything.
        """

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: Tensor) -> None:
        """Learn what became of the step, while the drafts still stand.

        verdicts: of all rows that got tokens. hidden [R, d]: states after the last layer, by `Verdict.place`.
        """
        return None

    def release(self) -> None:
        """Give back what memory it can: the worker's did not suffice, and its rows begin anew."""
        return None
