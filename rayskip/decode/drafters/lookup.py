"""Prompt lookup (LLMA, arXiv 2304.04487): what followed the newest tokens when they last stood in the text.

Serves completions that repeat their prompt or themselves: extraction, summaries, code. No training, no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from rayskip.config import LookupDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KVCache


class Index:
    """Where each n-gram of one text was last followed by something."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: Seq[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known suffix of `tokens`, a text that only grows."""
        self._extend(tokens)
        for size in range(min(self._longest, len(tokens)), 0, -1):
            if (at := self._next.get(tuple(tokens[-size:]))) is not None:
                return list(tokens[at : at + count])
        return []

    def _extend(self, tokens: Seq[int]) -> None:
        """Index the n-grams of all tokens but the last, which nothing follows yet."""
        for stop in range(len(self._tokens) + 1, len(tokens)):
            self._tokens.append(tokens[stop - 1])
            for size in range(1, min(self._longest, stop) + 1):
                self._next[tuple(self._tokens[-size:])] = stop


class LookupDrafter:
    def __init__(self, config: LookupDraft) -> None:
        self._config = config
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            index = self._indexes.setdefault(row, Index(self._config.max_ngram))
            row.draft = index.propose(row.tokens(0, row.length), min(self._config.tokens, row.draft_room))
