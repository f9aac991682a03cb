"""No drafter: a proposal of nothing, so that the decode loop needs no second way."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.model.cache.kv_cache import KVCache


class NoDrafter(Drafter):
    reads_tokens = False

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        return None
