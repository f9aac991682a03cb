"""Retrieval (REST, arXiv 2311.08252): what followed the newest tokens in other texts: the replica's own generations
so far, and a corpus if one is given.

Serves jobs whose completions resemble each other: labels, templates, one format for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from rayskip.config import RetrievalDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.kv_cache import KVCache

SIZES = (4, 3, 2)
"""Lengths of the n-grams that are looked up, in this order: one token alone says too little across texts."""


class Store:
    """All texts in one list, and where each n-gram was last followed by something."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}

    def add(self, before: Seq[int], tokens: Seq[int]) -> None:
        """Learn what follows what in `tokens`; before: the few tokens in front of them. Full, it starts anew."""
        if len(self._tokens) + len(tokens) > self._limit:
            self._tokens, self._next = [], {}
        start = len(self._tokens)
        self._tokens += [*before, *tokens]
        for at in range(start + len(before), len(self._tokens)):
            for size in SIZES:
                if at - size >= start:
                    self._next[tuple(self._tokens[at - size : at])] = at

    def propose(self, suffix: Seq[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest of SIZES ends of `suffix`."""
        for size in SIZES:
            if len(suffix) >= size and (at := self._next.get(tuple(suffix[-size:]))) is not None:
                return self._tokens[at : at + count]
        return []


class RetrievalDrafter(Drafter):
    def __init__(self, config: RetrievalDraft, corpus: Seq[Seq[int]]) -> None:
        self._config = config
        self._store = Store(config.max_tokens)
        for text in corpus:
            self._store.add((), text)
        self._seen: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        longest = SIZES[0]
        for row in rows:
            seen = self._seen.get(row, 0)
            if len(row.generated) - seen >= self._config.tokens:
                known = len(row.prompt.token_ids) + seen
                self._store.add(row.tokens(max(known - longest, 0), known), row.generated[seen:])
                self._seen[row] = len(row.generated)
            suffix = row.tokens(max(row.length - longest, 0), row.length)
            row.draft = self._store.propose(suffix, min(self._config.tokens, row.draft_room))
            row.drafter = "retrieval"
