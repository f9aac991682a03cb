"""The slow, obvious forward: one sequence, no cache, no packing, one head at a time.

Written from the spec alone and sharing no code with `rayskip.model.decoder`, whose tests it judges.

Shapes: T tokens, d hidden, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rayskip.model.spec import (
    MLP,
    Activation,
    Attention,
    ClampedSwiGLU,
    Dense,
    Experts,
    Norm,
    Rope,
    Router,
    Spec,
    Weights,
)


@torch.no_grad()
def reference_logits(
    spec: Spec, weights: Weights, token_ids: list[int], runs: Callable[[int, int], bool] = lambda *_: True
) -> Tensor:
    """Logits of every position of one sequence: [T, V].

    runs(layer, position): whether the layer runs there; a position sees the keys of those that run it.
    """
    x = weights.embed[token_ids] * spec.embed_scale  # [T, d]
    if weights.positions is not None:
        x = x + weights.positions[: len(token_ids)]
    for index, layer in enumerate(weights.layers):
        skipped = torch.tensor([not runs(index, position) for position in range(len(x))])
        rope = weights.ropes[layer.attention.rope] if layer.attention.rope is not None else None
        attended = _norm(
            _attention(spec, layer.attention, rope, _norm(x, layer.attn_norm), skipped), layer.post_attn_norm
        )
        between = x if layer.parallel else x + attended
        fed = _norm(_mlp(layer.mlp, _norm(between, layer.mlp_norm)), layer.post_mlp_norm)
        x = torch.where(skipped[:, None], x, x + attended + fed)
    logits = _dense(_norm(x, weights.final_norm), weights.head) * spec.logit_scale
    return _softcap(logits, spec.logit_softcap)


def _attention(spec: Spec, layer: Attention, rope: Rope | None, x: Tensor, skipped: Tensor) -> Tensor:
    sizes = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
    queries, keys, values = (
        part.unflatten(-1, (-1, spec.head_dim)) for part in _dense(x, layer.qkv).split(sizes, dim=-1)
    )
    if layer.norms_turned:
        queries, keys = _rotate_heads(queries, rope), _rotate_heads(keys, rope)
    queries, keys = _norm_heads(queries, layer.q_norm), _norm_heads(keys, layer.k_norm)
    if not layer.norms_turned:
        queries, keys = _rotate_heads(queries, rope), _rotate_heads(keys, rope)
    outputs = []
    for head in range(spec.heads):
        group = head // (spec.heads // spec.kv_heads)
        query, key = queries[:, head], keys[:, group]  # [T, D]
        scores = _softcap(query @ key.T * spec.scale, spec.attn_softcap)  # [T, T]
        for position in range(len(x)):
            first = 0 if layer.window is None else max(0, position - layer.window + 1)
            scores[position, :first] = -torch.inf
            scores[position, position + 1 :] = -torch.inf
            scores[position, :position][skipped[:position]] = -torch.inf
        most = scores.max(dim=-1, keepdim=True).values
        weights = (scores - most).exp()
        beside = 0 if layer.sinks is None else (layer.sinks[head] - most).exp()
        outputs.append(weights / (weights.sum(dim=-1, keepdim=True) + beside) @ values[:, group])
    return _dense(torch.cat(outputs, dim=-1), layer.out)


def _mlp(mlp: MLP | Experts | None, x: Tensor) -> Tensor:
    assert mlp is not None
    if isinstance(mlp, Experts):
        return torch.stack([_experts(mlp, token) for token in x])
    up = _dense(x, mlp.up)
    if not mlp.gated:
        return _dense(_activate(mlp.activation, up), mlp.down)
    gate, up = up.chunk(2, dim=-1)
    if isinstance(mlp.activation, ClampedSwiGLU):
        most = mlp.activation.limit
        gate, up = gate.clamp(max=most), up.clamp(min=-most, max=most)
        return _dense(gate / (1 + torch.exp(-mlp.activation.alpha * gate)) * (up + 1), mlp.down)
    return _dense(_activate(mlp.activation, gate) * up, mlp.down)


def _experts(experts: Experts, token: Tensor) -> Tensor:
    """One token [d] through the experts that it goes to."""
    total = torch.zeros_like(token)
    for index, weight in _chosen(experts.router, token).items():
        up, down = (
            Dense(dense.weight[index], None if dense.bias is None else dense.bias[index])
            for dense in (experts.up, experts.down)
        )
        total += weight * _mlp(MLP(up, down, experts.activation, gated=True), token)
    if experts.shared is not None:
        gate = 1.0 if experts.shared_gate is None else (experts.shared_gate[0] @ token).sigmoid()
        total += gate * _mlp(experts.shared, token)
    return total


def _chosen(router: Router, token: Tensor) -> dict[int, float]:
    """Experts and their weights."""
    logits = _dense(token, router.dense)
    scores = (logits.sigmoid() if router.scores == "sigmoid" else logits.exp() / logits.exp().sum()).tolist()
    ranked = torch.tensor(scores) + (0 if router.correction is None else router.correction)
    size = len(scores) // router.groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    groups.sort(key=lambda group: -sum(sorted(ranked[group].tolist())[-2:]))
    open_to = [index for group in groups[: router.top_groups] for index in group]
    best = sorted(open_to, key=lambda index: -ranked[index])[: router.top_k]
    divisor = sum(scores[index] for index in best) if router.normalised else 1.0
    return {index: scores[index] / divisor * router.scale for index in best}


def _activate(activation: Activation, x: Tensor) -> Tensor:
    if activation == "silu":
        return x * x.sigmoid()
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "relu2":
        return x.clamp(min=0) ** 2
    if activation == "gelu":
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def _dense(x: Tensor, dense: Dense) -> Tensor:
    y = x @ dense.weight.T
    return y if dense.bias is None else y + dense.bias


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return x if norm.bias is None else x + norm.bias


def _norm_heads(x: Tensor, norm: Norm | None) -> Tensor:
    """x [T, H, D], over each head or over all together."""
    if norm is None or len(norm.weight) == x.shape[-1]:
        return _norm(x, norm)
    return _norm(x.flatten(1), norm).view(x.shape)


def _rotate_heads(x: Tensor, rope: Rope | None) -> Tensor:
    return torch.stack([_rotate(head, rope) for head in x.unbind(1)], dim=1)


def _rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Turn the pairs (i, i + R/2) of the first R dims of x [T, D] by the position's angles."""
    if rope is None:
        return x
    size = rope.cos.shape[-1]
    cos, sin = rope.cos[: len(x), : size // 2], rope.sin[: len(x), : size // 2]
    left, right, rest = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
