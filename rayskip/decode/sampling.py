"""Choosing the next token of each row from its logits. Pure functions; every row is on its own.

Order of operations, as in transformers and vLLM: repetition, frequency and presence penalty, bias, constraint,
temperature, top-k, top-p, min-p. The
choice is the inverse of the cumulative distribution at the row's own uniform, so a token is a function of (logits,
parameters, tokens before, constraint, uniform) and a drafter can be checked by equality.

Shapes: R rows, V vocabulary, K candidates kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from rayskip.config import SamplingParams
from rayskip.data.records import TokenLogprob
from rayskip.decode.constraints import Mask
from rayskip.model.backends.base import HeadOutput
from rayskip.model.backends.transfer import ToHost, to_device

NUCLEUS = 1024
"""Candidates sorted for top-p before the whole vocabulary is: a nucleus is rarely wider."""


WIDE = 64
"""Rows of whole vocabularies that are sorted at once: of 128,000 tokens, 8 million take some 200 MB."""

BLOCK = 256
"""Weights that are added up before one of them is looked for."""

LEAST, MOST = 1e-6, 1e30
"""Bounds inside which no score overflows: of temperature and penalty, and of scores."""


@dataclass(frozen=True)
class Draw:
    """What one row's next token depends on, besides its logits.

    uniform: the row's random number for this position, in [0, 1).
    seen: token ids of prompt and completion, which may occur several times; read only under a repetition penalty.
    said: those of the completion; read only under a presence or frequency penalty. forbidden: tokens that may not
    come yet. mask: tokens that its constraint allows, if it has one. asked: tokens whose log-probabilities are
    asked for; in their place nothing is chosen.
    """

    params: SamplingParams
    uniform: float
    seen: ArrayLike
    said: ArrayLike = ()
    forbidden: Sequence[int] = ()
    mask: Mask | None = None
    asked: Sequence[int] = ()

    @property
    def needs_logits(self) -> bool:
        """Whether more than the highest logit decides what is chosen or output."""
        params = self.params
        return bool(self.asked) or params.logprobs is not None or (self.forced is None and not self.is_argmax)

    @property
    def forced(self) -> int | None:
        """The token, where no other may follow."""
        return None if self.mask is None else self.mask.only

    @property
    def is_argmax(self) -> bool:
        """Whether the token of the highest logit is chosen."""
        params = self.params
        changed = params.reads_tokens or params.logit_bias or self.forbidden or self.mask is not None
        return params.temperature == 0 and not changed


@dataclass(frozen=True)
class Choice:
    """A row's next token; None where the logits were not finite. asked: log-probabilities of the tokens that its
    draw asked for. scores: of a row with candidates, see `Generation`."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    asked: Mapping[int, float] = field(default_factory=dict)
    scores: list[float] | None = None


class Chosen:
    """The next tokens of R rows, which the device may still be computing. tokens [R]: on the device."""

    def __init__(
        self, tokens: Tensor, best: Tensor, logprobs: Sequence[_Logprobs], asked: _Asked | None
    ) -> None:
        self.tokens = tokens
        self._tokens, self._best, self._logprobs, self._asked = ToHost(tokens), ToHost(best), logprobs, asked

    def choices(self) -> list[Choice]:
        """One for each row, once the device is done."""
        logprobs: dict[int, TokenLogprob] = {}
        tokens = self._tokens.tolist()
        for own in self._logprobs:
            said = zip(own.rows, own.chosen.tolist(), own.ids.tolist(), own.values.tolist(), strict=True)
            for row, chosen, ids, values in said:
                logprobs[row] = TokenLogprob(tokens[row], chosen, list(zip(ids, values, strict=True)))
        asked = self._asked.by_row() if self._asked else {}
        return [
            Choice(token, logprobs.get(row), asked.get(row, {})) if math.isfinite(best) else Choice(None)
            for row, (token, best) in enumerate(zip(tokens, self._best.tolist(), strict=True))
        ]


@dataclass(frozen=True)
class _Logprobs:
    """Log-probabilities of rows that ask for K of them: of what was chosen [rows], and the highest [rows, K]."""

    rows: Sequence[int]
    chosen: ToHost
    ids: ToHost
    values: ToHost


@dataclass(frozen=True)
class _Asked:
    """Log-probabilities of the tokens that rows ask for, [rows, K]: the first ones of each are its own."""

    tokens: Mapping[int, Sequence[int]]
    values: ToHost

    def by_row(self) -> dict[int, dict[int, float]]:
        said = zip(self.tokens.items(), self.values.tolist(), strict=True)
        return {row: dict(zip(tokens, values, strict=False)) for (row, tokens), values in said}


