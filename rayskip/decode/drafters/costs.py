"""What a step costs on this machine, measured, and what is worth verifying at that price."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from rayskip.model.cache.kv_cache import KVCache, key_blocks
from rayskip.model.clock import greedy_seconds
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import Span, TokenBatch

LENGTH = 128
"""Positions in the cache while it is, or as many as the model has."""
LEARNED, OUTLIER = 0.05, 3.0
"""Share of a later forward's time that is believed, and how many times more or less than expected it may be."""
MARGIN = 8
"""Tokens over which the price of one more is taken: a single one costs less than the clock can tell."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a greedy forward over so many tokens: `seconds[i]` for `tokens[i]`, both ascending; linear in
    between. Rows that need all their logits cost more."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def learn(self, tokens: int, seconds: float) -> StepCosts:
        """The same, a little closer to a forward that took so long: a machine is not always as at start-up."""
        off = min(max(seconds / self(tokens), 1 / OUTLIER), OUTLIER) - 1
        return StepCosts(self.tokens, tuple(own * (1 + LEARNED * off) for own in self.seconds))

    @property
    def each(self) -> float:
        """Seconds that one token more costs in a large forward."""
        return (self.seconds[-1] - self.seconds[-2]) / (self.tokens[-1] - self.tokens[-2])

    def __call__(self, tokens: int) -> float:
        at = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        left, right = self.tokens[at - 1], self.tokens[at]
        share = (tokens - left) / (right - left)
        return self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1])


def measure_costs(decoder: Decoder, threads: int, rows: int, most: int) -> StepCosts:
    """Time forwards of 1, 2, 4, ... up to about `most` tokens of `rows` rows, on `threads` threads."""
    with decoder.backend.threads(threads):
        cache = decoder.new_cache()
        length = min(LENGTH, decoder.spec.max_positions)
        cache.fill(rows, length)
        limit = decoder.backend.traits.timed_tokens
        tokens = [2**power for power in range(13) if power < 2 or (2**power < 2 * most and 2**power <= limit)]
        seconds = [_seconds(decoder, cache, count, length) for count in tokens]
    # noise must not make more tokens look cheaper than fewer
    ascending = [max(seconds[: at + 1]) for at in range(len(seconds))]
    return StepCosts(tuple(tokens), tuple(ascending))


def _seconds(decoder: Decoder, cache: KVCache, count: int, length: int) -> float:
    """Of a forward of `count` tokens, a row's side by side as in verification."""
    index = torch.arange(count, device=decoder.backend.device)
    table_rows = (index % cache.table.shape[1]).sort().values
    positions = torch.full_like(index, length - 1)
    batch = TokenBatch(
        torch.zeros_like(index), positions, table_rows, [Span(0, 1, table_rows, key_blocks(length))], index
    )
    return greedy_seconds(decoder, batch, cache)


def worth_verifying(chances: Seq[Seq[float]], rows: int, costs: StepCosts, base: int) -> list[int]:
    """How much of each draft to verify, so that expected tokens per second are most.

    chances[i][j]: probability that draft i's tokens up to j all hold, so descending in j; a row's drafts begin with
    different tokens. rows: that gain a token anyway. base: tokens that run anyway. Tokens are added by falling
    chance, over all drafts (TETRIS, arXiv 2502.15197).
    """
    order = sorted(
        ((chance, draft, at) for draft, own in enumerate(chances) for at, chance in enumerate(own)),
        key=lambda item: (-item[0], item[2], item[1]),
    )
    gained = float(rows)
    best, best_count = gained / costs(base), 0
    for count, (chance, _, _) in enumerate(order, 1):
        gained += chance
        if (rate := gained / costs(base + count)) > best:
            best, best_count = rate, count
    lengths = [0] * len(chances)
    for _, draft, at in order[:best_count]:
        lengths[draft] = max(lengths[draft], at + 1)
    return lengths


def marginal_chance(gained: float, base: int, costs: StepCosts) -> float:
    """Chance of holding that pays for one token more in a forward of `base` tokens, which gains `gained`."""
    return gained * (costs(base + MARGIN) - costs(base)) / MARGIN / costs(base)
