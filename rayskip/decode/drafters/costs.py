"""What a step costs on this machine: measured at start-up, and corrected by every step since."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from rayskip.model.cache.kv_cache import KVCache, key_blocks
from rayskip.model.clock import Timings, greedy_seconds
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import Span, TokenBatch

LENGTH = 128
"""Positions in the cache while it is, or as many as the model has."""
LEARNED, OUTLIER = 0.05, 3.0
"""Share of a later forward's time that is believed, and how many times more or less than expected it may be."""
FAR = 0.9
"""Share of that for forwards of other sizes: most of what it tells is of the machine, some of its size."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a greedy forward over so many tokens: `seconds[i]` for `tokens[i]`, both ascending; linear in
    between. Rows that need all their logits cost more."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def learn(self, tokens: int, seconds: float) -> StepCosts:
        """The same, a little closer to a forward that took so long, and most so near its size: a machine is not
        always as at start-up, and what surrounds forwards has its price too."""
        off = min(max(seconds / self(tokens), 1 / OUTLIER), OUTLIER) - 1
        at, share = self._place(tokens)
        nearness = {at - 1: 1 - share, at: min(share, 1.0)}
        return StepCosts(
            self.tokens,
            tuple(
                own * (1 + LEARNED * off * max(nearness.get(point, 0.0), FAR))
                for point, own in enumerate(self.seconds)
            ),
        )

    @property
    def each(self) -> float:
        """Seconds that one token more costs in a large forward."""
        return (self.seconds[-1] - self.seconds[-2]) / (self.tokens[-1] - self.tokens[-2])

    def least_each(self, tokens: float) -> float:
        """Seconds that one token more costs at least, in a forward of more than `tokens`."""
        first = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        points = list(zip(self.tokens, self.seconds, strict=True))[first - 1 :]
        return min((after[1] - at[1]) / (after[0] - at[0]) for at, after in pairwise(points))

    def __call__(self, tokens: float) -> float:
        at, share = self._place(tokens)
        return self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1])

    def _place(self, tokens: float) -> tuple[int, float]:
        """The point from which on so many tokens are, or the last, and their share of the way to it from the one
        before: more than 1 beyond the last."""
        at = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        left, right = self.tokens[at - 1], self.tokens[at]
        return at, (tokens - left) / (right - left)


def measure_costs(decoder: Decoder, threads: int, rows: int, most: int) -> StepCosts:
    """Time forwards of 1, 2, 4, ... up to about `most` tokens of `rows` rows, on `threads` threads."""
    with decoder.backend.threads(threads):
        cache = decoder.new_cache()
        length = min(LENGTH, decoder.spec.max_positions)
        cache.fill(rows, length)
        limit = decoder.backend.traits.timed_tokens
        tokens = [2**power for power in range(13) if power < 2 or (2**power < 2 * most and 2**power <= limit)]
        timings = Timings(decoder, threads, f"forward of {rows} rows at {length} positions")
        seconds = [
            timings.seconds(count, partial(_seconds, decoder, cache, count, length)) for count in tokens
        ]
        timings.keep()
    # noise must not make more tokens look cheaper than fewer
    ascending = [max(seconds[: at + 1]) for at in range(len(seconds))]
    return StepCosts(tuple(tokens), tuple(ascending))


def _seconds(decoder: Decoder, cache: KVCache, count: int, length: int) -> float:
    """Of a forward of `count` tokens, a row's side by side as in verification, of different ids: experts are chosen
    by them."""
    index = torch.arange(count, device=decoder.backend.device)
    table_rows = (index % cache.table.shape[1]).sort().values
    positions = torch.full_like(index, length - 1)
    batch = TokenBatch(
        index % decoder.spec.vocab, positions, table_rows, [Span(0, 1, table_rows, key_blocks(length))], index
    )
    return greedy_seconds(decoder, batch, cache)
