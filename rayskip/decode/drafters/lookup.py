"""Prompt lookup (LLMA, arXiv 2304.04487): what followed the newest tokens when they last stood in the text.

Serves completions that repeat their prompt or themselves: extraction, summaries, code. No training, no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import cycle, islice
from weakref import WeakKeyDictionary

from rayskip.config import LookupDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KVCache

LOOKUP = "lookup"
"""What its drafts are counted as."""


KEPT = 3
"""Different tokens, the latest ones, that an n-gram is known to be followed by."""


@dataclass(frozen=True)
class Copy:
    """`tokens` that followed the last `size` tokens earlier in the text; rank 0: the latest time, 1: the latest
    that it went on otherwise, and so on."""

    tokens: list[int]
    size: int
    rank: int


class Index:
    """What followed each n-gram of one text, and where."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], dict[int, int]] = {}

    def copies(self, row: Sequence, count: int, most: int) -> list[Copy]:
        """Up to `most` copies of `count` tokens that differ in their first token, longest known suffix first."""
        self._extend(row)
        found: dict[int, Copy] = {}
        for size in range(min(self._longest, len(self._tokens)), 0, -1):
            followers = self._next.get(tuple(self._tokens[-size:]), {})
            for rank, (token, at) in enumerate(reversed(followers.items())):
                if len(found) == most:
                    return list(found.values())
                if token not in found:
                    # past its end, the text goes on in circles
                    tokens = list(islice(cycle(self._tokens[at : at + count]), count))
                    found[token] = Copy(tokens, size, rank)
        return list(found.values())

    def _extend(self, row: Sequence) -> None:
        for token in row.tokens(len(self._tokens), row.length):
            at = len(self._tokens)
            for size in range(1, min(self._longest, at) + 1):
                followers = self._next.setdefault(tuple(self._tokens[-size:]), {})
                followers.pop(token, None)
                followers[token] = at
                if len(followers) > KEPT:
                    del followers[next(iter(followers))]
            self._tokens.append(token)


class Lookups:
    """The indexes of the rows in flight; forgotten with them."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def copies(self, row: Sequence, count: int, most: int) -> list[Copy]:
        """See `Index.copies`."""
        index = self._indexes.get(row)
        if index is None:
            index = self._indexes[row] = Index(self._longest)
        return index.copies(row, count, most) if count > 0 else []


class LookupDrafter(Drafter):
    def __init__(self, config: LookupDraft) -> None:
        self._config = config
        self._lookups = Lookups(config.max_ngram)

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            for copy in self._lookups.copies(row, min(self._config.tokens, row.draft_room), 1):
                row.draft.add_chain(copy.tokens, LOOKUP)
