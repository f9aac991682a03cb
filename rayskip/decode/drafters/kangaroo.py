"""Kangaroo (arXiv 2404.18911): the model's own first layers and an adapter draft, token by token, all rows at once.

A row stops drafting when it is unsure (early exit of the draft) or has gamma tokens, and leaves the draft batch.
What the first layers computed is kept, so that verification begins at the exit layer, but for the smallest steps.
With `branches` the draft is a tree (section 4.3): several tokens are proposed after each, and it goes on from as
many of the new ones, the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from heapq import nlargest
from operator import itemgetter

import torch

from rayskip.decode.batch import Chunk, span_key, token_batch, with_drafts
from rayskip.decode.draft import NEWEST
from rayskip.decode.drafters.drafter import MISSED, Drafter, States
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.kangaroo import Kangaroo
from rayskip.skip import SkipPolicy, full_depth

KANGAROO = "kangaroo"
"""What its drafts are counted as."""
LEAST_OTHER = 0.03
"""Chance, of a token beside the likeliest ones and all before it, below which it is not worth its verification: on
two cores a token more is some 3% of a round."""

_Node = tuple[int, float]
"""Of a draft, and the chance that it and all before it hold."""


class KangarooDrafter(Drafter):
    def __init__(self, gamma: int, eta: float, branches: int, kangaroo: Kangaroo, decoder: Decoder) -> None:
        """share: of the layers, those before the exit, which verification is spared where `draft` returns states.
        agreement: of the adapter, see its label."""
        self.share = kangaroo.exit_layer / decoder.depth
        self.agreement = kangaroo.agreement
        self.most_tokens = most_drafted(gamma, branches)
        self._gamma = gamma
        self._eta = eta
        self._branches = branches
        self._kangaroo = kangaroo
        self._decoder = decoder
        self._full = full_depth(decoder.depth)
        self._rerun = decoder.backend.traits.rerun_tokens
        self._places: Mapping[tuple[Sequence, int], int] = {}

    def draft(
        self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache, least: float = 0.0
    ) -> States | None:
        """All tokens of the step run the first layers here and enter the adapter's cache; also drafts that rows of
        the step already have from elsewhere, and what rows have missed in the adapter's cache, up to MISSED tokens;
        a row that has missed more drafts in a later step. None: some did not run, see
        `Traits.rerun_tokens`, and are missed later if they hold.

        least: chance, of a token and all before it, below which it is not proposed.
        """
        missed, room = [], MISSED
        for row in rows:
            if count := min(row.missed, room):
                missed.append(Chunk(row, row.draft_cached, row.draft_cached + count))
                room -= count
        for chunk in (*missed, *chunks):
            if chunk.start <= chunk.sequence.draft_cached:
                chunk.sequence.draft_cached = chunk.stop
        going = {
            row: [(NEWEST, 1.0)] for row in rows if row.draft_room > 0 and row.draft_cached == row.length
        }
        ran = _Ran(self._kangaroo, self._decoder, self._full, cache, self._branches)
        ran.run(
            [*missed, *with_drafts(chunks)],
            [(row, row.length + node) for row in going for node in range(NEWEST, len(row.draft))],
        )
        while going:
            going = self._go_on(going, ran, least)
        self._places = ran.places
        return States(self._kangaroo.exit_layer, ran.x, ran.places) if ran.all else None

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: torch.Tensor) -> None:
        """The adapter's cache holds the drafts that ran and were accepted, if it held what was before them."""
        for row, verdict in verdicts.items():
            if verdict.accepted and row.draft_cached == row.length:
                row.draft_cached += sum((row, row.length + node) in self._places for node in verdict.path)
        self._places = {}

    def _go_on(
        self, going: Mapping[Sequence, Seq[_Node]], ran: _Ran, least: float
    ) -> dict[Sequence, list[_Node]]:
        """Propose what follows each row's nodes, likeliest first; the nodes to go on from, as many as `branches`.

        A row that is unsure of these together still has them verified, but goes on no more.
        """
        chunks, further = [], {}
        for row, nodes in going.items():
            found = []
            for among, (node, chance) in enumerate(nodes):
                for rank, (token, confidence) in enumerate(ran.next[row, row.length + node]):
                    known, place = row.draft.child(node, token), row.length + len(row.draft)
                    needed = max(least, LEAST_OTHER) if among or rank else least
                    if known is None and (chance * confidence < needed or not row.draft_places):
                        continue
                    child = row.draft.add(node, token, KANGAROO)
                    if known is None:
                        chunks.append(Chunk(row, place, place + 1))
                    if row.draft.depths[child] < min(self._gamma, row.draft_room):
                        found.append((child, chance * confidence))
            likeliest = nlargest(self._branches, found, key=itemgetter(1))
            chance_before, chance_after = (sum(chance for _, chance in some) for some in (nodes, likeliest))
            if likeliest and chance_after >= self._eta * chance_before:
                further[row] = likeliest
        if chunks and (further or len(ran.places) + len(chunks) > self._rerun):
            ran.run(chunks, [(row, row.length + node) for row, nodes in further.items() for node, _ in nodes])
        else:
            ran.all = not chunks
        return further


class _Ran:
    """Tokens of a step that have run the first layers: x [M, d], and where in it each (row, place) is. next: of
    some of them the likeliest tokens that follow, and their probabilities. all: whether none is left to run."""

    def __init__(
        self, kangaroo: Kangaroo, decoder: Decoder, policy: SkipPolicy, cache: KVCache, count: int
    ) -> None:
        """count: tokens that follow one."""
        self.places: dict[tuple[Sequence, int], int] = {}
        self.next: dict[tuple[Sequence, int], list[tuple[int, float]]] = {}
        self.x = decoder.weights.embed.new_empty(0, decoder.spec.hidden)
        self.all = True
        self._kangaroo, self._backend, self._policy, self._cache = kangaroo, decoder.backend, policy, cache
        self._count = count

    def run(self, chunks: Seq[Chunk], after: Seq[tuple[Sequence, int]]) -> None:
        """Run chunks; after: those of their tokens whose next ones are wanted, if they did not run before."""
        before = len(self.places)
        ordered = sorted(chunks, key=span_key)
        for chunk in ordered:
            for place in range(chunk.start, chunk.stop):
                self.places[chunk.sequence, place] = len(self.places)
        wanted = [key for key in after if key not in self.next]
        x, tokens, chances = self._kangaroo.step(
            token_batch(ordered, self._policy, self._backend),
            self._cache,
            [self.places[key] - before for key in wanted],
            self._count,
        )
        self.x = torch.cat([self.x, x]) if before else x
        for key, own, sure in zip(wanted, tokens, chances, strict=True):
            self.next[key] = list(zip(own, sure, strict=True))


def most_drafted(gamma: int, branches: int) -> int:
    """Tokens of a row's draft at most: `branches` after the newest one, and after each of as many so many again."""
    return branches + (gamma - 1) * branches**2
