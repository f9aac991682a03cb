"""What the model itself says at every drafted position: the longest agreeing start of a draft, and one token more.

A token is a function of logits, parameters and the row's own uniform at that position, also when sampling. So a
draft is right where it equals that token, and the completion is, token by token, the one without a drafter; no
rejection sampling is needed, and no random number is drawn twice. Knows no drafter.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, choose
from rayskip.decode.sequence import Sequence


def verify(logits: Tensor, places: Seq[tuple[Sequence, int]]) -> dict[Sequence, list[Choice]]:
    """The tokens that follow each row: those of its draft that hold, and then the model's own, at least one.

    logits [R, V]: of `places`, (row, number of its draft's tokens that are taken as given), in any order. Every row
    has all numbers from 0 to the length of its draft.
    """
    choices = choose(logits, [_draw(row, offset) for row, offset in places]) if places else []
    chosen = {(row, offset): choice for (row, offset), choice in zip(places, choices, strict=True)}
    verdicts = {}
    for row in dict.fromkeys(row for row, _ in places):
        tokens = [chosen[row, 0]]
        for offset, drafted in enumerate(row.draft, 1):
            if tokens[-1].token_id != drafted:
                break
            tokens.append(chosen[row, offset])
        verdicts[row] = tokens
    return verdicts


def _draw(row: Sequence, offset: int) -> Draw:
    params, position = row.params, len(row.generated) + offset
    seen = row.tokens(0, row.length + offset) if params.repetition_penalty != 1 else ()
    chance = uniform(row.prompt.key, row.sample, position) if params.temperature else 0.0
    return Draw(params, chance, seen)
