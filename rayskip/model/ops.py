"""What a decoder computes between its matrix products, in plain torch: norms, activations, attention.

Runs on every device, and is what the native CPU kernels (backends/cpu) are checked against. Attention reads keys
in groups of rows of one shape, see `Group`.

Shapes: N tokens, d hidden, Hq = Hkv * G query heads, D head dim, T key positions read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayskip.model.cache.kv_cache import KVCache, Layout
from rayskip.model.spec import Activation, Norm, Rope, Spec

Made = TypeVar("Made")


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


@dataclass(frozen=True)
class Paths:
    """Where keys lie of tokens in the branches of a draft, whose place in the cache is not their position (tree
    attention).

    places [N]: of each token's own keys. starts [N]: positions before it are their own places; from there on,
    `after` [N, P] tells them, up to the token's own. A token that is in no branch starts past its position.
    """

    places: Tensor
    starts: Tensor
    after: Tensor

    def keys(self, positions: Tensor, start: int, stop: int, count: int) -> Tensor:
        """Places of positions 0 to count of tokens [start, stop): [stop - start, count]."""
        own, after = self.starts[start:stop, None], self.after[start:stop]
        every = torch.arange(count, device=after.device).expand(stop - start, count)
        on_path = (every >= own) & (every <= positions[start:stop, None])
        return torch.where(on_path, after.gather(1, (every - own).clamp(0, after.shape[1] - 1)), every)


@dataclass
class TokenBatch:
    """Packed tokens of one step, deepest first: ids, positions and slots [N], the groups that cover them in order,
    and the tokens whose logits are wanted (indices [R]).

    active: how many tokens each layer runs, always the first ones; None: all, in every layer. paths: where keys
    lie; None: each at its position.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[Group]
    outputs: Tensor
    active: list[int] | None = None
    paths: Paths | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def places(self) -> Tensor:
        """Where in its slot each token's keys and values lie, [N]."""
        return self.positions if self.paths is None else self.paths.places

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made for `key` once a step, by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def mask(self, index: int, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """0 where a query may look, -inf elsewhere: [rows, 1, width * heads, T]."""
        group = self.groups[index]
        positions = self.positions[group.start : group.stop].view(group.rows, group.width)
        return causal_mask(positions.repeat_interleave(heads, dim=1), group.keys, window, dtype)


class Ops:
    """The operations of one decoder. Holds no state between calls. Tokens lie one after another in every tensor;
    a token's own elements are contiguous."""

    name = "torch"
    layout = Layout()
    """How the cache's pages are laid out for `attention`."""

    def __init__(self, spec: Spec, fallback: str | None = None) -> None:
        """fallback: why something faster does not run, in words for whoever chose model and machine."""
        self.spec = spec
        self.fallback = fallback

    def add_normalise(self, x: Tensor, branch: Tensor | None, norm: Norm) -> Tensor:
        """Add branch to x in place, and return that normalised; all [N, d]."""
        if branch is not None:
            x += branch
        return self.normalise(x, norm)

    def normalise(self, x: Tensor, norm: Norm) -> Tensor:
        """x [N, d] normalised."""
        return normalise(x, norm)

    def gate(self, up: Tensor) -> Tensor:
        """The feed-forward's non-linearity: gate and up side by side [N, 2f] (or up alone [N, f]) -> [N, f]."""
        if not self.spec.gated:
            return activate(up, self.spec.activation)
        gate, up = up.chunk(2, dim=-1)
        return activate(gate, self.spec.activation) * up

    def likeliest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Places of the `count` highest of logits [N, V], and their probabilities, both [N, count], descending."""
        best = torch.softmax(logits.float(), dim=-1).topk(count)
        return best.indices, best.values

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rope | None,
        layer: int,
        window: int | None,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        """Turn q [N, Hq, D] and k [N, Hkv, D], store k and v [N, Hkv, D] in the cache, attend: [N, Hq * D].

        N: the layer's active tokens, the batch's first ones; they end with a group. May write into q and k.
        window: see `Layer`.
        """
        q = self.turn_and_store(q, k, v, rope, layer, batch, cache) * self.spec.scale
        parts = [
            self._attend_group(q[group.start : group.stop], layer, window, batch, index, cache)
            for index, group in enumerate(batch.groups)
            if group.start < len(q)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def turn_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rope | None,
        layer: int,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        """Turn q and k, store k and v in the cache, return q; as in `attention`."""
        if rope is not None:
            q, k = self.turn(q, k, rope, batch.positions[: len(q)])
        cache.write(layer, batch.slots[: len(q)], batch.places[: len(q)], k, v)
        return q

    def turn(self, q: Tensor, k: Tensor, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q [N, Hq, D] and k [N, Hkv, D] to their positions [N]."""
        cos, sin = rope.cos[positions].unsqueeze(1), rope.sin[positions].unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def _attend_group(
        self, q: Tensor, layer: int, window: int | None, batch: TokenBatch, index: int, cache: KVCache
    ) -> Tensor:
        """q [rows * width, Hq, D] of one group -> [rows * width, Hq * D].

        Queries of one key-value head are stacked, so that its keys are read once.
        """
        spec, group = self.spec, batch.groups[index]
        if batch.paths is not None and group.width == 1:  # drafted tokens come one by one
            places = batch.paths.keys(batch.positions, group.start, group.stop, group.keys)
            keys, values = cache.read_places(layer, group.slots, places)  # [rows, Hkv, T, D]
        else:
            keys, values = cache.read(layer, group.slots, group.keys)
        per_head = spec.heads // spec.kv_heads
        q = q.view(group.rows, group.width, spec.kv_heads, per_head, spec.head_dim).transpose(1, 2)
        q = q.reshape(group.rows, spec.kv_heads, group.width * per_head, spec.head_dim)
        mask = batch.once(("mask", index, window), lambda: batch.mask(index, window, per_head, q.dtype))
        out = attend(q, keys, values, mask, spec.attn_softcap)  # [rows, Hkv, width * G, D]
        out = out.view(group.rows, spec.kv_heads, group.width, per_head, spec.head_dim).transpose(1, 2)
        return out.reshape(group.rows * group.width, spec.heads * spec.head_dim)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """q [R, Hkv, M, D] (already scaled), keys and values [R, Hkv, T, D] -> [R, Hkv, M, D].

    mask: 0 or -inf, broadcast over heads, [R, 1, M, T]; cap: softcap on the scores (Gemma 2).
    """
    scores = torch.matmul(q, keys.transpose(2, 3))
    if cap is not None:
        scores = softcap(scores, cap)
    share = torch.softmax(scores + mask, dim=-1, dtype=torch.float32)
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