def sample(output: HeadOutput, draws: Sequence[Draw]) -> Chosen:
    """The next token of each of R rows; draws R long, `output` of all rows that `Draw.needs_logits` holds for.

    Waits for the device only where a nucleus (top_p) may be wider than NUCLEUS.
    """
    tokens = output.argmax
    if forced := {row: draw.forced for row, draw in enumerate(draws) if draw.forced is not None}:
        tokens = _replaced(
            tokens, list(forced), to_device(list(forced.values()), tokens.dtype, tokens.device)
        )
    for width, rows in _by_width(draws, output.logits.shape[-1]).items():
        scores = _scores(output.of(rows), [draws[row] for row in rows])
        picked = _pick(scores, [draws[row] for row in rows], width)
        tokens = _replaced(tokens, rows, picked)
    return Chosen(tokens, output.best, _logprobs(output, draws, tokens), _asked(output, draws))


def _replaced(tokens: Tensor, rows: Sequence[int], others: Tensor) -> Tensor:
    return tokens.index_copy(0, to_device(rows, torch.long, tokens.device), others)


def _by_width(draws: Sequence[Draw], vocab: int) -> dict[int, list[int]]:
    """Rows with a choice that is not plain arg-max, by how many candidates must be ordered (0: none).

    The width comes from a row's own parameters alone: two widths may order ties differently.
    """
    rows = defaultdict(list)
    for row, draw in enumerate(draws):
        params = draw.params
        if draw.is_argmax or draw.forced is not None:
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
    _penalise(scores, draws)
    _penalise_said(scores, draws)
    _bias(scores, draws)
    temperature = to_device(
        [max(draw.params.temperature, LEAST) if draw.params.temperature else 1.0 for draw in draws],
        torch.float32,
        scores.device,
    )
    scores.clamp_(-MOST, MOST)
    _forbid(scores, {row: draw.mask for row, draw in enumerate(draws) if draw.mask is not None})
    return scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperature.unsqueeze(1))


