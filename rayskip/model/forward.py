"""The one forward: a packed list of tokens through a decoder, over the KV cache.

Prefill, decode and verification are the same call; they differ in how many query tokens a row brings.
Knows neither sampling nor scheduling.

Shapes: N tokens, d hidden, Hq = Hkv * G query heads, D head dim, T key positions read, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.attention import attend, causal_mask, softcap
from rayskip.model.kv_cache import KVCache
from rayskip.model.linear import Linear, row_rule
from rayskip.model.spec import Activation, Layer, Norm, Rope, Spec, Weights


@dataclass(frozen=True)
class Group:
    """A run of the packed tokens, beginning at token `start`: `width` tokens of each of some rows, row by row.

    slots [rows]: where the rows' keys are; the first `keys` positions of each are read.
    """

    start: int
    width: int
    slots: Tensor
    keys: int

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.width


@dataclass
class TokenBatch:
    """Packed tokens of one step: ids, positions and slots [N], the groups that cover them in order,
    and the tokens whose logits are wanted (indices [R])."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[Group]
    outputs: Tensor
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, index: int, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """0 where a query may look, -inf elsewhere: [rows, 1, width * heads, T]; made once per step."""
        if (index, window) not in self._masks:
            group = self.groups[index]
            positions = self.positions[group.start : group.stop].view(group.rows, group.width)
            self._masks[index, window] = causal_mask(
                positions.repeat_interleave(heads, dim=1), group.keys, window, dtype
            )
        return self._masks[index, window]


class Decoder:
    """A model that runs. Holds no state between calls; the caller owns the cache."""

    def __init__(self, spec: Spec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.head = Linear(weights.head)
        self.layers = [_PackedLayer(layer) for layer in weights.layers]
        self.row_rule = row_rule(self._linears())
        for linear in self._linears():
            linear.rule = self.row_rule
        self._ropes = {
            name: Rope(rope.cos.to(self.device, self.dtype), rope.sin.to(self.device, self.dtype))
            for name, rope in weights.ropes.items()
        }

    def _linears(self) -> list[Linear]:
        return [self.head, *(linear for layer in self.layers for linear in layer.linears)]

    def new_cache(self) -> KVCache:
        return KVCache(self.spec, len(self.layers), self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Run every layer, write the tokens' keys and values into `cache`, return logits [R, V]."""
        x = self.weights.embed[batch.token_ids]  # [N, d]
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if self.weights.positions is not None:
            x = x + self.weights.positions[batch.positions]
        ropes = {
            name: (rope.cos[batch.positions].unsqueeze(1), rope.sin[batch.positions].unsqueeze(1))
            for name, rope in self._ropes.items()
        }
        for index, layer in enumerate(self.layers):
            x = self._run_layer(index, layer, x, batch, cache, ropes)
        return self._logits(x[batch.outputs])

    def _run_layer(
        self,
        index: int,
        layer: _PackedLayer,
        x: Tensor,
        batch: TokenBatch,
        cache: KVCache,
        ropes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        own = layer.own
        rope = ropes[own.rope] if own.rope is not None else None
        attention = self._attention(index, layer, normalise(x, own.attn_norm), batch, cache, rope)
        if own.post_attn_norm is not None:
            attention = normalise(attention, own.post_attn_norm)
        if self.spec.parallel:
            return x + attention + self._mlp(layer, normalise(x, own.mlp_norm))
        x = x + attention
        mlp = self._mlp(layer, normalise(x, own.mlp_norm))
        return x + (mlp if own.post_mlp_norm is None else normalise(mlp, own.post_mlp_norm))

    def _attention(
        self,
        index: int,
        layer: _PackedLayer,
        x: Tensor,
        batch: TokenBatch,
        cache: KVCache,
        rope: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        spec, own = self.spec, layer.own
        heads = layer.qkv(x).view(len(x), -1, spec.head_dim)  # [N, Hq + 2 Hkv, D]
        qk, v = torch.split(heads, [spec.heads + spec.kv_heads, spec.kv_heads], dim=1)
        if own.q_norm is not None and own.k_norm is not None:
            q, k = torch.split(qk, [spec.heads, spec.kv_heads], dim=1)
            qk = torch.cat((normalise(q, own.q_norm), normalise(k, own.k_norm)), dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = torch.split(qk, [spec.heads, spec.kv_heads], dim=1)
        cache.write(index, batch.slots, batch.positions, k, v)
        q = q * spec.scale
        parts = [
            self._attend(index, q[group.start : group.stop], batch, number, cache, own.window)
            for number, group in enumerate(batch.groups)
        ]
        return layer.out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _attend(
        self, layer: int, q: Tensor, batch: TokenBatch, number: int, cache: KVCache, window: int | None
    ) -> Tensor:
        """Softmax attention of one group, q [rows * width, Hq, D] -> [rows * width, Hq * D].

        Queries of one key-value head are stacked, so that its keys are read once.
        """
        spec, group = self.spec, batch.groups[number]
        keys, values = cache.read(layer, group.slots, group.keys)  # [rows, Hkv, D, T], [rows, Hkv, T, D]
        per_head = spec.heads // spec.kv_heads
        q = q.view(group.rows, group.width, spec.kv_heads, per_head, spec.head_dim).transpose(1, 2)
        q = q.reshape(group.rows, spec.kv_heads, group.width * per_head, spec.head_dim)
        mask = batch.mask(number, window, per_head, q.dtype)
        out = attend(q, keys, values, mask, spec.attn_softcap)  # [rows, Hkv, width * G, D]
        out = out.view(group.rows, spec.kv_heads, group.width, per_head, spec.head_dim).transpose(1, 2)
        return out.reshape(group.rows * group.width, spec.heads * spec.head_dim)

    def _mlp(self, layer: _PackedLayer, x: Tensor) -> Tensor:
        up = layer.up(x)
        if not self.spec.gated:
            return layer.down(activate(up, self.spec.activation))
        gate, up = up.chunk(2, dim=-1)
        return layer.down(activate(gate, self.spec.activation) * up)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.head(normalise(x, self.weights.final_norm))
        return logits if self.spec.logit_softcap is None else softcap(logits, self.spec.logit_softcap)


class _PackedLayer:
    """A layer with its four products ready to run."""

    def __init__(self, layer: Layer) -> None:
        self.own = layer
        self.qkv, self.out = Linear(layer.qkv), Linear(layer.out)
        self.up, self.down = Linear(layer.up), Linear(layer.down)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.out, self.up, self.down


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm or LayerNorm over the last axis, computed in float32 inside, in x's dtype outside."""
    if norm.kind == "layer":
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    if norm.weight.dtype == x.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return F.rms_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864, halves layout) of the first R dims of x [N, H, D].

    cos, sin: [N, 1, R].
    """
    turned, rest = torch.split(x, [cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward's non-linearity."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
