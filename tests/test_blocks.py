"""Pages without a cache: handed out once, counted, and found again by a prompt's tokens, against a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayskip.model.cache.blocks import ALL, SHARED, Block, BlockPool

SIZE, PAGES, LAYERS = 32, 60, 3
PROMPTS = st.lists(st.sampled_from([(0,) * 20, (1,) * 7, (2,) * 40, (3,)]), min_size=1, max_size=4).map(
    lambda parts: [token for part in parts for token in part]
)


@dataclass(eq=False)
class _Row:
    prompt: list[int]
    computed: int = 0
    draft_cached: int = 0
    layers: int = ALL
    blocks: list[Block] = field(default_factory=list)


class Pool(RuleBasedStateMachine):
    """content: what each page holds by position: the tokens of its row up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(PAGES, SIZE)
        self.rows: list[_Row] = []
        self.content: dict[int, list[tuple[int, ...]]] = {}

    @rule(prompt=PROMPTS)
    def join(self, prompt: list[int]) -> None:
        row = _Row(prompt)
        match = self.pool.match(np.asarray(prompt))
        assert match.tokens <= match.coming < len(prompt)
        held = [*match.blocks, *([match.tail] if match.tail else [])]
        self.pool.hold(held)
        row.blocks += match.blocks
        self.rows.append(row)
        if match.tail is not None:
            assert match.tokens - len(match.blocks) * SIZE >= SHARED
            copied = self._block(row)
            for source, target in zip(match.tail.pages, copied.pages if copied else (), strict=False):
                self.content[target] = list(self.content.get(source, []))
            self.pool.release([match.tail])
            if copied is None:
                self.leave(row)
                return
        row.computed = match.tokens
        self._check(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.integers(1, 50))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        """Prompt tokens, and then generated ones, which nobody else may take over."""
        row = data.draw(st.sampled_from(self.rows))
        for position in range(row.computed, row.computed + tokens):
            if position == len(row.blocks) * SIZE and self._block(row) is None:
                return
            before = tuple(row.prompt[: position + 1]) if position < len(row.prompt) else (-id(row), position)
            for page in row.blocks[position // SIZE].pages[: row.layers]:
                own = self.content.setdefault(page, [])
                assert len(own) >= position % SIZE
                own[position % SIZE :] = [before]
            row.computed = position + 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), layers=st.integers(1, LAYERS))
    def stop_running_layers(self, data: st.DataObject, layers: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        if row.computed >= len(row.prompt) and layers < row.layers:
            self.pool.need(row.blocks, row.layers, layers)
            row.layers = layers

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), unclean=st.booleans())
    def end(self, data: st.DataObject, unclean: bool) -> None:
        row = data.draw(st.sampled_from(self.rows))
        written = [block for block in row.blocks if block.owner is row or block.tokens is None]
        own = {page for block in written if block.holders == 1 for page in block.pages}
        self.leave(row, unclean)
        if unclean:
            free = set(self.pool.unclean)
            assert free <= own
            assert {page for block in row.blocks[-1:] for page in block.pages} & own <= free
        self.pool.unclean.clear()

    def leave(self, row: _Row, unclean: bool = False) -> None:
        self.rows.remove(row)
        self.pool.give_back(row, row.blocks, unclean, row.layers)

    def _block(self, row: _Row) -> Block | None:
        pages = min(LAYERS, row.layers)
        block = self.pool.take(pages, len(row.blocks) * SIZE, row.layers)
        if block is None:
            assert self.pool.available < pages
            return None
        for page in block.pages:
            self.content[page] = []
        tokens = np.asarray(row.prompt[block.start : block.start + SIZE])
        if len(tokens):
            self.pool.offer(block, row.blocks[-1] if row.blocks else None, tokens, row)
        row.blocks.append(block)
        return block

    def _check(self, row: _Row) -> None:
        """A row's computed tokens lie in its pages, whoever computed them."""
        for position in range(min(row.computed, len(row.prompt))):
            for page in row.blocks[position // SIZE].pages[: row.layers]:
                assert self.content[page][position % SIZE] == tuple(row.prompt[: position + 1])

    @invariant()
    def every_row_has_its_tokens(self) -> None:
        for row in self.rows:
            self._check(row)

    @invariant()
    def pages_are_counted(self) -> None:
        blocks = {block for row in self.rows for block in row.blocks}
        most = {block: max(row.layers for row in self.rows if block in row.blocks) for block in blocks}
        held = [page for block in blocks for page in block.pages[: most[block]]]
        assert len(set(held)) == len(held) == self.pool.held
        assert all(1 <= page <= PAGES for page in held)
        assert all(block.holders == sum(block in row.blocks for row in self.rows) for block in blocks)


Pool.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestPool = Pool.TestCase


def test_what_was_unused_for_longest_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, SIZE)
    first, second = _Row([1] * 70), _Row([2] * 60)
    last_pages: list[int] = []
    for row in (first, second):
        while len(row.blocks) * SIZE < len(row.prompt) and len(row.blocks) < 2:
            block = pool.take(1, len(row.blocks) * SIZE)
            assert block is not None
            tokens = np.asarray(row.prompt[block.start : block.start + SIZE])
            pool.offer(block, row.blocks[-1] if row.blocks else None, tokens, row)
            row.blocks.append(block)
        row.computed = 2 * SIZE
        last_pages = last_pages or list(row.blocks[1].pages)
        pool.give_back(row, row.blocks)
    assert (pool.held, pool.available) == (0, 4)
    taken = pool.take(1, 0)
    assert taken is not None
    assert taken.pages == last_pages
    assert pool.match(np.asarray([1] * 70)).tokens == SIZE
    assert pool.match(np.asarray([2] * 61)).tokens == 60
