"""Training Kangaroo adapters (arXiv 2404.18911, section 3.2): from the first layers' states to the model's own
distribution, for several exit layers in one pass.

The target runs once for all of them, without gradients, on the fly: its states are never stored. The loss is soft
cross-entropy to its distribution over the listed tokens, on the tokens of the answers.

Shapes: B examples, T columns, d hidden, A answer tokens of the batch, V' listed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayskip.train.examples import IGNORED, Batch, Example
from rayskip.train.skip import decoder_layers


@dataclass(frozen=True)
class Targets:
    """What the frozen model makes of a batch.

    states: exit layer -> [B, T, d] after that many layers. final [A, d]: after the last norm, where answer tokens
    are chosen. where [B, T]: those places. chosen [A]: the answers' tokens. mask [B, 1, T, T]: True where a place
    may look. cos, sin [B, T, D]: rotary table.
    """

    states: dict[int, Tensor]
    final: Tensor
    where: Tensor
    chosen: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class Adapter(nn.Module):
    """One adapter, as `rayskip.model.kangaroo` runs it, for autograd; starts as layer `exit_layer`s attention."""

    def __init__(self, target: Any, exit_layer: int) -> None:
        super().__init__()
        config = target.config.get_text_config()
        own: Any = decoder_layers(target)[exit_layer]
        attention = own.self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.qkv = _parameter(torch.cat(parts))
        self.out = _parameter(attention.o_proj.weight)
        self.attn_norm = _parameter(own.input_layernorm.weight)
        self.final_norm = _parameter(target.base_model.norm.weight)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, d] -> hidden states for the head [B, T, d]; mask [B, 1, T, T] True where a query may look."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        normed = F.rms_norm(x, x.shape[-1:], self.attn_norm, self.eps)
        heads = (
            F.linear(normed, self.qkv).view(*x.shape[:2], self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        )
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), self.out)
        return F.rms_norm(x, x.shape[-1:], self.final_norm, self.eps)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by the names they are saved under."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


class Adapters(nn.Module):
    """One adapter per exit layer, over the frozen head's listed rows."""

    head: Tensor

    def __init__(self, target: Any, exit_layers: Iterable[int], token_ids: Tensor) -> None:
        super().__init__()
        self.each = nn.ModuleDict({str(layer): Adapter(target, layer) for layer in exit_layers})
        head = target.get_output_embeddings().weight[token_ids].detach().clone()
        self.register_buffer("head", head, persistent=False)

    def forward(self, targets: Targets) -> dict[int, Tensor]:
        """Logits [A, V'] of each exit layer's adapter."""
        logits = {}
        for name, adapter in self.each.items():
            hidden = adapter(targets.states[int(name)], targets.mask, targets.cos, targets.sin)
            logits[int(name)] = F.linear(hidden[targets.where], self.head)
        return logits


def run_target(target: Any, batch: Batch, exit_layers: Sequence[int]) -> Targets:
    """One forward of the frozen model over prompts and answers."""
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    states: dict[int, Tensor] = {}
    layers = decoder_layers(target)
    hooks = [
        layers[exit_layer].register_forward_pre_hook(
            lambda layer, args, exit_layer=exit_layer: states.__setitem__(exit_layer, args[0])
        )
        for exit_layer in exit_layers
    ]
    try:
        with torch.no_grad():
            final = target.base_model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
            cos, sin = target.base_model.rotary_emb(final, positions)
    finally:
        for hook in hooks:
            hook.remove()
    width = batch.input_ids.shape[1]
    where = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    where[:, batch.prompt_width - 1 : -1] = batch.labels != IGNORED  # a place chooses the token after it
    causal = torch.ones(width, width, dtype=torch.bool, device=final.device).tril()
    mask = causal & batch.attention_mask.bool()[:, None, None, :]
    mask |= torch.eye(width, dtype=torch.bool, device=final.device)  # padding sees itself: no empty softmax
    chosen = batch.labels[batch.labels != IGNORED]
    return Targets(states, final[where], where, chosen, mask, cos, sin)


