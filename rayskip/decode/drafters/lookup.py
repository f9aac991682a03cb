"""Prompt lookup (LLMA, arXiv 2304.04487): what followed the newest tokens when they last stood in the text.

Serves completions that repeat their prompt or themselves: extraction, summaries, code. No training, no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import cycle, islice
from weakref import WeakKeyDictionary

from rayskip.config import LookupDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KVCache

LOOKUP = "lookup"
"""What its drafts are counted as."""


class Index:
    """Where each n-gram of one text was last followed by something."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}

    def propose(self, row: Sequence, count: int) -> tuple[list[int], int]:
        """`count` tokens that followed the longest known suffix of the row's text, or none; the suffix's length."""
        self._extend(row)
        newest = row.tokens(row.length - 1, row.length)
        recent = self._tokens[-self._longest :] + newest
        for size in range(min(self._longest, len(recent)), 0, -1):
            if (at := self._next.get(tuple(recent[-size:]))) is not None:
                followed = self._tokens[at : at + count] + newest
                return list(islice(cycle(followed), count)), size  # past its end, the text goes on in circles
        return [], 0

    def _extend(self, row: Sequence) -> None:
        """Index the n-grams of all tokens but the newest, which nothing follows yet."""
        for token in row.tokens(len(self._tokens), row.length - 1):
            self._tokens.append(token)
            for size in range(1, min(self._longest, len(self._tokens)) + 1):
                self._next[tuple(self._tokens[-size:])] = len(self._tokens)


class Lookups:
    """The indexes of the rows in flight; forgotten with them."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def propose(self, row: Sequence, count: int) -> tuple[list[int], int]:
        """See `Index.propose`."""
        index = self._indexes.get(row)
        if index is None:
            index = self._indexes[row] = Index(self._longest)
        return index.propose(row, count)


class LookupDrafter(Drafter):
    def __init__(self, config: LookupDraft) -> None:
        self._config = config
        self._lookups = Lookups(config.max_ngram)

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            tokens, _ = self._lookups.propose(row, min(self._config.tokens, row.draft_room))
            row.draft.add_chain(tokens, LOOKUP)
