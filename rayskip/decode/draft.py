"""What is proposed to follow a row's newest token: a token tree, most often a chain."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

NEWEST = -1
"""In place of a node: the row's newest token, which every draft follows."""


@dataclass
class Draft:
    """Token i follows token parents[i] (NEWEST: the row's newest token); parents stand before their children.

    depths: tokens on the way from the newest one, itself included. drafters: which kind proposed each first.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    drafters: list[str] = field(default_factory=list)
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it: the last is then as deep as they are many."""
        return not self.depths or self.depths[-1] == len(self.depths)

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` after `parent`, if it is proposed."""
        return self._nodes.get((parent, token))

    def add(self, parent: int, token: int, drafter: str) -> int:
        """Propose `token` after `parent`; its node, the old one if it is proposed already."""
        node = self._nodes.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(1 + (0 if parent == NEWEST else self.depths[parent]))
            self.drafters.append(drafter)
        return node

    def add_chain(self, tokens: Seq[int], drafter: str) -> None:
        """Propose `tokens`, one after the other, after the newest token."""
        node = NEWEST
        for token in tokens:
            node = self.add(node, token, drafter)

    def path(self, node: int) -> list[int]:
        """The nodes from the newest token's child down to `node`."""
        found = []
        while node != NEWEST:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def cut(self, count: int) -> None:
        """Keep the first `count` tokens."""
        kept = zip(self.tokens[:count], self.parents[:count], self.drafters[:count], strict=True)
        shorter = Draft()
        for token, parent, drafter in kept:
            shorter.add(parent, token, drafter)
        self.__dict__.update(shorter.__dict__)
