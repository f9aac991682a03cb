"""Packed tokens of one forward: which row of the block table each belongs to, and which attend alike.

Knows neither sequences nor what computes them.

Shapes: N tokens, B rows of the block table, T key positions read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True)
class Span:
    """Packed tokens side by side that attend alike, from token `start` on: `width` tokens of each of some rows of
    the block table, row by row.

    table_rows [B]: the rows; the first `keys` positions of each are read.
    """

    start: int
    width: int
    table_rows: Tensor
    keys: int

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.table_rows)

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.width


@dataclass(frozen=True)
class Paths:
    """Where keys lie of tokens in the branches of a draft, whose place in the cache is not their position (tree
    attention).

    places [N]: of each token's own keys. starts [N]: positions before it are their own places; from there on,
    `after` [N, P] tells them, up to the token's own. A token that is in no branch starts past its position.
    """

    places: Tensor
    starts: Tensor
    after: Tensor

    def keys(self, positions: Tensor, start: int, stop: int, count: int) -> Tensor:
        """Places of positions 0 to count of tokens [start, stop): [stop - start, count]."""
        own, after = self.starts[start:stop, None], self.after[start:stop]
        every = torch.arange(count, device=after.device).expand(stop - start, count)
        on_path = (every >= own) & (every <= positions[start:stop, None])
        return torch.where(on_path, after.gather(1, (every - own).clamp(0, after.shape[1] - 1)), every)


@dataclass
class TokenBatch:
    """Packed tokens of one step, deepest first: ids, positions and rows of the block table [N], the spans that
    cover them in order, and the tokens whose logits are wanted (indices [R]).

    active: how many tokens each layer runs, always the first ones; None: all, in every layer. paths: where keys
    lie; None: each at its position.
    """

    token_ids: Tensor
    positions: Tensor
    table_rows: Tensor
    spans: list[Span]
    outputs: Tensor
    active: list[int] | None = None
    paths: Paths | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def places(self) -> Tensor:
        """Where in its row of the block table each token's keys and values lie, [N]."""
        return self.positions if self.paths is None else self.paths.places

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made for `key` once a step, by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made
