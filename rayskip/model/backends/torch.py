"""The reference backend: plain torch, on every device; slow, obvious, and what every other is compared with.

Attention reads keys in spans of rows of one shape, see `Span`. The others inherit what they do not replace.

Shapes: N tokens, d hidden, f feed-forward, Hq = Hkv * G query heads, D head dim, T key positions read, R rows of
outputs, V vocabulary, E experts, K that a token goes to, P pairs of a token and one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.backends.base import Backend, Head, HeadOutput, Linear, Stack
from rayskip.model.backends.linear import TorchLinear, TorchScores, row_rule
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.spec import (
    MLP,
    Activation,
    Attention,
    ClampedSwiGLU,
    Dense,
    Experts,
    Gate,
    Layer,
    Norm,
    Rope,
    Router,
    Weights,
)
from rayskip.model.token_batch import TokenBatch

BLOCK = 256
"""Logits that are taken together before one of them is looked for."""
TINY = 1e-20
"""Added to weights' sum, which may be zero where their scores are sigmoids."""


class TorchBackend(Backend):
    """Tokens lie one after another in every tensor; a token's own elements are contiguous."""

    name = "torch"
    weights: Weights
    ropes: dict[str, Rope]

    def load(self, weights: Weights) -> tuple[Stack, Head]:
        self.weights = weights
        self.ropes = {
            name: Rope(rope.cos.to(self.device, self.dtype), rope.sin.to(self.device, self.dtype))
            for name, rope in weights.ropes.items()
        }
        layers, head = self.stack(weights.layers), self.head(weights.head, weights.final_norm)
        self.set_row_rule([*layers.linears, head.linear])
        return layers, head

    def set_row_rule(self, linears: Sequence[Linear]) -> None:
        """Find the row rule of a model's products, and have those that are a library's run by it."""
        libraries = [linear for linear in linears if isinstance(linear, TorchLinear)]
        self.row_rule = row_rule(libraries)
        for linear in libraries:
            linear.rule = self.row_rule

    def embed(self, batch: TokenBatch) -> Tensor:
        x = self.weights.embed[batch.token_ids]
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if self.weights.positions is not None:
            x = x + self.weights.positions[batch.positions]
        return x

    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        return TorchStack(self, layers, stored_at)

    def head(self, dense: Dense, norm: Norm | None, exact: bool = True) -> Head:
        return TorchHead(self, self.linear(dense), norm, exact)

    def linear(self, dense: Dense) -> Linear:
        return TorchLinear(dense)

    def add_normalise(self, x: Tensor, branch: Tensor | None, norm: Norm | None) -> Tensor:
        """Add branch to x in place, and return that normalised, or as it is without a norm; all [N, d]."""
        if branch is not None:
            x += branch
        return x if norm is None else self.normalise(x, norm)

    def normalise(self, x: Tensor, norm: Norm) -> Tensor:
        return normalise(x, norm)

    def gate(self, up: Tensor, activation: Gate, gated: bool) -> Tensor:
        """An MLP's non-linearity: gate and up side by side [N, 2f] (or up alone [N, f]) -> [N, f]."""
        if isinstance(activation, ClampedSwiGLU):
            gate, up = up.chunk(2, dim=-1)
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(-activation.limit, activation.limit)
            return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
        if not gated:
            return activate(up, activation)
        gate, up = up.chunk(2, dim=-1)
        return activate(gate, activation) * up

    def scores(self, dense: Dense) -> Linear:
        """A router's product: x [N, d] -> [N, E] in float32."""
        return TorchScores(dense)

    def route(self, router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the router makes of its logits [N, E] and, behind those, that of the shared expert's gate, if it has
        one: (experts [N, K], their weights, and the sigmoid of the gate's behind those, in float32)."""
        return route(router, logits)

    def top_k(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Places of the `count` highest of logits [R, V], and their probabilities, both [R, count], descending."""
        best = torch.softmax(logits.float(), dim=-1).topk(count)
        return best.indices, best.values

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The highest of each row's logits (not a number where one is none) and the first place it has, both [R].

        Block by block, since torch finds a maximum many times faster than its place.
        """
        if padding := -logits.shape[1] % BLOCK:
            logits = F.pad(logits, (0, padding), value=-torch.inf)
        blocks = logits.view(len(logits), logits.shape[1] // BLOCK, BLOCK)
        best, block = blocks.amax(dim=-1).max(dim=-1)
        inside = blocks[torch.arange(len(blocks), device=block.device), block]
        return best, block * BLOCK + inside.argmax(dim=-1)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Attention,
        layer: int,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        """Turn q [N, Hq, D] and k [N, Hkv, D], store k and v [N, Hkv, D] in the cache, attend: [N, Hq * D].

        N: the layer's active tokens, the batch's first ones; they end with a span. layer: of the cache. May write
        into q and k.
        """
        q = self.turn_and_store(q, k, v, own.rope, layer, batch, cache) * self.spec.scale
        parts = [
            self._attend_span(q[span.start : span.stop], own, layer, batch, index, cache)
            for index, span in enumerate(batch.spans)
            if span.start < len(q)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def turn_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, rope: str | None, layer: int, batch: TokenBatch, cache: KVCache
    ) -> Tensor:
        """Turn q and k, store k and v in the cache, return q; as in `attention`."""
        if rope is not None:
            q, k = self.turn(q, k, self.ropes[rope], batch.positions[: len(q)])
        cache.write(layer, batch.table_rows[: len(q)], batch.places[: len(q)], k, v)
        return q

    def turn(self, q: Tensor, k: Tensor, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q [N, Hq, D] and k [N, Hkv, D] to their positions [N]."""
        cos, sin = rope.cos[positions].unsqueeze(1), rope.sin[positions].unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def _attend_span(
        self, q: Tensor, own: Attention, layer: int, batch: TokenBatch, index: int, cache: KVCache
    ) -> Tensor:
        """q [rows * width, Hq, D] of one span -> [rows * width, Hq * D].

        Queries of one key-value head are stacked, so that its keys are read once.
        """
        spec, span = self.spec, batch.spans[index]
        if batch.paths is not None and span.width == 1:  # drafted tokens come one by one
            places = batch.paths.keys(batch.positions, span.start, span.stop, span.keys)
            keys, values = cache.read_places(layer, span.table_rows, places)  # [rows, Hkv, T, D]
        else:
            keys, values = cache.read(layer, span.table_rows, span.keys)
        per_head = spec.heads // spec.kv_heads
        q = q.view(span.rows, span.width, spec.kv_heads, per_head, spec.head_dim).transpose(1, 2)
        q = q.reshape(span.rows, spec.kv_heads, span.width * per_head, spec.head_dim)

        def mask() -> Tensor:
            positions = batch.positions[span.start : span.stop].view(span.rows, span.width)
            return causal_mask(positions.repeat_interleave(per_head, dim=1), span.keys, own.window, q.dtype)

        sinks = None if own.sinks is None else own.sinks.view(-1, per_head).repeat(1, span.width)
        out = attend(q, keys, values, batch.once(("mask", index, own.window), mask), spec.attn_softcap, sinks)
        out = out.view(span.rows, spec.kv_heads, span.width, per_head, spec.head_dim).transpose(1, 2)
        return out.reshape(span.rows * span.width, spec.heads * spec.head_dim)


class TorchStack(Stack):
    """Layers run operation by operation, with the operations of a backend."""

    def __init__(self, backend: TorchBackend, layers: Sequence[Layer], stored_at: int) -> None:
        self._backend, self._stored_at = backend, stored_at
        self._layers = [_Ready(backend, layer) for layer in layers]
        self.linears = [linear for layer in self._layers for linear in layer.linears]

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        branch: Tensor | None = None  # what the last layer adds to x; the next norm adds it on its way
        for index in range(first, last):
            count = len(x) if batch.active is None else batch.active[index]
            if branch is not None and len(branch) != count:
                x[: len(branch)] += branch
                branch = None
            if count:
                branch = self._run_layer(index, x[:count], branch, batch, cache)
        if branch is not None:
            x[: len(branch)] += branch
        return x

    def _run_layer(
        self, index: int, x: Tensor, branch: Tensor | None, batch: TokenBatch, cache: KVCache
    ) -> Tensor:
        """Add `branch` to x in place, then run one layer on it: what the layer adds to x [N, d]."""
        ready, backend = self._layers[index], self._backend
        layer = ready.layer
        normed = backend.add_normalise(x, branch, layer.attn_norm)
        attention = self._attention(ready, index, normed, batch, cache)
        if layer.post_attn_norm is not None:
            attention = normalise(attention, layer.post_attn_norm)
        if ready.mlp is None:
            return attention
        if layer.parallel:
            if layer.mlp_norm is not layer.attn_norm:
                normed = backend.add_normalise(x, None, layer.mlp_norm)
            return attention + ready.mlp(normed)
        mlp = ready.mlp(backend.add_normalise(x, attention, layer.mlp_norm))
        return mlp if layer.post_mlp_norm is None else normalise(mlp, layer.post_mlp_norm)

    def _attention(self, ready: _Ready, index: int, x: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        spec, own = self._backend.spec, ready.layer.attention
        heads = ready.qkv(x).view(len(x), -1, spec.head_dim)  # [N, Hq + 2 Hkv, D]
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if own.norms_turned and own.rope is not None:
            q, k = self._backend.turn(q, k, self._backend.ropes[own.rope], batch.positions[: len(q)])
            own = replace(own, rope=None)
        if own.q_norm is not None and own.k_norm is not None:
            q, k = normalise_heads(q, own.q_norm), normalise_heads(k, own.k_norm)
        return ready.out(self._backend.attention(q, k, v, own, self._stored_at + index, batch, cache))


class _Ready:
    """A layer with its products ready to run."""

    def __init__(self, backend: TorchBackend, layer: Layer) -> None:
        self.layer = layer
        self.qkv, self.out = backend.linear(layer.attention.qkv), backend.linear(layer.attention.out)
        self.mlp: _ReadyMLP | _ReadyExperts | None = None
        if isinstance(layer.mlp, Experts):
            self.mlp = _ReadyExperts(backend, layer.mlp)
        elif layer.mlp is not None:
            self.mlp = _ReadyMLP(backend, layer.mlp)
        self.linears = [self.qkv, self.out, *(self.mlp.linears if self.mlp is not None else ())]


class _ReadyMLP:
    """x [N, d] -> [N, d]."""

    def __init__(self, backend: TorchBackend, mlp: MLP) -> None:
        self._backend, self._mlp = backend, mlp
        self._up, self._down = backend.linear(mlp.up), backend.linear(mlp.down)
        self.linears = [self._up, self._down]

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._backend.gate(self._up(x), self._mlp.activation, self._mlp.gated))


class _ReadyExperts:
    """x [N, d] -> [N, d]. Each expert runs once, over the tokens that go to it.

    A token's result depends on no other: its products are by rule, and what its experts say is added up in the
    order in which the router ranks them, in float32.
    """

    def __init__(self, backend: TorchBackend, experts: Experts) -> None:
        self._backend, self._router = backend, experts.router
        self._scores = backend.scores(experts.scores)
        self._shared = None if experts.shared is None else _ReadyMLP(backend, experts.shared)
        self._gated = experts.shared_gate is not None
        self._each = [_ReadyMLP(backend, mlp) for mlp in experts.each]
        dense = [] if self._shared is None else [self._shared]
        self.linears = [self._scores, *(linear for mlp in (*dense, *self._each) for linear in mlp.linears)]

    def __call__(self, x: Tensor) -> Tensor:
        experts, weights = self._backend.route(self._router, self._scores(x))
        of_tokens = self._run_experts(x, experts)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if self._shared is not None:
            total += self._shared(x).float() * (weights[:, -1:] if self._gated else 1)
        for rank in range(self._router.top_k):
            total += of_tokens[:, rank].float() * weights[:, rank, None]
        return total.to(x.dtype)

    def _run_experts(self, x: Tensor, experts: Tensor) -> Tensor:
        """What each of the tokens' experts [N, K] says of it, unweighted: [N, K, d]."""
        order = experts.flatten().argsort(stable=True)  # [P], pairs by expert
        counts = torch.bincount(experts.flatten(), minlength=len(self._each)).tolist()
        rows = torch.split(x[order // experts.shape[1]], counts)
        ran = [mlp(own) for mlp, own in zip(self._each, rows, strict=True) if len(own)]
        by_pair = x.new_empty(len(order), x.shape[1])
        by_pair[order] = torch.cat(ran)
        return by_pair.view(*experts.shape, x.shape[1])


class TorchHead(Head):
    """All logits, whatever is asked for."""

    def __init__(self, backend: TorchBackend, linear: Linear, norm: Norm | None, exact: bool) -> None:
        """exact: logits are scaled and capped as the model's are."""
        self.linear, self.norm = linear, norm
        self._backend = backend
        self._scale, self._softcap = (
            (backend.spec.logit_scale, backend.spec.logit_softcap) if exact else (1.0, None)
        )

    def logits(self, x: Tensor) -> Tensor:
        return self.logits_of(self.normed(x))

    def output(self, x: Tensor, full: Sequence[int]) -> HeadOutput:
        return self.output_of(self.logits(x))

    def top_k(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._backend.top_k(self.logits(x), count)

    def normed(self, x: Tensor) -> Tensor:
        """States [R, d] as the product reads them."""
        return x if self.norm is None else self._backend.add_normalise(x.contiguous(), None, self.norm)

    def logits_of(self, normed: Tensor) -> Tensor:
        """Logits [R, V] of normalised states [R, d]."""
        logits = self.linear(normed)
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._softcap is None else softcap(logits, self._softcap)

    def output_of(self, logits: Tensor) -> HeadOutput:
        """What all rows' logits [R, V] say."""
        return HeadOutput(*self._backend.argmax(logits), logits, range(len(logits)))


def attend(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [R, Hkv, M, D] (already scaled), keys and values [R, Hkv, T, D] -> [R, Hkv, M, D].

    mask: 0 or -inf, broadcast over heads, [R, 1, M, T]; cap: softcap on the scores (Gemma 2). sinks [Hkv, M]: of
    each query one score more, whose share goes to no value.
    """
    scores = torch.matmul(q, keys.transpose(2, 3))
    if cap is not None:
        scores = softcap(scores, cap)
    scores = scores + mask
    if sinks is not None:
        ends = sinks[None, :, :, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores.float(), ends), dim=-1)
    share = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : keys.shape[2]]
    return torch.matmul(share.to(values.dtype), values)


def causal_mask(positions: Tensor, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, -inf elsewhere; positions [R, M] of the queries -> [R, 1, M, keys]."""
    query = positions.unsqueeze(-1)
    key = torch.arange(keys, device=positions.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
    return mask.unsqueeze(1)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): Gemma 2's bound on scores and logits."""
    return torch.tanh(x / cap) * cap


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm or LayerNorm over the last axis, computed in float32 inside, in x's dtype outside."""
    if norm.kind == "layer":
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    if norm.weight.dtype == x.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return F.rms_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.eps).to(x.dtype)


def normalise_heads(x: Tensor, norm: Norm) -> Tensor:
    """x [N, H, D] normalised over each head, or over all together, as wide as the norm's weight is."""
    return normalise(x.reshape(len(x), -1, len(norm.weight)), norm).view(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864, halves layout) of the first R dims of x [N, H, D].

    cos, sin: [N, 1, R].
    """
    turned, rest = torch.split(x, [cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def route(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `TorchBackend.route`."""
    own, beside = torch.split(logits, [router.count, logits.shape[1] - router.count], dim=1)
    scores = own.sigmoid() if router.scores == "sigmoid" else own.softmax(dim=1)
    ranked = scores if router.correction is None else scores + router.correction
    if router.top_groups < router.groups:
        parts = ranked.view(len(ranked), router.groups, -1)
        of_groups = parts.topk(2).values.sum(dim=2)
        left = torch.ones_like(of_groups, dtype=torch.bool)
        left.scatter_(1, of_groups.topk(router.top_groups).indices, False)
        ranked = parts.masked_fill(left.unsqueeze(2), -torch.inf).flatten(1)
    experts = ranked.topk(router.top_k).indices
    weights = scores.gather(1, experts)
    if router.normalised:
        total = torch.zeros_like(weights[:, :1])
        for rank in range(router.top_k):  # in one order, however many tokens there are
            total = total + weights[:, rank, None]
        weights = weights / (total + TINY)
    return experts, torch.cat((weights * router.scale, beside.sigmoid()), dim=1)


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
        case "relu2":
            return F.relu(x).square()
