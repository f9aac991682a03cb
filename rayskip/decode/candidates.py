"""Candidates of a prompt as a token tree: one forward beside the prompt's end gives the log-probability of each.

Candidates that begin alike share nodes. A candidate's last token need not run: what is asked is how likely it is
after those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from rayskip.decode.draft import NEWEST, Draft

CANDIDATE = "candidate"
"""What proposes a candidate's tokens."""

Candidates = Seq[Seq[int]]


def tree(candidates: Candidates) -> Draft:
    """The tokens that run: all of each candidate but its last."""
    draft = Draft()
    for tokens in candidates:
        draft.add_chain(tokens[:-1], CANDIDATE)
    return draft


def tree_size(candidates: Candidates) -> int:
    """How many tokens run."""
    return len({tuple(tokens[:stop]) for tokens in candidates for stop in range(1, len(tokens))})


def asked(candidates: Candidates, draft: Draft) -> dict[int, list[int]]:
    """By node of their tree, or NEWEST: the tokens whose log-probabilities are asked for there."""
    found: dict[int, dict[int, None]] = {}
    for tokens in candidates:
        for node, token in _steps(tokens, draft):
            found.setdefault(node, {})[token] = None
    return {node: list(tokens) for node, tokens in found.items()}


def scores(candidates: Candidates, draft: Draft, logprobs: Mapping[int, Mapping[int, float]]) -> list[float]:
    """Each candidate's log-probability. logprobs: by node the tokens that were `asked`."""
    return [sum(logprobs[node][token] for node, token in _steps(tokens, draft)) for tokens in candidates]


def _steps(tokens: Seq[int], draft: Draft) -> list[tuple[int, int]]:
    """Each token with the node that it follows."""
    node, steps = NEWEST, []
    for token in tokens:
        steps.append((node, token))
        child = draft.child(node, token)
        node = NEWEST if child is None else child  # of the last token, which has none
    return steps
