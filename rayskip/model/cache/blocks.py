"""Who holds which pages: a pool of them, rows' blocks that are counted, and prompts' blocks that are found again.

Bookkeeping without tensors. A block is a row's stretch of `size` successive positions; it has a page for each
layer that runs on any of them, so a row that skips layers takes fewer pages. Its schedule is nested
(SkipDecode, arXiv 2307.02628, section 3), so a layer that it has stopped to run it never reads again: in all of
its blocks that layer's pages are spare. Blocks of prompts make a tree: rows that begin alike hold the same
blocks. What nobody needs any more of a block is kept until its pages are wanted, the one unused for longest
first (as in vLLM's and SGLang's prefix caches).

Does not know sequences, and never reads a clock.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

SHARED = 16
"""Fewest tokens of a block worth copying from another one instead of computing them."""
ALL = 1 << 30
"""Layers of a row that may still run every one."""


class Owner(Protocol):
    """Who computes a block's tokens. computed: its leading tokens whose keys and values are there for whoever plans
    from now on: a step has run them or, where all steps run one after another, will have before the next one.
    draft_cached: likewise in the drafter's own layers, or on their way: drafts may be wrong."""

    computed: int
    draft_cached: int


@dataclass(eq=False)
class Block:
    """pages: of its layers, in the pool's order of layers, the one that runs longest first. start: its first
    position. needs: how many of its layers each row that holds it may still run, counted. parent, tokens: by which
    it is found: number of the block before it (-1: none), and tokens of a prompt that it holds or will hold; None
    where it cannot be found.

    computed, drafted: how many of `tokens` are there once nobody computes them any more (see Owner).
    unclean: whether a number in it may be not finite.
    """

    pages: list[int]
    start: int
    number: int
    needs: Counter[int]
    parent: int = -1
    tokens: Tokens | None = None
    owner: Owner | None = None
    computed: int = 0
    drafted: int = 0
    unclean: bool = False

    @property
    def holders(self) -> int:
        """Rows that have it in their table."""
        return self.needs.total()

    @property
    def needed(self) -> int:
        """Its leading pages that a holder may still read."""
        return min(max((layers for layers, rows in self.needs.items() if rows), default=0), len(self.pages))

    def ready(self) -> tuple[int, int]:
        """(computed, drafted) now."""
        if self.owner is None or self.tokens is None:
            return self.computed, self.drafted
        size = len(self.tokens)
        computed, drafted = (
            min(max(done - self.start, 0), size) for done in (self.owner.computed, self.owner.draft_cached)
        )
        return computed, min(computed, drafted)


@dataclass(frozen=True)
class Match:
    """What a prompt can take over. blocks: whole ones, to hold with their other holders. tail: a block whose first
    `shared` tokens are those that follow, to be copied. tokens: in all. drafted: of them, those that the
    drafter's own layers have too. coming: tokens that it could take over once what is being computed is done."""

    blocks: list[Block] = field(default_factory=list)
    tail: Block | None = None
    tokens: int = 0
    drafted: int = 0
    coming: int = 0


