"""Kangaroo (arXiv 2404.18911): the model's own first layers and an adapter draft, token by token, all rows at once.

A row stops drafting when it is unsure (early exit of the draft) or has gamma tokens, and leaves the draft batch.
What the first layers computed is kept, so that verification begins at the exit layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch

from rayskip.decode.batch import Chunk, draft_chunks, group_key, token_batch
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.errors import ConfigError
from rayskip.model.forward import Decoder
from rayskip.model.kangaroo import Kangaroo
from rayskip.model.kv_cache import KVCache
from rayskip.skip import FOREVER, SkipPolicy, full_depth

KANGAROO = "kangaroo"
"""What its drafts are counted as."""


class KangarooDrafter(Drafter):
    def __init__(self, gamma: int, eta: float, kangaroo: Kangaroo, decoder: Decoder) -> None:
        """share: of the layers, those that verification is spared."""
        self.share = kangaroo.exit_layer / len(decoder.layers)
        self._gamma = gamma
        self._eta = eta
        self._kangaroo = kangaroo
        self._decoder = decoder
        self._full = full_depth(len(decoder.layers))

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> States:
        """All tokens of the step run the first layers here and enter the adapter's cache; also drafts that rows of
        the step already have from elsewhere, and what a row that now drafts has missed in the adapter's cache."""
        missed = [
            Chunk(row, row.draft_cached, row.computed) for row in rows if row.draft_cached < row.computed
        ]
        drafts = [chunk for own in chunks if own.generated for chunk in draft_chunks(own.sequence)]
        known: dict[tuple[Sequence, int], int] = {}
        parts: list[torch.Tensor] = []
        drafting = {row for row in rows if row.draft_room > 0}
        newest = {(row, row.length - 1) for row in drafting}
        running = sorted([*missed, *chunks, *drafts], key=group_key)
        while running:
            batch = token_batch(running, self._full, self._decoder.device)
            x = self._decoder.run_layers(
                self._decoder.embed(batch), batch, cache, 0, self._kangaroo.exit_layer
            )
            attended = self._kangaroo.attend(x, batch, cache)
            first = sum(map(len, parts))
            parts.append(x)
            places = [(chunk.sequence, at) for chunk in running for at in range(chunk.start, chunk.stop)]
            known.update({place: first + at for at, place in enumerate(places)})
            going = [(row, at) for at, (row, position) in enumerate(places) if (row, position) in newest]
            running = self._go_on(going, x, attended, drafting)
            newest = {(chunk.sequence, chunk.start) for chunk in running if chunk.sequence in drafting}
        for chunk in (*missed, *chunks):
            if chunk.start <= chunk.sequence.draft_cached:
                chunk.sequence.draft_cached = chunk.stop
        return States(self._kangaroo.exit_layer, parts[0] if len(parts) == 1 else torch.cat(parts), known)

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: torch.Tensor) -> None:
        """The adapter's cache holds the drafts that were accepted."""
        for row, verdict in verdicts.items():
            if row.drafter == KANGAROO and row.draft_cached == row.length:
                row.draft_cached += verdict.accepted

    def _go_on(
        self,
        going: Seq[tuple[Sequence, int]],
        x: torch.Tensor,
        attended: torch.Tensor,
        drafting: set[Sequence],
    ) -> list[Chunk]:
        """Propose one token for each row, from its token's index; the chunks that run them next.

        A row that is unsure of its token still has it verified, but leaves `drafting`.
        """
        if not going:
            return []
        index = torch.tensor([at for _, at in going], device=x.device)
        tokens, confidences = self._kangaroo.propose(x[index], attended[index])
        chunks = []
        for (row, _), token, confidence in zip(going, tokens, confidences, strict=True):
            row.draft.append(token)
            row.drafter = KANGAROO
            end = row.length + len(row.draft)
            chunks.append(Chunk(row, end - 1, end))
            full = len(row.draft) >= min(self._gamma, row.draft_room)
            if full or confidence < self._eta:
                drafting.discard(row)
        return sorted(chunks, key=group_key)


def check_policy(kangaroo: Kangaroo, policy: SkipPolicy) -> None:
    """Raises ConfigError when the policy skips one of the adapter's layers: verification could not share them."""
    if skipped := [layer for layer in range(kangaroo.exit_layer) if policy.until[layer] != FOREVER]:
        raise ConfigError(
            f"decode.draft: the adapter follows {kangaroo.exit_layer} layers, and {policy.name} skips layer "
            f"{skipped[0]}; a policy that keeps the bottom {kangaroo.exit_layer} is wanted (skipdecode: warmup)"
        )
