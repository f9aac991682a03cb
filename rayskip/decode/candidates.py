"""Candidates of a prompt as a token tree: one forward beside the prompt's end gives the log-probability of each.

Candidates that begin alike share nodes. A candidate's last token need not run: what is asked is how likely it is
after those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from rayskip.decode.draft import NEWEST, Draft

CANDIDATE = "candidate"
"""What proposes a candidate's tokens."""

KEPT = 16
"""Trees that are kept: all rows of a job have the same candidates."""

Candidates = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """draft: the tokens that run, all of each candidate but its last; rows share it, and nobody changes it.

    steps: of each candidate its tokens, each with the node that it follows. asked: by node, or NEWEST, the tokens
    whose log-probabilities are asked for there.
    """

    draft: Draft
    steps: list[list[tuple[int, int]]]
    asked: dict[int, list[int]]

    def scores(self, logprobs: Mapping[int, Mapping[int, float]]) -> list[float]:
        """Each candidate's log-probability. logprobs: by node the tokens that were `asked`."""
        return [sum(logprobs[node][token] for node, token in steps) for steps in self.steps]


@lru_cache(KEPT)
def tree(candidates: Candidates) -> Tree:
    draft = Draft()
    for tokens in candidates:
        draft.add_chain(tokens[:-1], CANDIDATE)
    steps = [_steps(tokens, draft) for tokens in candidates]
    asked: dict[int, dict[int, None]] = {}
    for node, token in (step for own in steps for step in own):
        asked.setdefault(node, {})[token] = None
    return Tree(draft, steps, {node: list(tokens) for node, tokens in asked.items()})


def _steps(tokens: tuple[int, ...], draft: Draft) -> list[tuple[int, int]]:
    node, steps = NEWEST, []
    for token in tokens:
        steps.append((node, token))
        child = draft.child(node, token)
        node = NEWEST if child is None else child  # of the last token, which has none
    return steps