def adapters_loss(adapters: Any, target: Any, targets: Targets, token_ids: Tensor) -> Tensor:
    """Mean over exit layers and answer tokens of the soft cross-entropy, over the listed tokens."""
    with torch.no_grad():
        head = target.get_output_embeddings().weight[token_ids]
        wanted = F.linear(targets.final, head).float().softmax(-1)
    losses = [
        F.cross_entropy(logits.float(), wanted.to(logits.device)) for logits in adapters(targets).values()
    ]
    return torch.stack(losses).mean()


def frequent_tokens(examples: Iterable[Example], count: int, vocab: int) -> Tensor:
    """The `count` tokens most frequent in the answers, ascending; filled up with the lowest ids, which a BPE
    vocabulary gives to its most frequent tokens."""
    seen = Counter(token for example in examples for token in example.answer)
    listed = [token for token, _ in seen.most_common(count)]
    taken = set(listed)
    rest = (token for token in range(vocab) if token not in taken)
    while len(listed) < min(count, vocab):
        listed.append(next(rest))
    return torch.tensor(sorted(listed))


@dataclass(frozen=True)
class DraftQuality:
    """How well an adapter drafts on held-out answers.

    agreement: share of places where its first choice is the answer's token. tokens_per_round: expected tokens per
    verification with these gamma and eta, the model's own included. reliability: (mean confidence, share that was
    right, places) of ten equal ranges of confidence. covered: share of the answers' tokens that are listed.
    """

    exit_layer: int
    agreement: float
    tokens_per_round: float
    reliability: list[tuple[float, float, int]]
    covered: float


def draft_quality(
    adapters: Any,
    target: Any,
    batches: Iterable[Batch],
    token_ids: Tensor,
    gamma: int,
    eta: float,
) -> list[DraftQuality]:
    """Of every exit layer. The batches' answers must be the target's own, chosen greedily: then what is counted
    along the answers is what drafting would meet."""
    exits = [int(name) for name in adapters.each]
    right: dict[int, list[list[bool]]] = {layer: [] for layer in exits}
    sure: dict[int, list[list[float]]] = {layer: [] for layer in exits}
    covered: list[bool] = []
    with torch.no_grad():
        for batch in batches:
            targets = run_target(target, batch, exits)
            lengths = (batch.labels != IGNORED).sum(1).tolist()
            covered += torch.isin(targets.chosen.cpu(), token_ids).tolist()
            for layer, logits in adapters(targets).items():
                best = logits.float().softmax(-1).max(-1)
                hits = token_ids[best.indices.cpu()] == targets.chosen.cpu()
                right[layer] += [part.tolist() for part in torch.split(hits, lengths)]
                sure[layer] += [part.tolist() for part in torch.split(best.values, lengths)]
    return [
        DraftQuality(
            layer,
            _mean([hit for row in right[layer] for hit in row]),
            _tokens_per_round(right[layer], sure[layer], gamma, eta),
            _reliability(right[layer], sure[layer]),
            _mean(covered),
        )
        for layer in exits
    ]


def _tokens_per_round(
    right: Sequence[Sequence[bool]], sure: Sequence[Sequence[float]], gamma: int, eta: float
) -> float:
    """Walk every answer in rounds: the drafts that hold, and one token of the model's own."""
    tokens = rounds = 0
    for hits, confidences in zip(right, sure, strict=True):
        at = 1  # the first token comes from the prompt
        while at < len(hits):
            held = 0
            for offset in range(min(gamma, len(hits) - at - 1)):  # the last token is never drafted
                if not hits[at + offset]:
                    break
                held += 1
                if confidences[at + offset] < eta:
                    break
            tokens += held + 1
            rounds += 1
            at += held + 1
    return tokens / rounds if rounds else 1.0


def _reliability(
    right: Sequence[Sequence[bool]], sure: Sequence[Sequence[float]]
) -> list[tuple[float, float, int]]:
    pairs = [pair for hits, own in zip(right, sure, strict=True) for pair in zip(own, hits, strict=True)]
    ranges = [[pair for pair in pairs if min(int(pair[0] * 10), 9) == tenth] for tenth in range(10)]
    return [
        (_mean([confidence for confidence, _ in part]), _mean([hit for _, hit in part]), len(part))
        for part in ranges
        if part
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float().clone())
