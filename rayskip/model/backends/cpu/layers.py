"""A decoder's layers as one C call: see library.py.

A call runs without the interpreter, so lanes do not wait for each other between a layer's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from ctypes import c_int64

from torch import Tensor

from rayskip.model.backends.cpu.library import LANES, LayersTask, NativeLayer, Product, threads
from rayskip.model.backends.cpu.ops import native_shape, native_step
from rayskip.model.backends.cpu.product import NativeProduct
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.ops import TokenBatch
from rayskip.model.spec import Layer, Rope, Spec

PRODUCTS = 4
"""Of a layer with a feed-forward."""


class NativeLayers:
    """Layers of the usual kind (see `are_usual`) over packed tokens, in one call.

    Bit-equal to running them operation by operation with the kernels of ops.py and product.py, but for the norms
    per head, which are torch's there.
    """

    def __init__(
        self,
        spec: Spec,
        layers: Seq[Layer],
        products: Seq[Seq[NativeProduct]],
        ropes: Mapping[str, Rope],
        stored_at: int,
    ) -> None:
        """products: of each layer, qkv, out, up and down; if none has a feed-forward the first two. stored_at:
        the cache's layer for the first of them."""
        self._spec = spec
        self._stored_at = stored_at
        self._kept = layers, products, ropes  # the kernels read their memory
        self._library = products[0][0].library
        self._layers = (NativeLayer * len(layers))(
            *(_native(layer, own, ropes) for layer, own in zip(layers, products, strict=True))
        )

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        """See Decoder.run_layers."""
        if self._library.run_layers(ctypes.byref(self.task(x, batch, cache, first, last))):
            raise MemoryError(f"no memory for {len(x)} tokens on their way through the layers")
        return x

    def task(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> LayersTask:
        """What kernels.c needs for `run`; valid while all of it lives."""
        width = self._spec.hidden
        if x.dtype != cache.keys.dtype or x.shape[1:] != (width,) or not x.is_contiguous():
            raise ValueError(f"{x.dtype} {tuple(x.shape)} for contiguous {cache.keys.dtype} [N, {width}]")
        active = None
        if (counts := batch.active) is not None:
            active = batch.once("active", lambda: (c_int64 * len(counts))(*counts))
        return LayersTask(
            self._layers,
            first,
            last,
            native_shape(self._spec, None),
            native_step(batch, cache),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            cache.table[self._stored_at].data_ptr(),
            cache.table.stride(0),
            x.data_ptr(),
            len(x),
            None if active is None else ctypes.addressof(active),
            threads(),
        )


def are_usual(spec: Spec, layers: Seq[Layer]) -> bool:
    """Whether kernels.c has all that the layers do: RMS norms before attention and a SiLU-gated feed-forward, each
    added to its own input."""
    inner = {layer.down.weight.shape[1] for layer in layers}
    return (
        spec.gated
        and spec.activation == "silu"
        and not spec.parallel
        and len(inner) == 1
        and not any(width % LANES for width in (spec.hidden, *inner))
        and all(_is_usual(layer) for layer in layers)
    )


def _is_usual(layer: Layer) -> bool:
    per_head = [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    dtype = layer.qkv.weight.dtype
    return (
        layer.post_attn_norm is None
        and layer.post_mlp_norm is None
        and len(per_head) != 1
        and all(
            norm.kind == "rms" and norm.weight.dtype == dtype
            for norm in (layer.attn_norm, layer.mlp_norm, *per_head)
        )
    )


def _native(layer: Layer, products: Seq[NativeProduct], ropes: Mapping[str, Rope]) -> NativeLayer:
    rope = None if layer.rope is None else ropes[layer.rope]
    return NativeLayer(
        *(product.struct for product in products),
        *(Product() for _ in range(PRODUCTS - len(products))),
        layer.attn_norm.weight.data_ptr(),
        layer.mlp_norm.weight.data_ptr(),
        *(None if norm is None else norm.weight.data_ptr() for norm in (layer.q_norm, layer.k_norm)),
        *((None, None, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1])),
        layer.window or 0,
        layer.attn_norm.eps,
        layer.mlp_norm.eps,
        0.0 if layer.q_norm is None else layer.q_norm.eps,
    )