def _penalise(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Repetition penalties, in place, of all rows at once."""
    rows = [row for row, draw in enumerate(draws) if draw.params.repetition_penalty != 1]
    if not rows:
        return
    seen = [np.asarray(draws[row].seen, np.int64) for row in rows]
    counts = list(map(len, seen))
    at = to_device([np.repeat(rows, counts), np.concatenate(seen)], torch.long, scores.device)
    penalties = [max(draws[row].params.repetition_penalty, LEAST) for row in rows]
    penalty = to_device(np.repeat(penalties, counts), torch.float32, scores.device)
    score = scores[at[0], at[1]]
    # what was seen several times is written several times, as one number
    scores[at[0], at[1]] = torch.where(score < 0, score * penalty, score / penalty)


def _penalise_said(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Frequency and presence penalties, in place, of all rows at once."""
    places, amounts = list[tuple[int, int]](), list[float]()
    for row, draw in enumerate(draws):
        if draw.params.counts_tokens:
            tokens, counts = np.unique(np.asarray(draw.said, np.int64), return_counts=True)
            places += [(row, token) for token in tokens.tolist()]
            amounts += (-draw.params.presence_penalty - draw.params.frequency_penalty * counts).tolist()
    _add(scores, places, amounts)


def _bias(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Biases, in place; what may not come yet has the lowest."""
    vocab = scores.shape[1]
    biases = {row: draw.params.logit_bias for row, draw in enumerate(draws) if draw.params.logit_bias}
    places = [(row, token) for row, bias in biases.items() for token in bias if token < vocab]
    _add(scores, places, [biases[row][token] for row, token in places])
    barred = [
        (row, token) for row, draw in enumerate(draws) for token in set(draw.forbidden) if token < vocab
    ]
    _add(scores, barred, [-2 * MOST] * len(barred))


def _add(scores: Tensor, places: Sequence[tuple[int, int]], amounts: Sequence[float]) -> None:
    """places: (row, token), each once."""
    if places:
        rows, tokens = to_device(list(zip(*places, strict=True)), torch.long, scores.device)
        scores[rows, tokens] += to_device(list(amounts), torch.float32, scores.device)


def _forbid(scores: Tensor, masks: Mapping[int, Mask]) -> None:
    """Rows' scores of tokens that their masks do not allow become -inf."""
    if masks:
        bits = np.stack([mask.bits for mask in masks.values()])
        allowed = np.unpackbits(bits, axis=1, count=scores.shape[1], bitorder="little")
        rows = to_device(list(masks), torch.long, scores.device)
        scores[rows] = scores[rows].masked_fill_(torch.from_numpy(allowed == 0).to(scores.device), -torch.inf)


def _pick(scores: Tensor, draws: Sequence[Draw], width: int) -> Tensor:
    """One token per row out of the kept candidates, by its uniform, [R]."""
    probs = torch.softmax(scores, dim=-1)
    if width == 0:
        if any(draw.params.min_p for draw in draws):
            probs *= probs >= probs.amax(dim=-1, keepdim=True) * _column(draws, "min_p", probs)
        return _invert(probs, draws)
    kept, ids = probs.topk(width, dim=-1)  # [R, K], descending
    tokens = ids.gather(1, _invert(truncate(kept, draws), draws)[:, None])[:, 0]
    wide = iter(_nucleus_too_wide(kept, draws, probs.shape[-1]))
    while rows := list(islice(wide, WIDE)):
        own, at = [draws[row] for row in rows], to_device(rows, torch.long, probs.device)
        order = probs[at].sort(dim=-1, descending=True, stable=True)
        index = _invert(truncate(order.values, own), own)
        tokens = tokens.index_copy(0, at, order.indices.gather(1, index[:, None])[:, 0])
    return tokens


def truncate(probs: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Weights of candidates [R, K] given in descending probability: 0 for those that top-k, top-p or min-p cut.

    Top-p reads probabilities renormalised after top-k; a candidate stays while those before it hold less than
    top_p. The first always stays.
    """
    kept = probs.double()
    has_top_k = to_device([draw.params.top_k > 0 for draw in draws], torch.long, kept.device).unsqueeze(1)
    kept = torch.where(has_top_k > 0, kept / kept.sum(dim=-1, keepdim=True), kept)
    before = kept.cumsum(dim=-1) - kept
    keep = before < _column(draws, "top_p", kept)
    keep &= kept >= kept[:, :1] * _column(draws, "min_p", kept)
    keep[:, 0] = True
    return kept * keep


def _nucleus_too_wide(kept: Tensor, draws: Sequence[Draw], vocab: int) -> list[int]:
    """Rows whose top-p nucleus reaches past the candidates that were ordered."""
    limits = {
        row: draw.params.top_p
        for row, draw in enumerate(draws)
        if draw.params.top_k <= 0 and draw.params.temperature and draw.params.top_p < 1
    }
    if kept.shape[1] == vocab or not limits:
        return []
    mass = ToHost(kept.double().sum(dim=-1)).tolist()
    return [row for row, top_p in limits.items() if mass[row] < top_p]


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Index per row where the cumulative weight [R, K] passes uniform x total, of those with weight, [R].

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
    return index[:, 0]


def _passage(weights: Tensor, cumulative: Tensor, target: Tensor) -> Tensor:
    """Per row the first index whose cumulative weight is over target, or the last one with weight, [R, 1]."""
    places = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    last = ((weights > 0) * places).amax(dim=-1, keepdim=True) - 1
    return torch.minimum((cumulative <= target).sum(dim=-1, keepdim=True), last)


def _column(draws: Sequence[Draw], name: str | None, like: Tensor) -> Tensor:
    """A sampling parameter (or, for None, the uniform) of every row as [R, 1]."""
    values = [draw.uniform if name is None else getattr(draw.params, name) for draw in draws]
    return to_device(values, like.dtype, like.device).unsqueeze(1)


def _logprobs(output: HeadOutput, draws: Sequence[Draw], tokens: Tensor) -> list[_Logprobs]:
    """Log-probabilities of the model's own distribution, for the rows that ask for them."""
    rows_of = defaultdict(list)
    for row, draw in enumerate(draws):
        if draw.params.logprobs is not None:
            rows_of[draw.params.logprobs].append(row)
    found = []
    for count, rows in rows_of.items():
        logprobs = torch.log_softmax(output.of(rows).float(), dim=-1)
        chosen = tokens[to_device(rows, torch.long, tokens.device)].unsqueeze(1)
        best = logprobs.topk(count)
        own = ToHost(logprobs.gather(1, chosen).squeeze(1))
        found.append(_Logprobs(rows, own, ToHost(best.indices), ToHost(best.values)))
    return found


def _asked(output: HeadOutput, draws: Sequence[Draw]) -> _Asked | None:
    """What the draws ask for, of the model's own distribution."""
    asked = {row: draw.asked for row, draw in enumerate(draws) if draw.asked}
    if not asked:
        return None
    most = max(map(len, asked.values()))
    ids = to_device(
        [[*own, *[0] * (most - len(own))] for own in asked.values()], torch.long, output.best.device
    )
    logprobs = torch.log_softmax(output.of(list(asked)).float(), dim=-1)
    return _Asked(asked, ToHost(logprobs.gather(1, ids)))
