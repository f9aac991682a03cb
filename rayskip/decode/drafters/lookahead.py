"""Lookahead (arXiv 2402.02057): Jacobi iteration along a chain, and a pool of the n-grams that it passes through.

The model's tokens after a wrong draft are its guess for a text that nearly is this one. They become the next draft
(a Jacobi step), and every guess enters the row's pool as what follows the two tokens before it. The paper runs a
window of several such chains beside the one that is verified; here there is one, and it is verified itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from rayskip.config import LookaheadDraft
from rayskip.decode.batch import Chunk
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.model.cache.kv_cache import KVCache


@dataclass
class Pool:
    """Of one row. follows: one or two tokens -> the model's latest token after them. window: the Jacobi guesses for
    the tokens that come."""

    follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    window: list[int] = field(default_factory=list)

    def propose(self, before: int, newest: int, count: int) -> list[int]:
        """Up to `count` tokens: from the pool as long as it knows how to go on, else from the window."""
        chain = [before, newest]
        for at in range(count):
            token = self.follows.get((chain[-2], chain[-1]), self.follows.get((chain[-1],)))
            if token is None and at < len(self.window):
                token = self.window[at]
            if token is None:
                break
            chain.append(token)
        return chain[2:]

    def learn(self, before: int, newest: int, draft: Seq[int], verdict: Verdict) -> None:
        """Keep what the model said after each start of the draft."""
        ran = [before, newest, *draft]
        guesses = [guess for guess in verdict.guesses if guess is not None]
        for at, guess in enumerate(guesses, 2):
            self.follows[ran[at - 2], ran[at - 1]] = guess
            self.follows[(ran[at - 1],)] = guess
        self.window = guesses[verdict.accepted + 1 :]


class LookaheadDrafter(Drafter):
    def __init__(self, config: LookaheadDraft) -> None:
        self._config = config
        self.most_tokens = config.tokens
        self._pools: WeakKeyDictionary[Sequence, Pool] = WeakKeyDictionary()

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            pool = self._pools.setdefault(row, Pool())
            tokens = pool.propose(*_ends(row), min(self._config.tokens, row.draft_room))
            row.draft.add_chain(tokens, "lookahead")

    def observe(self, verdicts: Mapping[Sequence, Verdict], hidden: Tensor) -> None:
        for row, verdict in verdicts.items():
            if row in self._pools:
                self._pools[row].learn(*_ends(row), row.draft.tokens, verdict)


def _ends(row: Sequence) -> tuple[int, int]:
    """The newest token and the one before it; in a text of one token both are that."""
    tokens = row.tokens(max(row.length - 2, 0), row.length)
    return tokens[0], tokens[-1]
