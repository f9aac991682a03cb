"""Sampling against its definition: a statistic, and hand-made logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from rayskip.config import SamplingParams
from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, sample
from rayskip.model.backends.base import HeadOutput

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -3.0])


def _output(logits: torch.Tensor) -> HeadOutput:
    best = logits.max(dim=-1)
    return HeadOutput(best.values, best.indices, logits, range(len(logits)))


def _choose(logits: torch.Tensor, draws: list[Draw]) -> list[Choice]:
    return sample(_output(logits), draws).choices()


def _draws(params: SamplingParams, rows: int, said: Sequence[int] = ()) -> list[Draw]:
    return [Draw(params, uniform(row, 0, 0), (), said) for row in range(rows)]


def _counts(params: SamplingParams, rows: int = 6000, said: Sequence[int] = ()) -> Counter[int | None]:
    return Counter(choice.token_id for choice in _choose(LOGITS.expand(rows, -1), _draws(params, rows, said)))


def _follows(counts: Counter[int | None], weights: dict[int, float]) -> bool:
    """Whether the counts could come from these weights (chi-square, 0.1%)."""
    total, rows = sum(weights.values()), sum(counts.values())
    if set(counts) - set(weights):
        return False
    observed = [counts[token] for token in weights]
    return bool(chisquare(observed, [rows * weight / total for weight in weights.values()]).pvalue > 1e-3)


def _probs(temperature: float = 1.0) -> dict[int, float]:
    return {token: math.exp(logit / temperature) for token, logit in enumerate(LOGITS.tolist())}


def test_plain_sampling_follows_the_softmax() -> None:
    assert _follows(_counts(SamplingParams(temperature=1)), _probs())
    assert _follows(_counts(SamplingParams(temperature=0.5)), _probs(0.5))
    assert not _follows(_counts(SamplingParams(temperature=0.5)), _probs())


def test_truncation_keeps_what_it_should() -> None:
    probs = _probs()
    assert _follows(_counts(SamplingParams(temperature=1, top_k=2)), {t: probs[t] for t in (0, 4)})
    assert _follows(_counts(SamplingParams(temperature=1, top_p=0.7)), {t: probs[t] for t in (0, 4)})
    assert _follows(_counts(SamplingParams(temperature=1, min_p=0.3)), {t: probs[t] for t in (0, 1, 4)})
    # top-p reads what top-k left: 0.62 of {0, 4}, so the first alone passes 0.6
    assert set(_counts(SamplingParams(temperature=1, top_k=2, top_p=0.6))) == {0}


def test_greedy_penalty_and_broken_logits() -> None:
    assert set(_counts(SamplingParams(), rows=3)) == {0}
    penalised = Draw(SamplingParams(repetition_penalty=1.5), 0.0, (0, 3))
    assert _choose(LOGITS[None], [penalised])[0].token_id == 4
    broken = LOGITS.clone()
    broken[2] = math.nan
    assert _choose(broken[None], _draws(SamplingParams(), 1))[0].token_id is None


def test_what_was_said_is_penalised_as_often_and_biases_are_added() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 7.0, 4: -1.5})
    scores = LOGITS.clone()
    for token, times in ((0, 3), (2, 1)):
        scores[token] -= 0.5 + 0.25 * times
    scores[3] += 7.0
    scores[4] -= 1.5
    said = (0, 2, 0, 0)
    draw = Draw(params, 0.0, (), said)
    assert _choose(LOGITS[None], [draw])[0].token_id == int(scores.argmax()) == 3
    found = _counts(params.model_copy(update={"temperature": 1.0}), said=said)
    probs = scores.softmax(-1)
    assert _follows(found, {token: float(probs[token]) for token in range(6)})
    barred = Draw(params, 0.0, (), said, forbidden=(3, 99))
    scores[3] = -torch.inf
    assert _choose(LOGITS[None], [barred])[0].token_id == int(scores.argmax())


@pytest.mark.parametrize("vocab", [5, 256, 700, 1024])
def test_greedy_takes_the_highest_logit_and_the_first_of_equals(vocab: int) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).to(torch.bfloat16)
    chosen = [choice.token_id for choice in _choose(logits, _draws(SamplingParams(), 40))]
    assert chosen == [row.index(max(row)) for row in logits.tolist()]


def test_a_row_is_chosen_alone() -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=1, min_p=0.05, repetition_penalty=1.2, logprobs=2),
        SamplingParams(repetition_penalty=1.2),
    ]
    draws = [Draw(kinds[row % 5], uniform(row, 1, 5), (1, 2)) for row in range(40)]
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = _choose(logits, draws)
    assert together == [_choose(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
    # and of the others the highest logit is enough
    full = [row for row, draw in enumerate(draws) if draw.needs_logits]
    assert len(full) == 32
    assert sample(replace(_output(logits), logits=logits[full], full=full), draws).choices() == together


def test_uniforms_are_uniform_and_independent_of_order() -> None:
    values = [
        uniform(key, sample, position) for key in range(20) for sample in range(5) for position in range(40)
    ]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert chisquare(list(Counter(int(value * 16) for value in values).values())).pvalue > 1e-3


def test_extreme_parameters_of_one_row_break_no_other() -> None:
    """A tiny temperature is greedy; a row whose logits are not finite says so; the third does not notice."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = torch.nan
    tiny = SamplingParams(temperature=1e-40, top_p=0.9, repetition_penalty=1e-40)
    plain = SamplingParams(temperature=0.7, top_p=0.9)
    draws = [Draw(tiny, 0.3, [1, 2]), Draw(tiny, 0.3, [1, 2]), Draw(plain, 0.3, ())]
    found = _choose(logits, draws)
    assert found[0].token_id is not None
    assert found[1].token_id is None
    assert found[2] == _choose(logits[2:], draws[2:])[0]


def test_a_nucleus_does_not_depend_on_a_mates_top_k() -> None:
    logits = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    nucleus, mate = SamplingParams(temperature=1, top_p=0.6), SamplingParams(temperature=1, top_k=1024)
    for row in range(39):
        draw = Draw(nucleus, row / 39, ())
        alone = _choose(logits[row : row + 1], [draw])
        beside = _choose(logits[[row, 39]], [draw, Draw(mate, 0.5, ())])
        assert beside[0] == alone[0]
