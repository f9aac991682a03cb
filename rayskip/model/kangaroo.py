"""Kangaroo's draft model (arXiv 2404.18911, section 3): the decoder's own first layers, one attention layer trained
on top of them, and the decoder's own head.

The adapter is RMSNorm, causal attention of the model's own shape, residual, RMSNorm; no feed-forward. Its keys and
values are one more layer of the KV cache. Its head scores the tokens on a list alone (FR-Spec, arXiv 2502.14856).

Shapes: N tokens, d hidden, Hq query heads, D head dim, V' listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rayskip.model.backends.cpu.draft import NativeDraft
from rayskip.model.backends.cpu.library import LANES
from rayskip.model.backends.cpu.product import RoughProduct
from rayskip.model.backends.linear import Linear, rough_linear
from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.ops import TokenBatch, normalise
from rayskip.model.spec import Dense, Layer, Norm
from rayskip.model.trained import Label, check_shapes, load_trained


@dataclass(frozen=True)
class KangarooLabel(Label):
    """exit_layer: layers before the adapter."""

    KIND: ClassVar[str] = "kangaroo"

    exit_layer: int


class Kangaroo:
    """The adapter on a decoder, for drafting. Shared by lanes: it holds no state between calls."""

    def __init__(self, decoder: Decoder, label: KangarooLabel, tensors: dict[str, Tensor]) -> None:
        self.exit_layer, self.agreement = label.exit_layer, label.agreement
        self._decoder = decoder
        self._cache_layer = len(decoder.layers)
        own = {name: tensor.to(decoder.device) for name, tensor in tensors.items()}
        self.token_ids = own["token_ids"].long()
        like = decoder.layers[label.exit_layer].own
        eps, dtype = like.attn_norm.eps, decoder.dtype
        self._attn_norm = Norm("rms", own["attn_norm"].to(dtype), None, eps)
        self._final_norm = Norm("rms", own["final_norm"].to(dtype), None, eps)
        qkv, out = Dense(own["qkv"].to(dtype)), Dense(own["out"].to(dtype))
        self._qkv, self._out = Linear(qkv), Linear(out)
        for linear in (self._qkv, self._out):
            if linear.native is not None:
                linear.native.pack()
        self._head = rough_linear(Dense(decoder.weights.head.weight[self.token_ids]))
        self._rope = like.rope
        # the feed-forward that it does not have is only looked at: its kind is the decoder's
        layer = Layer(qkv, out, like.up, like.down, self._attn_norm, like.mlp_norm, rope=like.rope)
        self._fused = fused = decoder.fuse([layer], [[self._qkv, self._out]], self._cache_layer)
        self._native = None
        if (
            decoder.fused is not None
            and fused is not None
            and isinstance(self._head, RoughProduct)
            and label.tokens % LANES == 0
        ):
            self._native = NativeDraft(decoder.fused, self.exit_layer, fused, self._final_norm, self._head)

    def step(
        self, batch: TokenBatch, cache: KVCache, after: Seq[int], count: int
    ) -> tuple[Tensor, list[list[int]], list[list[float]]]:
        """Run N tokens of a draft, and say what may follow some of them: the tokens `after`, by index.

        Stores their keys and values, those of the adapter too. Returns the states after the exit layer, [N, d], and
        of each of `after` the `count` likeliest next tokens, with their probabilities on the list, descending.
        """
        x = self._decoder.embed(batch)
        if self._native is not None and len(x):
            places, chances = self._native.run(x, batch, cache, after, count)
        else:
            x = self._decoder.run_layers(x, batch, cache, 0, self.exit_layer)
            adapted = self._attend(x, batch, cache)
            if not after:
                return x, [], []
            rows = to_device(after, torch.long, x.device)
            normed = self._decoder.ops.add_normalise(adapted[rows], None, self._final_norm)
            places, chances = self._decoder.ops.likeliest(self._head(normed), count)
        return x, self.token_ids[places].tolist(), chances.tolist()

    def _attend(self, x: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Of tokens at states x [N, d] after the first layers: states after the adapter's attention, [N, d]."""
        if self._fused is not None and len(x):
            return self._fused.run(x.clone(), batch, cache, 0, 1)
        spec = self._decoder.spec
        heads = self._qkv(normalise(x, self._attn_norm)).view(len(x), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        rope = self._decoder.rope(self._rope)
        attended = self._decoder.ops.attention(q, k, v, rope, self._cache_layer, None, batch, cache)
        return x + self._out(attended)


def adapter_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors for a model, without its token list."""
    spec = decoder.spec
    inner = spec.heads * spec.head_dim
    return {
        "attn_norm": (spec.hidden,),
        "final_norm": (spec.hidden,),
        "qkv": (inner + 2 * spec.kv_heads * spec.head_dim, spec.hidden),
        "out": (spec.hidden, inner),
    }


def load_kangaroo(decoder: Decoder, folder: Path | None) -> Kangaroo:
    """Read an adapter; without a folder, the one that ships for this model. Raises ModelError as `load_trained`."""
    label, tensors, found = load_trained(KangarooLabel, decoder.folder, folder)
    check_shapes(tensors, {**adapter_shapes(decoder), "token_ids": (label.tokens,)}, found)
    return Kangaroo(decoder, label, tensors)
