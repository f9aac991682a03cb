"""The one forward: a packed list of tokens through a decoder, over the KV cache.

Prefill, decode and verification are the same call; they differ in how many query tokens a row brings.
Knows neither sampling nor scheduling.

Shapes: N tokens, d hidden, Hq query heads, Hkv key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from rayskip.model.backends.cpu import library
from rayskip.model.backends.cpu.layers import NativeLayers, are_usual
from rayskip.model.backends.cpu.ops import native_ops
from rayskip.model.backends.cpu.product import BestOutput, best_output
from rayskip.model.backends.cuda.attention import varlen_ops
from rayskip.model.backends.cuda.compiled import compile_pieces
from rayskip.model.backends.cuda.graphs import GraphedLayers, cuda_graphs
from rayskip.model.backends.linear import Linear, row_rule
from rayskip.model.backends.scores import Scores, best_logits
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.ops import Ops, TokenBatch, normalise, softcap
from rayskip.model.spec import Layer, Rope, Spec, Weights

MOST_PACKED = 2_000_000_000
"""Weights of all layers up to which they are kept a second time, in twelve bits each."""


class Decoder:
    """A model that runs. Holds no state between calls; the caller owns the cache.

    ops: what computes between the products; by default the fastest that serves the model here.
    folder: where the weights came from, for parts that were trained for them.
    """

    def __init__(
        self, spec: Spec, weights: Weights, ops: Ops | None = None, folder: Path | None = None
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        fastest = varlen_ops if self.device.type == "cuda" else native_ops
        self.ops = ops or fastest(spec, self.dtype, self.device)
        self.head = Linear(weights.head)
        self._best = best_output(self.head.native, weights.head) if spec.logit_softcap is None else None
        self.layers = [_PackedLayer(layer) for layer in weights.layers]
        self._pack()
        self.row_rule = row_rule(self._linears())
        for linear in self._linears():
            linear.rule = self.row_rule
        self._ropes = {
            name: Rope(rope.cos.to(self.device, self.dtype), rope.sin.to(self.device, self.dtype))
            for name, rope in weights.ropes.items()
        }
        self.fused = self.fuse(weights.layers, [layer.linears for layer in self.layers])
        self.graphs: GraphedLayers | None = None
        slower = [self.ops.fallback]
        if self.device.type == "cuda" and self.ops.name == "varlen":
            self.graphs = GraphedLayers(cuda_graphs())
            slower.append(compile_pieces(self.ops, spec, weights, self._ropes))
        self.warnings = [reason for reason in slower if reason]
        """What whoever chose model and machine should know."""

    def fuse(self, layers: Seq[Layer], linears: Seq[Seq[Linear]], stored_at: int = 0) -> NativeLayers | None:
        """Layers as one call, where the kernels have everything they do; see NativeLayers."""
        native = [[linear.native for linear in own if linear.native is not None] for own in linears]
        all_native = all(len(products) == len(own) for products, own in zip(native, linears, strict=True))
        if self.ops.name != "native" or not all_native or not are_usual(self.spec, layers):
            return None
        return NativeLayers(self.spec, layers, native, self._ropes, stored_at)

    def _pack(self) -> None:
        """Keep the layers' weights in twelve bits too, if the memory is little: a few rows take as long as reading
        them, and that is a quarter less."""
        native = [
            linear.native for layer in self.layers for linear in layer.linears if linear.native is not None
        ]
        if sum(product.out_features * product.in_features for product in native) <= MOST_PACKED:
            for product in native:
                product.pack()

    def _linears(self) -> list[Linear]:
        return [self.head, *(linear for layer in self.layers for linear in layer.linears)]

    def use_threads(self, count: int) -> None:
        """What the calling thread computes takes so many threads.

        Torch's operations take one where the products are the kernels': what is left to them is small, and a thread
        of torch's that has nothing to do spins on a core that a kernel's thread needs.
        """
        library.use_threads(count)
        torch.set_num_threads(1 if self.head.native is not None else count)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """`use_threads`, for a while, on a thread that has not called it."""
        before = torch.get_num_threads()
        self.use_threads(count)
        try:
            yield
        finally:
            library.use_threads(None)
            torch.set_num_threads(before)

    def first_layers(self, count: int) -> Decoder:
        """The same model, tensors shared, cut off after `count` layers."""
        shallow = copy(self)
        shallow.layers = self.layers[:count]
        return shallow

    def rope(self, name: str | None) -> Rope | None:
        """The rotary table of a layer kind, on the device; None for learned positions."""
        return None if name is None else self._ropes[name]

    def new_cache(self, extra_layers: int = 0) -> KVCache:
        """An empty cache; extra_layers: more layers than the model has, for what a drafter keeps."""
        return KVCache(self.spec, len(self.layers) + extra_layers, self.dtype, self.device, self.ops.layout)

    @torch.inference_mode()
    def hidden(self, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Run every layer on its active tokens and write their keys and values into `cache`; the outputs' states
        after the last layer, [R, d]."""
        return self.run_layers(self.embed(batch), batch, cache, 0, len(self.layers))[batch.outputs]

    def embed(self, batch: TokenBatch) -> Tensor:
        """The tokens' states before the first layer, [N, d]."""
        x = self.weights.embed[batch.token_ids]
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if self.weights.positions is not None:
            x = x + self.weights.positions[batch.positions]
        return x

    def run_layers(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        """The tokens' states [N, d] after layers [first, last), in place.

        A token passes a layer it skips unchanged (SkipDecode, arXiv 2307.02628, section 3).
        """
        if self.fused is not None and len(x):
            return self.fused.run(x, batch, cache, first, last)
        if (
            self.graphs is not None
            and (done := self.graphs.run(self.run_each, x, batch, cache, first, last)) is not None
        ):
            return done
        return self.run_each(x, batch, cache, first, last)

    def run_each(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        """`run_layers`, operation by operation."""
        branch: Tensor | None = None  # what the last layer adds to x; the next norm adds it on its way
        for index in range(first, last):
            count = len(x) if batch.active is None else batch.active[index]
            if branch is not None and len(branch) != count:
                x[: len(branch)] += branch
                branch = None
            if count:
                branch = self._run_layer(index, self.layers[index], x[:count], branch, batch, cache)
        if branch is not None:
            x[: len(branch)] += branch
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits [R, V] of states [R, d] after the last layer."""
        return self._logits(self._normed(x))

    @torch.inference_mode()
    def scores(self, x: Tensor, full: Seq[int]) -> Scores:
        """The highest logit of states [R, d] after the last layer, and all logits of the rows `full` at least."""
        others = len(x) - len(full)
        if self._best is None or not others or (full and others > self._best.screened_beside):
            return Scores.of_all(self.logits(x))
        x = self._normed(x)
        if not full:
            return Scores(*self._best_outputs(x, self._best), x.new_empty(0, self.spec.vocab), full)
        logits, best, at = self._logits(x[full]), torch.empty(len(x)), torch.empty(len(x), dtype=torch.long)
        rest = sorted(set(range(len(x))).difference(full))
        best[full], at[full] = best_logits(logits)
        best[rest], at[rest] = self._best_outputs(x[rest], self._best)
        return Scores(best, at, logits, full)

    def _best_outputs(self, x: Tensor, output: BestOutput) -> tuple[Tensor, Tensor]:
        """`best_logits` of normalised states [R, d]; the kernels may leave some rows to all their logits."""
        best, at = output(x)
        if unknown := [row for row, place in enumerate(at.tolist()) if place < 0]:
            best[unknown], at[unknown] = best_logits(self._logits(x[unknown]))
        return best, at

    def _normed(self, x: Tensor) -> Tensor:
        return self.ops.add_normalise(x.contiguous(), None, self.weights.final_norm)

    def _logits(self, normed: Tensor) -> Tensor:
        logits = self.head(normed)
        return logits if self.spec.logit_softcap is None else softcap(logits, self.spec.logit_softcap)

    def _run_layer(
        self,
        index: int,
        layer: _PackedLayer,
        x: Tensor,
        branch: Tensor | None,
        batch: TokenBatch,
        cache: KVCache,
    ) -> Tensor:
        """Add `branch` to x in place, then run one layer on it: what the layer adds to x [N, d]."""
        own, ops = layer.own, self.ops
        normed = ops.add_normalise(x, branch, own.attn_norm)
        attention = self._attention(index, layer, normed, batch, cache)
        if own.post_attn_norm is not None:
            attention = normalise(attention, own.post_attn_norm)
        if self.spec.parallel:
            return attention + self._mlp(layer, normalise(x, own.mlp_norm))
        mlp = self._mlp(layer, ops.add_normalise(x, attention, own.mlp_norm))
        return mlp if own.post_mlp_norm is None else normalise(mlp, own.post_mlp_norm)

    def _attention(
        self, index: int, layer: _PackedLayer, x: Tensor, batch: TokenBatch, cache: KVCache
    ) -> Tensor:
        spec, own = self.spec, layer.own
        heads = layer.qkv(x).view(len(x), -1, spec.head_dim)  # [N, Hq + 2 Hkv, D]
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if own.q_norm is not None and own.k_norm is not None:
            q, k = normalise(q, own.q_norm), normalise(k, own.k_norm)
        return layer.out(self.ops.attention(q, k, v, self.rope(own.rope), index, own.window, batch, cache))

    def _mlp(self, layer: _PackedLayer, x: Tensor) -> Tensor:
        return layer.down(self.ops.gate(layer.up(x)))


class _PackedLayer:
    """A layer with its four products ready to run."""

    def __init__(self, layer: Layer) -> None:
        self.own = layer
        self.qkv, self.out = Linear(layer.qkv), Linear(layer.out)
        self.up, self.down = Linear(layer.up), Linear(layer.down)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.out, self.up, self.down
