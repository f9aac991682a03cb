"""A smaller model drafts (speculative decoding, arXiv 2211.17192): greedily, token by token, all rows at once.

It keeps its own keys and values, in a cache of the engine's shape. What a row has that its cache lacks, the whole
prompt at first, runs with the row's next draft.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from rayskip.config import DraftModelDraft
from rayskip.decode.batch import Chunk, group_key, token_batch
from rayskip.decode.draft import NEWEST
from rayskip.decode.drafters.drafter import MISSED, Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import KVCache
from rayskip.skip import full_depth

DRAFT_MODEL = "draft_model"
"""What its drafts are counted as."""


class DraftModelDrafter(Drafter):
    def __init__(self, config: DraftModelDraft, model: Decoder, vocab: int) -> None:
        """vocab: tokens of the model that verifies; embeddings past them are padding, as may be its own past the
        drafting model's."""
        self._config = config
        self._model = model
        self._vocab = vocab
        self._full = full_depth(len(model.layers))
        self._cache = model.new_cache()
        self._stored: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()
        """Of each row: its slot, and how many of its tokens lie there."""

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        length = self._model.ops.slot_length(cache.length)
        if (self._cache.slots, self._cache.length) != (cache.slots, length):
            self._cache.resize(cache.slots, length)
            self._stored.clear()
        longest, room = self._model.spec.max_positions - self._config.tokens, MISSED + len(rows)
        running = []
        for row in rows:
            if room > 0 and row.draft_room > 0 and row.length <= longest:
                start = self._start(row)
                chunk = Chunk(row, start, min(row.length, start + room))
                if max(row.tokens(chunk.start, chunk.stop)) >= self._model.spec.vocab:
                    continue  # padding of the larger model's embeddings
                room -= chunk.stop - chunk.start
                running.append(chunk)
                self._stored[row] = row.slot, chunk.stop
        while running:
            running = self._propose(running)

    def release(self) -> None:
        self._cache.resize(0, 0)

    def _start(self, row: Sequence) -> int:
        """The first of the row's tokens to run: its newest one at the latest."""
        slot, stored = self._stored.get(row, (row.slot, 0))
        if slot != row.slot or stored == 0:
            self._cache.clear(row.slot)  # what was there may not have been finite, and masked keys are read
            return 0
        return min(stored, row.length - 1)

    def _propose(self, chunks: list[Chunk]) -> list[Chunk]:
        """Run the chunks, and propose what follows each; the chunks that run it."""
        ordered = sorted(chunks, key=group_key)
        batch = token_batch(ordered, self._full, self._model.device)
        logits = self._model.logits(self._model.hidden(batch, self._cache))
        tokens = logits[:, : self._vocab].argmax(-1).tolist()
        further = []
        for chunk, token in zip([chunk for chunk in ordered if chunk.last], tokens, strict=True):
            row = chunk.sequence
            row.draft.add(len(row.draft) - 1 if len(row.draft) else NEWEST, token, DRAFT_MODEL)
            if len(row.draft) < min(self._config.tokens, row.draft_room):
                place = row.length + len(row.draft) - 1
                further.append(Chunk(row, place, place + 1))
        return further
