"""Choosing the next token of each row from its logits. Pure functions; every row is on its own.

Order of operations, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. The choice is the
inverse of the cumulative distribution at the row's own uniform, so a token is a function of (logits,
parameters, uniform) and a drafter can be checked by equality.

Shapes: R rows, V vocabulary, K candidates kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.config import SamplingParams
from rayskip.data.records import TokenLogprob
from rayskip.model.scores import Scores

NUCLEUS = 1024
"""Candidates sorted for top-p before the whole vocabulary is: a nucleus is rarely wider."""


BLOCK = 256
"""Weights that are added up before one of them is looked for."""

LEAST, MOST = 1e-6, 1e30
"""Bounds inside which no score overflows: of temperature and penalty, and of scores."""


@dataclass(frozen=True)
class Draw:
    """What one row's next token depends on, besides its logits.

    uniform: the row's random number for this position, in [0, 1).
    seen: token ids of prompt and completion; read only under a repetition penalty.
    """

    params: SamplingParams
    uniform: float
    seen: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """A row's next token; None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def needs_logits(params: SamplingParams) -> bool:
    """Whether more than the highest logit decides what is chosen or said."""
    return params.temperature != 0 or params.repetition_penalty != 1 or params.logprobs is not None


def choose(said: Scores, draws: Sequence[Draw]) -> list[Choice]:
    """The next token of each of R rows; draws R long, `said` of all rows that `needs_logits` holds for."""
    tokens: list[int] = said.at.tolist()
    finite = [math.isfinite(best) for best in said.best.tolist()]
    for width, rows in _by_width(draws, said.logits.shape[-1]).items():
        scores = _scores(said.of(rows), [draws[row] for row in rows])
        for row, token in zip(rows, _pick(scores, [draws[row] for row in rows], width), strict=True):
            tokens[row] = token
    logprobs = _logprobs(said, draws, tokens)
    return [
        Choice(token, logprobs.get(row)) if ok else Choice(None)
        for row, (token, ok) in enumerate(zip(tokens, finite, strict=True))
    ]


def _by_width(draws: Sequence[Draw], vocab: int) -> dict[int, list[int]]:
    """Rows that are not plain arg-max, by how many candidates must be ordered (0: none).

    The width comes from a row's own parameters alone: two widths may order ties differently.
    """
    rows = defaultdict(list)
    for row, draw in enumerate(draws):
        params = draw.params
        if params.temperature == 0 and params.repetition_penalty == 1:
            continue
        if params.temperature == 0:
            width = 1
        elif params.top_k > 0:
            width = min(params.top_k, vocab)
        else:
            width = min(NUCLEUS, vocab) if params.top_p < 1 else 0
        rows[width].append(row)
    return rows


def _scores(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Penalised, tempered scores in float32, [R, V]."""
    scores = logits.to(torch.float32, copy=True).nan_to_num_()
    for row, draw in enumerate(draws):
        if draw.params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(draw.seen)), device=scores.device)
            score = scores[row, seen]
            penalty = max(draw.params.repetition_penalty, LEAST)
            scores[row, seen] = torch.where(score < 0, score * penalty, score / penalty)
    temperature = torch.tensor(
        [max(draw.params.temperature, LEAST) if draw.params.temperature else 1.0 for draw in draws],
        device=scores.device,
    )
    scores.clamp_(-MOST, MOST)
    return scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperature.unsqueeze(1))


def _pick(scores: Tensor, draws: Sequence[Draw], width: int) -> list[int]:
    """One token per row out of the kept candidates, by its uniform."""
    probs = torch.softmax(scores, dim=-1)
    if width == 0:
        if any(draw.params.min_p for draw in draws):
            probs *= probs >= probs.amax(dim=-1, keepdim=True) * _column(draws, "min_p", probs)
        return _invert(probs, draws)
    kept, ids = probs.topk(width, dim=-1)  # [R, K], descending
    weights = truncate(kept, draws)
    tokens: list[int] = ids.gather(1, torch.tensor(_invert(weights, draws), device=ids.device)[:, None])[
        :, 0
    ].tolist()
    for row in _nucleus_too_wide(kept, draws, probs.shape[-1]):
        order = probs[row : row + 1].sort(dim=-1, descending=True, stable=True)
        index = _invert(truncate(order.values, draws[row : row + 1]), draws[row : row + 1])[0]
        tokens[row] = int(order.indices[0, index])
    return tokens


def truncate(probs: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Weights of candidates [R, K] given in descending probability: 0 for those that top-k, top-p or min-p cut.

    Top-p reads probabilities renormalised after top-k; a candidate stays while those before it hold less than
    top_p. The first always stays.
    """
    kept = probs.double()
    has_top_k = torch.tensor([draw.params.top_k > 0 for draw in draws], device=kept.device).unsqueeze(1)
    kept = torch.where(has_top_k, kept / kept.sum(dim=-1, keepdim=True), kept)
    before = kept.cumsum(dim=-1) - kept
    keep = before < _column(draws, "top_p", kept)
    keep &= kept >= kept[:, :1] * _column(draws, "min_p", kept)
    keep[:, 0] = True
    return kept * keep


def _nucleus_too_wide(kept: Tensor, draws: Sequence[Draw], vocab: int) -> list[int]:
    """Rows whose top-p nucleus reaches past the candidates that were ordered."""
    if kept.shape[1] == vocab:
        return []
    mass = kept.double().sum(dim=-1).tolist()
    return [
        row
        for row, draw in enumerate(draws)
        if draw.params.top_k <= 0 and draw.params.temperature and mass[row] < draw.params.top_p
    ]


def _invert(weights: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Index per row where the cumulative weight [R, K] passes uniform x total, of those with weight.

    Summed in float64 block by block: only the block with the passage is walked token by token.
    """
    if padding := -weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, padding))
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    upto = sums.cumsum(dim=-1)
    target = _column(draws, None, sums) * upto[:, -1:]
    block = _passage(sums, upto, target)
    rest = target - F.pad(upto, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double()
    index = block * BLOCK + _passage(inside, inside.cumsum(dim=-1), rest)
    result: list[int] = index[:, 0].tolist()
    return result


def _passage(weights: Tensor, cumulative: Tensor, target: Tensor) -> Tensor:
    """Per row the first index whose cumulative weight is over target, or the last one with weight, [R, 1]."""
    places = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    last = ((weights > 0) * places).amax(dim=-1, keepdim=True) - 1
    return torch.minimum((cumulative <= target).sum(dim=-1, keepdim=True), last)


def _column(draws: Sequence[Draw], name: str | None, like: Tensor) -> Tensor:
    """A sampling parameter (or, for None, the uniform) of every row as [R, 1]."""
    values = [draw.uniform if name is None else getattr(draw.params, name) for draw in draws]
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _logprobs(said: Scores, draws: Sequence[Draw], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """Log-probabilities of the model's own distribution, for the rows that ask for them."""
    result: dict[int, TokenLogprob] = {}
    rows = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    for row, logits in zip(rows, said.of(rows) if rows else (), strict=True):
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(draws[row].params.logprobs or 0)
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        result[row] = TokenLogprob(tokens[row], float(logprobs[tokens[row]]), top)
    return result
