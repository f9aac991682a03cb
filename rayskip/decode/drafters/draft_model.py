"""A smaller model drafts (speculative decoding, arXiv 2211.17192): greedily, token by token, all rows at once.

It keeps its own keys and values, in pages of its own. What a row has that its cache lacks, the whole prompt at
first, runs with the row's next draft.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rayskip.config import DraftModelDraft
from rayskip.decode.batch import Chunk, span_key, token_batch
from rayskip.decode.draft import NEWEST
from rayskip.decode.drafters.drafter import MISSED, Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.backends.transfer import ToHost
from rayskip.model.cache.blocks import Block, BlockPool
from rayskip.model.cache.kv_cache import Assignment, KVCache
from rayskip.model.decoder import Decoder
from rayskip.skip import full_depth

DRAFT_MODEL = "draft_model"
"""What its drafts are counted as."""


@dataclass
class _Stored:
    """A row's leading tokens whose keys and values are there, and the blocks that they lie in."""

    row: Sequence
    tokens: int = 0
    blocks: list[Block] = field(default_factory=list)


class DraftModelDrafter(Drafter):
    def __init__(self, config: DraftModelDraft, model: Decoder, vocab: int) -> None:
        """vocab: tokens of the model that verifies; embeddings past them are padding, as may be its own past the
        drafting model's."""
        self._config = config
        self.most_tokens = config.tokens
        self._model = model
        self._vocab = vocab
        self._full = full_depth(model.depth)
        self._cache = model.new_cache()
        self._pool = BlockPool(0, self._cache.layout.page)
        self._stored: dict[int, _Stored] = {}
        """By row of the cache's table."""

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        self._forget_ended(cache)
        longest, room = self._model.spec.max_positions - self._config.tokens, MISSED + len(rows)
        running = []
        for row in rows:
            if room > 0 and row.draft_room > 0 and row.length <= longest:
                start = self._start(row)
                chunk = Chunk(row, start, min(row.length, start + room))
                if max(row.tokens(chunk.start, chunk.stop)) >= self._model.spec.vocab:
                    continue  # padding of the larger model's embeddings
                if not self._reach(row, row.length + self._config.tokens):
                    continue
                room -= chunk.stop - chunk.start
                running.append(chunk)
                self._stored[row.table_row].tokens = chunk.stop
        while running:
            running = self._propose(running)

    def release(self) -> None:
        self._cache.allocate(0)
        self._stored.clear()

    def _forget_ended(self, cache: KVCache) -> None:
        """Have pages for as many positions as `cache` has, and those of rows that ended back."""
        positions = cache.pages // cache.layers * cache.layout.page
        pages = positions // self._cache.layout.page * self._cache.layers
        if self._cache.pages != pages:
            self._cache.allocate(pages)
            self._pool = BlockPool(pages, self._cache.layout.page)
            self._stored.clear()
        for table_row in [table_row for table_row, stored in self._stored.items() if stored.row.ended]:
            stored = self._stored.pop(table_row)
            self._pool.give_back(stored.row, stored.blocks, unclean=True)  # masked keys are read

    def _start(self, row: Sequence) -> int:
        """The first of the row's tokens to run: its newest one at the latest."""
        stored = self._stored.get(row.table_row)
        return 0 if stored is None else min(stored.tokens, row.length - 1)

    def _reach(self, row: Sequence, stop: int) -> bool:
        """Whether the row has pages for its positions before `stop`."""
        stored = self._stored.setdefault(row.table_row, _Stored(row))
        layers, size = range(self._cache.layers), self._cache.layout.page
        while len(stored.blocks) * size < stop:
            block = self._pool.take(len(layers), len(stored.blocks) * size)
            if block is None:
                return False
            self._cache.clear(self._pool.take_unclean([block]))
            self._cache.assign([Assignment(row.table_row, len(stored.blocks), layers, block.pages)])
            stored.blocks.append(block)
        return True

    def _propose(self, chunks: list[Chunk]) -> list[Chunk]:
        """Run the chunks, and propose what follows each; the chunks that run it."""
        ordered = sorted(chunks, key=span_key)
        batch = token_batch(ordered, self._full, self._model.backend)
        logits = self._model.logits(self._model.hidden(batch, self._cache))
        tokens = ToHost(logits[:, : self._vocab].argmax(-1)).tolist()
        further = []
        for chunk, token in zip([chunk for chunk in ordered if chunk.last], tokens, strict=True):
            row = chunk.sequence
            row.draft.add(len(row.draft) - 1 if len(row.draft) else NEWEST, token, DRAFT_MODEL)
            if len(row.draft) < min(self._config.tokens, row.draft_room):
                place = row.length + len(row.draft) - 1
                further.append(Chunk(row, place, place + 1))
        return further
