"""Training Kangaroo adapters (arXiv 2404.18911, section 3.2): from the first layers' states to the model's own
distribution, for several exit layers in one pass.

Shapes: B examples, T columns, d hidden, A answer tokens of the batch, V' listed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayskip.train.drafts import Guesses, Predictions, Targets, listed_head
from rayskip.train.skip import decoder_layers

CONFIDENCE = 0.2
"""Of the model's last norm, what the adapter's starts with: its first layers' states point to tokens less surely.
On SmolLM2 the first loss is 8.2 nats with it and 17.7 without."""


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
        self.final_norm = _parameter(CONFIDENCE * target.base_model.norm.weight)

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


class Adapters(nn.Module):
    """One adapter per exit layer, over the frozen head's listed rows."""

    head: Tensor

    def __init__(self, target: Any, exit_layers: Iterable[int], token_ids: Tensor) -> None:
        super().__init__()
        self.each = nn.ModuleDict({str(layer): Adapter(target, layer) for layer in exit_layers})
        self.register_buffer("head", listed_head(target, token_ids), persistent=False)

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin as a trained adapter, whatever layer that one follows: all layers add to the same states."""
        for adapter in self.each.values():
            adapter.load_state_dict({name: tensors[name] for name in adapter.state_dict()})

    def forward(self, targets: Targets) -> dict[str, Predictions]:
        """Of each exit layer's adapter, for every answer token."""
        every = torch.arange(len(targets.chosen), device=targets.chosen.device)
        found = {}
        for name, adapter in self.each.items():
            hidden = adapter(targets.states[int(name)], targets.mask, targets.cos, targets.sin)
            found[name] = Predictions(F.linear(hidden[targets.where], self.head), every)
        return found


def held_drafts(guesses: Guesses, gamma: int, eta: float) -> list[list[int]]:
    """For `tokens_per_round`: a draft goes on as long as it is right, sure, and shorter than gamma."""

    def held(hits: Sequence[bool], confidences: Sequence[float]) -> int:
        count = 0
        for hit, confidence in zip(hits[:gamma], confidences[:gamma], strict=True):
            if not hit:
                break
            count += 1
            if confidence < eta:
                break
        return count

    return [
        [held(hits[at : at + gamma], sure[at : at + gamma]) for at in range(len(hits))]
        for hits, sure in zip(guesses.right, guesses.sure, strict=True)
    ]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float().clone())
