"""One sample on its way: what is known, what is in the cache, what was generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from rayskip.config import SamplingParams
from rayskip.data.records import Prompt, TokenLogprob
from rayskip.decode.candidates import Tree, tree
from rayskip.decode.constraints import Matcher
from rayskip.decode.draft import Draft
from rayskip.model.cache.blocks import ALL, Block

PENDING = -1
"""In place of a generated token that a step in flight is choosing."""


@dataclass(eq=False)
class Sequence:
    """Sample `sample` of a prompt.

    computed: tokens whose keys and values are in the cache, in row `table_row` of its table, or will be after the
    steps in flight. blocks: the cache's blocks that it holds, in order; places: positions that they have;
    layers: so many, of those that run longest, may still run for it.
    pending: so many of the newest generated tokens are PENDING. ended: it got its last token, or was given up.
    limit: tokens it may come to have, prompt and completion together. full_depth: every layer runs, whatever its
    position. matcher: its place in the grammar of its constraint, if it has one. ends: tokens that end it. draft:
    tokens proposed to follow, during a step; they lie in the cache behind the known ones, node by node.
    draft_cached: tokens whose keys and values a drafter's own cache layers hold, with those before them.
    """

    request_id: int
    prompt: Prompt
    sample: int
    limit: int
    full_depth: bool = False
    matcher: Matcher | None = None
    ends: tuple[int, ...] = ()
    table_row: int = -1
    blocks: list[Block] = field(default_factory=list)
    places: int = 0
    layers: int = ALL
    computed: int = 0
    pending: int = 0
    ended: bool = False
    generated: list[int] = field(default_factory=list)
    draft: Draft = field(default_factory=Draft)
    draft_cached: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def anew(self) -> Sequence:
        """The same sample before its first step."""
        matcher = self.matcher and self.matcher.anew()
        return Sequence(
            self.request_id, self.prompt, self.sample, self.limit, self.full_depth, matcher, self.ends
        )

    @cached_property
    def tree(self) -> Tree | None:
        """Of the prompt's candidates, if it has some."""
        return tree(self.prompt.candidates) if self.prompt.candidates else None

    @property
    def params(self) -> SamplingParams:
        return self.prompt.params

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt.token_ids) + len(self.generated)

    @property
    def missed(self) -> int:
        """Tokens before the newest one that a drafter's own cache layers lack."""
        return self.length - 1 - self.draft_cached

    def expect(self, count: int = 1) -> None:
        """Have so many tokens more, that steps in flight choose."""
        self.generated += [PENDING] * count
        self.pending += count

    def forget_pending(self) -> int:
        """Have known tokens only; how many were pending."""
        count, self.pending = self.pending, 0
        del self.generated[len(self.generated) - count :]
        return count

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still missing from the cache."""
        return self.computed < len(self.prompt.token_ids)

    def skip_position(self, position: int) -> int:
        """The generated position that decides which layers token `position` runs; -1: all of them."""
        return -1 if self.full_depth else max(position - len(self.prompt.token_ids), -1)

    @property
    def draft_room(self) -> int:
        """Most tokens worth proposing one after the other: verification adds one of its own."""
        return max(0, self.limit - self.length - 1)

    @property
    def draft_places(self) -> int:
        """Tokens that a draft may still get: places left in the cache."""
        return max(0, self.places - self.length - len(self.draft))

    def position(self, place: int) -> int:
        """Position in the text of the token at a place in the cache; they differ in the branches of a draft."""
        node = place - self.length
        return place if node < 0 else self.length - 1 + self.draft.depths[node]

    def path(self, place: int) -> list[int]:
        """Places of the drafted tokens before the one at `place`, and its own."""
        return [self.length + node for node in self.draft.path(place - self.length)]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens at places [start, stop), known ones and then the draft."""
        prompt, known = len(self.prompt.token_ids), self.length
        return (
            self.prompt.token_ids[start:stop]
            + self.generated[max(start - prompt, 0) : max(stop - prompt, 0)]
            + self.draft.tokens[max(start - known, 0) : max(stop - known, 0)]
        )