class BlockPool:
    """The pages of one cache, numbered from 1. Not thread-safe: one thread plans for all who use them.

    size: positions of a block. unclean: pages that were given back with numbers that may not be finite; who takes
    them clears them.
    """

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self._numbers = count()
        self.reset(pages)

    def reset(self, pages: int) -> None:
        """Have so many pages, and forget who held the old ones."""
        self.pages = pages
        self.unclean: set[int] = set()
        self._free = list(range(pages, 0, -1))
        self._by_tokens: dict[tuple[int, bytes], Block] = {}
        self._by_first: dict[tuple[int, bytes], Block] = {}
        self._kept: OrderedDict[int, tuple[Block, int]] = OrderedDict()
        """Blocks of which so many pages are spare."""
        self._spare = 0

    @property
    def available(self) -> int:
        """Pages that can be taken: free ones, and those that no row needs."""
        return len(self._free) + self._spare

    @property
    def held(self) -> int:
        """Pages that rows need, each counted once."""
        return self.pages - self.available

    def take(self, pages: int, start: int, layers: int = ALL) -> Block | None:
        """A new block at position `start` with so many pages, for a row that may still run so many layers; None
        where there are not as many."""
        if pages > self.available:
            return None
        while len(self._free) < pages:
            _, (oldest, spare) = self._kept.popitem(last=False)
            self._spare -= spare
            self._trim(oldest)
        taken = [self._free.pop() for _ in range(pages)]
        return Block(taken, start, next(self._numbers), Counter([layers]))

    def hold(self, blocks: Collection[Block], layers: int = ALL) -> None:
        """One row more holds each of them, which may run so many layers."""
        for block in blocks:
            block.needs[layers] += 1
            self._keep(block)

    def need(self, blocks: Seq[Block], before: int, now: int) -> None:
        """A row that holds them may run only so many layers from now on, in place of `before`."""
        for block in reversed(blocks):
            block.needs.subtract([before])
            block.needs[now] += 1
            self._keep(block)

    def take_unclean(self, blocks: Iterable[Block]) -> list[int]:
        """Pages of these blocks that are to be cleared before anything is computed in them; they are clean then."""
        if not self.unclean:
            return []
        taken = self.unclean.intersection(page for block in blocks for page in block.pages)
        self.unclean -= taken
        return sorted(taken)

    def release(self, blocks: Seq[Block], layers: int = ALL) -> None:
        """A row that might run so many layers holds them no more; in its order. What is found again by its tokens
        is kept for now."""
        for block in reversed(blocks):  # a block goes before the one that it follows
            block.needs.subtract([layers])
            self._keep(block)

    def give_back(self, owner: Owner, blocks: Seq[Block], unclean: bool = False, layers: int = ALL) -> None:
        """`release` what a row held, which computes no more. unclean: its numbers may be not finite."""
        for block in blocks:
            its_own = block.owner is owner or block.tokens is None  # what it took over is another row's work
            if block.owner is owner:
                (block.computed, block.drafted), block.owner = block.ready(), None
                if block.tokens is not None and (unclean or block.computed < len(block.tokens)):
                    self._unlist(block)  # nobody completes it
            block.unclean |= unclean and its_own and block.holders == 1
        self.release(blocks, layers)

    def offer(self, block: Block, before: Block | None, tokens: Tokens, owner: Owner) -> None:
        """Let a block be found by the prompt's tokens that it will hold, behind those of the block before it,
        unless another one is found by them already."""
        parent = -1 if before is None else before.number
        key = parent, tokens.tobytes()
        if key in self._by_tokens or (before is not None and before.tokens is None):
            return
        block.parent, block.tokens, block.owner = parent, tokens, owner
        self._by_tokens[key] = block
        if len(tokens) >= SHARED:
            self._by_first.setdefault((parent, tokens[:SHARED].tobytes()), block)

    def match(self, prompt: Tokens) -> Match:
        """What is there of a prompt. Its last token is left out: it always runs, since it chooses the first new
        one."""
        usable, size, parent = len(prompt) - 1, self.size, -1
        blocks: list[Block] = []
        drafted = 0
        while (start := len(blocks) * size) + size <= usable:
            block = self._by_tokens.get((parent, prompt[start : start + size].tobytes()))
            if block is None:
                break
            computed, drafter_has = block.ready()
            if computed < size:
                return Match(blocks, None, start, drafted, self._coming(prompt, parent, start))
            drafted += drafter_has if drafted == start else 0
            blocks.append(block)
            parent = block.number
        rest = prompt[start:usable]
        tail = self._by_first.get((parent, rest[:SHARED].tobytes())) if len(rest) >= SHARED else None
        if tail is None or tail.tokens is None:
            return Match(blocks, None, start, drafted, start)
        alike = _common(tail.tokens, rest)
        computed, drafter_has = tail.ready()
        shared = min(alike, computed)
        if shared < SHARED:
            return Match(blocks, None, start, drafted, start + (alike if tail.owner is not None else 0))
        drafted += min(drafter_has, shared) if drafted == start else 0
        coming = alike if tail.owner is not None else shared
        return Match(blocks, tail, start + shared, drafted, start + coming)

    def _coming(self, prompt: Tokens, parent: int, start: int) -> int:
        """How far the prompt goes along blocks that are there or are being computed."""
        while start + self.size < len(prompt):
            block = self._by_tokens.get((parent, prompt[start : start + self.size].tobytes()))
            if block is None:
                break
            parent, start = block.number, start + self.size
        return start

    def _keep(self, block: Block) -> None:
        """Keep what nobody needs of it as long as it can be found again; else its pages are free."""
        _, spare = self._kept.pop(block.number, (block, 0))
        self._spare -= spare
        if not (spare := len(block.pages) - block.needed):
            return
        if block.tokens is None:
            self._trim(block)
            return
        self._kept[block.number] = block, spare
        self._spare += spare

    def _trim(self, block: Block) -> None:
        """The pages that nobody needs are free, and it is found no more, since it is not whole."""
        self._unlist(block)
        needed = block.needed
        spare, block.pages = block.pages[needed:], block.pages[:needed]
        if block.unclean:
            self.unclean.update(spare)
        self._free += reversed(spare)

    def _unlist(self, block: Block) -> None:
        """It is found no more."""
        if block.tokens is None:
            return
        for found, tokens in ((self._by_tokens, block.tokens), (self._by_first, block.tokens[:SHARED])):
            key = block.parent, tokens.tobytes()
            if found.get(key) is block:
                del found[key]
        block.tokens = None


def _common(one: Tokens, other: Tokens) -> int:
    """How many leading tokens two prompts' parts share."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size
