"""Retrieval (REST, arXiv 2311.08252): what followed the newest tokens in other texts: the replica's own completions
so far, and a corpus if one is given.

Serves jobs whose completions resemble each other: labels, templates, one format for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from threading import Lock

from rayskip.config import RetrievalDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.cache.kv_cache import KVCache

SIZES = (4, 3, 2)
"""Lengths of the n-grams that are looked up, in this order: one token alone says too little across texts."""


class Store:
    """Whole texts, and where each n-gram was last followed by something. Workers share it."""

    def __init__(self, limit: int | None = None) -> None:
        """limit: tokens kept; a text that does not fit any more replaces all before it. None: all are."""
        self._limit = limit
        self._lock = Lock()
        self._size = 0
        self._next: dict[tuple[int, ...], tuple[Seq[int], int]] = {}

    def add(self, text: Seq[int]) -> None:
        """Learn what follows what in a text."""
        with self._lock:
            if self._limit is not None and self._size + len(text) > self._limit:
                self._next, self._size = {}, 0
            self._size += len(text)
            for at in range(min(SIZES), len(text)):
                for size in SIZES:
                    if size <= at:
                        self._next[tuple(text[at - size : at])] = (text, at)

    def propose(self, suffix: Seq[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest of SIZES ends of `suffix`, to the end of their text."""
        for size in SIZES:
            if len(suffix) >= size and (found := self._next.get(tuple(suffix[-size:]))) is not None:
                text, at = found
                return list(text[at : at + count])
        return []


class RetrievalDrafter(Drafter):
    def __init__(self, config: RetrievalDraft, completions: Store, corpus: Store) -> None:
        self._config = config
        self.most_tokens = config.tokens
        self._completions = completions
        self._corpus = corpus
        self._running: set[Sequence] = set()

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        decoding = {chunk.sequence for chunk in chunks if chunk.generated}
        for ended in (
            self._running - decoding
        ):  # or waits for its cohort, or begins anew: then it is learnt twice
            prompt = ended.prompt.token_ids
            self._completions.add([*prompt[-SIZES[0] :], *ended.generated])
        self._running = decoding
        for row in rows:
            suffix = row.tokens(max(row.length - SIZES[0], 0), row.length)
            count = min(self._config.tokens, row.draft_room)
            tokens = self._completions.propose(suffix, count) or self._corpus.propose(suffix, count)
            row.draft.add_chain(tokens, "retrieval")
