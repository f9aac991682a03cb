"""What the model itself says at every drafted position: the longest agreeing start of a draft, and one token more.

A token is a function of logits, parameters and the row's own uniform at that position, also when sampling. So a
draft is right where it equals that token, and the completion is, token by token, the one without a drafter; no
rejection sampling is needed, and no random number is drawn twice. Knows no drafter.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, choose
from rayskip.decode.sequence import Sequence


@dataclass(frozen=True)
class Verdict:
    """What verification said of one row.

    choices: the tokens that follow: those of its draft that hold, and one of the model's own. guesses: the model's
    token after each start of the draft, the wrong ones too (None: logits not finite). place: where among the
    verified places the last of `choices` was chosen.
    """

    choices: list[Choice]
    guesses: list[int | None]
    place: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that hold."""
        return len(self.choices) - 1


def verify(logits: Tensor, places: Seq[tuple[Sequence, int]]) -> dict[Sequence, Verdict]:
    """The verdict on every row among `places`.

    logits [R, V]: of `places`, (row, number of its draft's tokens that are taken as given), in any order. Every row
    has all numbers from 0 to the length of its draft.
    """
    choices = choose(logits, [_draw(row, offset) for row, offset in places]) if places else []
    at = {place: index for index, place in enumerate(places)}
    verdicts = {}
    for row in dict.fromkeys(row for row, _ in places):
        own = [choices[at[row, offset]] for offset in range(len(row.draft) + 1)]
        guesses = [choice.token_id for choice in own]
        held = next((n for n, token in enumerate(row.draft) if guesses[n] != token), len(row.draft))
        verdicts[row] = Verdict(own[: held + 1], guesses, at[row, held])
    return verdicts


def _draw(row: Sequence, offset: int) -> Draw:
    params, position = row.params, len(row.generated) + offset
    seen = row.tokens(0, row.length + offset) if params.repetition_penalty != 1 else ()
    chance = uniform(row.prompt.key, row.sample, position) if params.temperature else 0.0
    return Draw(params, chance, seen)
