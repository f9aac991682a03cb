"""What trained drafters learn from and are measured by: the frozen model's distribution along its own answers.

The target runs on the fly: its states are never stored. Its distribution comes with the answers where the job that
made them wrote log-probabilities, and then only the layers below what is trained run; else from its last states.

Shapes: B examples, T columns, d hidden, A answer tokens of the batch, V' listed tokens, K tokens that share a
distribution's mass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.train.examples import IGNORED, Example, TrainBatch
from rayskip.train.skip import decoder_layers

SHARES = 16
"""Tokens of the target's distribution that are learned, where it is computed here; the rest has next to no mass."""


@dataclass(frozen=True)
class Targets:
    """What the frozen model makes of a batch.

    states: number of layers -> [B, T, d] after them. final [A, d]: after the last norm, where answer tokens are
    chosen; of use only if no layer was cut off. where [B, T]: those places. offsets [A]: of an answer's tokens, its
    end less the place. mask [B, 1, T, T]: True where a place may look. cos, sin [B, T, D]: rotary table.
    wanted, shares [A, K]: places in the token list, and their probabilities, which add up to 1, or to 0 where the
    list has none of them. chosen [A]: the answers' tokens.
    """

    states: dict[int, Tensor]
    final: Tensor
    where: Tensor
    offsets: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor
    wanted: Tensor
    shares: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Predictions:
    """Logits [M, V'] for the answer tokens `at` [M] of the batch."""

    logits: Tensor
    at: Tensor


def cut_off(target: Any, layers: int) -> None:
    """Drop the layers after the first `layers`, which nothing reads."""
    target.base_model.layers = decoder_layers(target)[:layers]
    target.config.num_hidden_layers = layers


def listed_head(target: Any, token_ids: Tensor) -> Tensor:
    """The frozen head's rows of the listed tokens, [V', d]; a copy."""
    head: Tensor = target.get_output_embeddings().weight.detach()[token_ids]
    return head


def run_target(target: Any, batch: TrainBatch, exit_layers: Sequence[int], token_ids: Tensor) -> Targets:
    """One forward of the frozen model over prompts and answers."""
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    states: dict[int, Tensor] = {}
    layers = decoder_layers(target)
    hooks = [
        layers[exit_layer - 1].register_forward_hook(
            lambda layer, args, x, exit_layer=exit_layer: states.__setitem__(
                exit_layer, x[0] if isinstance(x, tuple) else x
            )
        )
        for exit_layer in exit_layers
    ]
    width = batch.input_ids.shape[1]
    where = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    where[:, batch.prompt_width - 1 : -1] = batch.labels != IGNORED  # a place chooses the token after it
    try:
        with torch.no_grad():
            last = target.base_model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
            cos, sin = target.base_model.rotary_emb(last, positions)
            final = last[where]
            wanted, shares = _distribution(target, batch, final, token_ids.to(final.device))
    finally:
        for hook in hooks:
            hook.remove()
    causal = torch.ones(width, width, dtype=torch.bool, device=last.device).tril()
    mask = causal & batch.attention_mask.bool()[:, None, None, :]
    mask |= torch.eye(width, dtype=torch.bool, device=last.device)  # padding sees itself: no empty softmax
    known = batch.labels != IGNORED
    offsets = (known.sum(1, keepdim=True) - known.cumsum(1))[known]
    chosen = batch.labels[known]
    return Targets(states, final, where, offsets, mask, cos, sin, wanted, shares, chosen)


