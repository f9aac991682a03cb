"""What the model itself says at every drafted position: a draft's longest agreeing path, and one token more.

A token is a function of logits, parameters and the row's own uniform at that position, also when sampling. So a
draft is right where it equals that token, and the completion is, token by token, the one without a drafter; no
rejection sampling is needed, and no random number is drawn twice. Knows no drafter.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from rayskip.config import SamplingParams
from rayskip.decode.candidates import Tree
from rayskip.decode.draft import NEWEST
from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw
from rayskip.decode.sequence import Sequence

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Verdict:
    """What verification said of one row.

    choices: the tokens that follow: those of its draft that hold, and one of the model's own. path: the draft's
    nodes that hold, in order. guesses: the model's token after the newest one and after each node, those that do
    not hold too (None: logits not finite). place: where among the verified places the last of `choices` was chosen.
    """

    choices: list[Choice]
    path: list[int]
    guesses: list[int | None]
    place: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that hold."""
        return len(self.path)


def verify(choices: Seq[Choice], places: Seq[tuple[Sequence, int]]) -> dict[Sequence, Verdict]:
    """The verdict on every row among `places`.

    choices: of `places`, (row, node of its draft, or NEWEST), in any order; NEWEST and all nodes of each row. Rows
    with candidates choose nothing.
    """
    at = {place: index for index, place in enumerate(places) if not place[0].prompt.candidates}
    verdicts = {}
    for row in dict.fromkeys(row for row, _ in at):
        own = {node: choices[at[row, node]] for node in range(NEWEST, len(row.draft))}
        node, path, chosen = NEWEST, [], [own[NEWEST]]
        while (token := chosen[-1].token_id) is not None and (
            child := row.draft.child(node, token)
        ) is not None:
            node = child
            path.append(node)
            chosen.append(own[node])
        verdicts[row] = Verdict(chosen, path, [choice.token_id for choice in own.values()], at[row, node])
    return verdicts


def scored(choices: Seq[Choice], places: Seq[tuple[Sequence, int]]) -> dict[Sequence, Choice]:
    """Of every row with candidates among `places` what they score. choices: as in `verify`."""
    own: dict[Sequence, dict[int, Choice]] = {}
    for choice, (row, node) in zip(choices, places, strict=True):
        if row.tree is not None:
            own.setdefault(row, {})[node] = choice
    return {row: _score(row.tree, by_node) for row, by_node in own.items() if row.tree is not None}


def _score(tree: Tree, choices: Mapping[int, Choice]) -> Choice:
    if any(choice.token_id is None for choice in choices.values()):
        return Choice(None)
    logprobs = {node: choice.asked for node, choice in choices.items()}
    return replace(choices[NEWEST], scores=tree.scores(logprobs))


def draw(row: Sequence, node: int) -> Draw:
    """What the model's token after a node of the row's draft (or NEWEST) depends on, besides its logits; of a row
    with candidates, what is asked for there."""
    if row.tree is not None:
        return Draw(GREEDY, 0.0, (), asked=row.tree.asked[node])
    params, path = row.params, row.draft.path(node)
    seen: ArrayLike = ()
    if params.repetition_penalty != 1:
        later = [*row.generated, *(row.draft.tokens[at] for at in path)]
        seen = np.concatenate([row.prompt.token_array, np.array(later, np.int64)])
    said = [*row.generated, *(row.draft.tokens[at] for at in path)] if params.counts_tokens else ()
    position = len(row.generated) + len(path)
    forbidden = row.ends if position < params.min_tokens else ()
    chance = uniform(row.prompt.key, row.sample, position) if params.temperature else 0.0
    mask = None if row.matcher is None else row.matcher.masks.get(node)
    return Draw(params, chance, seen, said, forbidden, mask)
