"""Medusa (arXiv 2401.10774): heads on the last state, one for each token ahead, draft without running a layer.

The chain of the heads' likeliest tokens, and beside each of them the next likeliest as leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rayskip.config import MedusaDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.draft import NEWEST
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.medusa import Medusa


class MedusaDrafter(Drafter):
    def __init__(self, config: MedusaDraft, medusa: Medusa) -> None:
        self._config = config
        self._medusa = medusa
        self.most_tokens = medusa.heads * config.branches
        self._next: WeakKeyDictionary[Sequence, list[list[int]]] = WeakKeyDictionary()

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            node = NEWEST
            for tokens in self._next.pop(row, [])[: row.draft_room]:
                nodes = [row.draft.add(node, token, "medusa") for token in tokens[: row.draft_places]]
                if not nodes:
                    break
                node = nodes[0]

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: Tensor) -> None:
        """Propose at once, from the states where the newest tokens were chosen."""
        going = [row for row, verdict in verdicts.items() if verdict.choices[-1].token_id is not None]
        if going:
            at = to_device([verdicts[row].place for row in going], torch.long, hidden.device)
            tokens = self._medusa.propose(hidden[at], self._config.branches)
            self._next.update(zip(going, tokens, strict=True))