def _distribution(target: Any, batch: TrainBatch, final: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(places in the token list, their probabilities) [A, K] of the tokens that follow."""
    if batch.top_ids is None or batch.top_logprobs is None:
        best = (
            F.linear(final, listed_head(target, token_ids))
            .float()
            .softmax(-1)
            .topk(min(SHARES, len(token_ids)))
        )
        return best.indices, best.values / best.values.sum(-1, keepdim=True)
    top_ids = batch.top_ids.long()
    places = torch.searchsorted(token_ids, top_ids).clamp(max=len(token_ids) - 1)
    mass = batch.top_logprobs.exp() * (token_ids[places] == top_ids)
    return places, mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)


def soft_loss(predictions: Mapping[str, Predictions], targets: Targets) -> Tensor:
    """Mean over what is trained and over answer tokens of the soft cross-entropy, over the listed tokens."""
    losses = []
    for own in predictions.values():
        wanted, shares = targets.wanted[own.at], targets.shares[own.at]
        logprobs = torch.log_softmax(own.logits, -1, dtype=torch.float32).gather(1, wanted)
        losses.append(-(logprobs * shares).sum() / shares.sum().clamp(min=1))
    return torch.stack(losses).mean()


def frequent_tokens(examples: Iterable[Example], count: int, vocab: int) -> Tensor:
    """The `count` tokens most frequent in the answers, ascending; filled up with those most frequent in the
    prompts, and then with the lowest ids, which a BPE vocabulary gives to its most frequent tokens."""
    answers: Counter[int] = Counter()
    prompts: Counter[int] = Counter()
    for example in examples:
        answers.update(example.answer)
        prompts.update(example.prompt)
    by_rank = chain(
        (token for token, _ in answers.most_common()),
        (token for token, _ in prompts.most_common()),
        range(vocab),
    )
    listed = list(dict.fromkeys(by_rank))[:count]
    return torch.tensor(sorted(listed))


@dataclass(frozen=True)
class DraftQuality:
    """How well something drafts on held-out answers.

    agreement: share of places where its first choice is the answer's token. tokens_per_round: expected tokens per
    verification, the model's own included. reliability: (mean confidence, share that was right, places) of ten
    equal ranges of confidence. covered: share of the answers' tokens that are listed.
    """

    name: str
    agreement: float
    tokens_per_round: float
    reliability: list[tuple[float, float, int]]
    covered: float


@dataclass(frozen=True)
class Guesses:
    """What was predicted for the tokens of every held-out answer: whether it was right, and how sure it was; one
    entry a token, from the first one that is predicted."""

    right: list[list[bool]]
    sure: list[list[float]]

    @property
    def agreement(self) -> float:
        return mean([hit for row in self.right for hit in row])

    @property
    def reliability(self) -> list[tuple[float, float, int]]:
        """See `DraftQuality`."""
        rows = zip(self.right, self.sure, strict=True)
        pairs = [pair for hits, own in rows for pair in zip(own, hits, strict=True)]
        ranges = [[pair for pair in pairs if min(int(pair[0] * 10), 9) == tenth] for tenth in range(10)]
        return [
            (mean([confidence for confidence, _ in part]), mean([hit for _, hit in part]), len(part))
            for part in ranges
            if part
        ]


def guess(
    predict: Any, target: Any, batches: Iterable[TrainBatch], exit_layers: Sequence[int], token_ids: Tensor
) -> tuple[dict[str, Guesses], float]:
    """What `predict` (targets -> predictions by name) says of every answer, and the share of tokens listed.

    The batches' answers must be the target's own, chosen greedily: then what is counted along the answers is what
    drafting would meet.
    """
    found: dict[str, Guesses] = {}
    covered: list[bool] = []
    with torch.no_grad():
        for batch in batches:
            targets = run_target(target, batch, exit_layers, token_ids)
            chosen = targets.chosen.cpu()
            row_of = torch.repeat_interleave((batch.labels != IGNORED).sum(1)).cpu()
            covered += torch.isin(chosen, token_ids).tolist()
            for name, own in predict(targets).items():
                best = own.logits.float().softmax(-1).max(-1)
                hits = token_ids[best.indices.cpu()] == chosen[own.at.cpu()]
                sizes = torch.bincount(row_of[own.at.cpu()], minlength=len(batch.labels)).tolist()
                guesses = found.setdefault(name, Guesses([], []))
                guesses.right.extend(part.tolist() for part in torch.split(hits, sizes))
                guesses.sure.extend(part.tolist() for part in torch.split(best.values, sizes))
    return found, mean(covered)


def tokens_per_round(held: Sequence[Sequence[int]]) -> float:
    """Walk every answer in rounds: the drafts that hold, and one token of the model's own.

    held[i][t]: how many drafts would hold for the tokens from t on. The first token comes from the prompt, and the
    last is never drafted: verification adds one of its own.
    """
    tokens = rounds = 0
    for row in held:
        at = 1
        while at < len(row):
            gained = min(row[at], len(row) - at - 1) + 1
            tokens, rounds, at = tokens + gained, rounds + 1, at + gained
    return tokens / rounds if rounds else 1.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
