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
from rayskip.model.cache.kv_cache import KVCache

LOOKUP = "lookup"
"""What its drafts are counted as."""


@dataclass(frozen=True)
class Continuation:
    """`tokens` that followed the last `size` tokens earlier in the text; rank 0: the latest time, 1: the latest
    that it went on otherwise, and so on."""

    tokens: list[int]
    size: int
    rank: int


class Index:
    """What followed each n-gram of one text, and where."""

    def __init__(self, longest: int, most: int) -> None:
        """longest: n-grams that are known. most: different tokens, the latest, that may follow each."""
        self._longest = longest
        self._most = most
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}

    def copies(self, row: Sequence, count: int) -> list[Continuation]:
        """Up to `most` copies of `count` tokens that differ in their first token, longest known suffix first."""
        self._extend(row)
        found: dict[int, Continuation] = {}
        for size in range(min(self._longest, len(self._tokens)), 0, -1):
            for rank, at in enumerate(self._next.get(tuple(self._tokens[-size:]), ())):
                if len(found) == self._most:
                    return list(found.values())
                if (token := self._tokens[at]) not in found:
                    # past its end, the text goes on in circles
                    tokens = list(islice(cycle(self._tokens[at : at + count]), count))
                    found[token] = Continuation(tokens, size, rank)
        return list(found.values())

    def _extend(self, row: Sequence) -> None:
        tokens, following = self._tokens, self._next
        for token in row.tokens(len(tokens), row.length):
            at = len(tokens)
            for size in range(1, min(self._longest, at) + 1):
                ngram = tuple(tokens[at - size :])
                before = following.get(ngram)
                if before is None:  # nearly always, so this is what a token costs
                    following[ngram] = (at,)
                else:
                    others = [place for place in before if tokens[place] != token]
                    following[ngram] = (at, *others[: self._most - 1])
            tokens.append(token)


class Lookups:
    """The indexes of the rows in flight; forgotten with them."""

    def __init__(self, longest: int, most: int) -> None:
        self._longest = longest
        self._most = most
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def copies(self, row: Sequence, count: int) -> list[Continuation]:
        """See `Index.copies`."""
        index = self._indexes.get(row)
        if index is None:
            index = self._indexes[row] = Index(self._longest, self._most)
        return index.copies(row, count) if count > 0 else []


class LookupDrafter(Drafter):
    def __init__(self, config: LookupDraft) -> None:
        self._config = config
        self.most_tokens = config.tokens
        self._lookups = Lookups(config.max_ngram, 1)

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            for copy in self._lookups.copies(row, min(self._config.tokens, row.draft_room)):
                row.draft.add_chain(copy.tokens, LOOKUP)
