"""Tokens of a step as packed tensors. Knows neither queues nor how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rayskip.decode.sequence import Sequence
from rayskip.model.backends.base import Backend
from rayskip.model.cache.kv_cache import key_blocks
from rayskip.model.token_batch import Paths, Span, TokenBatch
from rayskip.skip import SkipPolicy


@dataclass(frozen=True)
class Chunk:
    """Run a sequence's tokens at places [start, stop)."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether its last token is the newest one or a draft, so that a choice follows it."""
        return self.stop >= self.sequence.length

    @property
    def branches(self) -> bool:
        """Whether it is a drafted token that does not lie right behind the tokens before it."""
        return self.start >= self.sequence.length and not self.sequence.draft.is_chain

    @property
    def generated(self) -> bool:
        """Whether it is a generated token that runs."""
        return self.start >= len(self.sequence.prompt.token_ids)


@dataclass(frozen=True)
class HostBatch:
    """A TokenBatch as lists, and so without a device.

    tokens [3, N]: ids, positions and rows of the block table. spans: start, width and keys of each.
    paths: places and starts, and `after`, see `Paths`.
    """

    tokens: list[list[int]]
    outputs: list[int]
    spans: list[tuple[int, int, int]]
    active: list[int] | None
    paths: tuple[list[list[int]], list[list[int]]] | None

    def to(self, backend: Backend) -> TokenBatch:
        """Where the backend has its model."""
        packed = backend.tensor(self.tokens)
        stops = (*(start for start, *_ in self.spans[1:]), packed.shape[1])
        spans = [
            Span(start, width, packed[2, start:stop:width], keys)
            for (start, width, keys), stop in zip(self.spans, stops, strict=True)
        ]
        paths = None
        if self.paths is not None:
            places, after = self.paths
            own = backend.tensor(places)
            paths = Paths(own[0], own[1], backend.tensor(after))
        outputs = backend.tensor(self.outputs)
        return TokenBatch(packed[0], packed[1], packed[2], spans, outputs, self.active, paths)


def token_batch(chunks: Seq[Chunk], policy: SkipPolicy, backend: Backend) -> TokenBatch:
    """`host_batch`, where the backend has its model."""
    return host_batch(chunks, policy).to(backend)


def host_batch(chunks: Seq[Chunk], policy: SkipPolicy) -> HostBatch:
    """Chunks as packed tokens. Those of one width, and of one position where depth depends on it, that read
    equally many key blocks attend as one group.

    chunks: in the order of their spans, see `span_key`.
    """
    ids: list[int] = []
    positions: list[int] = []
    table_rows: list[int] = []
    outputs: list[int] = []
    spans: list[tuple[int, int, int]] = []
    skip_positions: list[int] = []
    branches: dict[int, Chunk] = {}
    for (skip_position, width, keys), members in groupby(chunks, span_key):
        start = len(ids)
        for chunk in members:
            first = chunk.sequence.position(chunk.start)
            if chunk.branches:
                branches[len(ids)] = chunk
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            positions += range(first, first + width)
            table_rows += [chunk.sequence.table_row] * width
            skip_positions += [skip_position] * width
            if chunk.last:
                outputs.append(len(ids) - 1)
        spans.append((start, width, keys))
    active = None if policy.is_full else np.searchsorted(skip_positions, policy.until).tolist()
    paths = _paths(positions, branches) if branches else None
    return HostBatch([ids, positions, table_rows], outputs, spans, active, paths)


def _paths(positions: Seq[int], branches: Mapping[int, Chunk]) -> tuple[list[list[int]], list[list[int]]]:
    """branches: index in the batch -> chunk."""
    places, starts = list(positions), [position + 1 for position in positions]
    deepest = max(
        chunk.sequence.draft.depths[chunk.start - chunk.sequence.length] for chunk in branches.values()
    )
    after = [[0] * deepest for _ in positions]
    for at, chunk in branches.items():
        path = chunk.sequence.path(chunk.start)
        places[at], starts[at] = chunk.start, chunk.sequence.length
        after[at][: len(path)] = path
    return [places, starts], after


def span_key(chunk: Chunk) -> tuple[int, int, int]:
    """(generated position, -1 at full depth; tokens; key positions read): depends on nothing but the row itself.

    A chunk is either prompt or one generated token, so its tokens share a depth. Sorted, the deepest come first.
    """
    first, width = chunk.sequence.position(chunk.start), chunk.stop - chunk.start
    return chunk.sequence.skip_position(first), width, key_blocks(first + width)


def with_drafts(chunks: Seq[Chunk]) -> list[Chunk]:
    """Chunks, and behind each with a row's newest token its draft, token by token: each has its own depth, and
    attends as it would without a drafter. A row's tokens stand side by side: its keys can be read once for all."""
    found = []
    for chunk in chunks:
        found.append(chunk)
        if chunk.last:
            row = chunk.sequence
            found += [Chunk(row, at, at + 1) for at in range(row.length, row.length + len(row.draft))]
    return found
