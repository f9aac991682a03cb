"""A decoder's layers as one C call: see library.py.

A call runs without the interpreter, so workers do not wait for each other between a layer's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_int64

from torch import Tensor

from rayskip.model.backends.base import Stack
from rayskip.model.backends.cpu.library import (
    LANES,
    LayersTask,
    NativeLayer,
    Product,
    Shape,
    StepTokens,
    threads,
)
from rayskip.model.backends.cpu.product import CpuLinear
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.spec import Layer, Rope, Spec
from rayskip.model.token_batch import TokenBatch

PRODUCTS = 4
"""Of a layer with an MLP."""


class CpuStack(Stack):
    """Layers that `fits`, over packed tokens, in one call.

    Bit-equal to running them operation by operation with the other kernels, but for the norms per head, which are
    torch's there.
    """

    def __init__(
        self,
        spec: Spec,
        layers: Sequence[Layer],
        linears: Sequence[Sequence[CpuLinear]],
        ropes: Mapping[str, Rope],
        stored_at: int,
    ) -> None:
        """linears: of each layer, its products."""
        self.linears = [linear for own in linears for linear in own]
        self._spec = spec
        self._stored_at = stored_at
        self._kept = layers, linears, ropes  # the kernels read their memory
        self._library = linears[0][0].library
        self._layers = (NativeLayer * len(layers))(
            *(_native(layer, own, ropes) for layer, own in zip(layers, linears, strict=True))
        )

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        if len(x) and self._library.run_layers(ctypes.byref(self.task(x, batch, cache, first, last))):
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
            attention_shape(self._spec, None),
            step_tokens(batch, cache),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            cache.table[self._stored_at].data_ptr(),
            cache.table.stride(0),
            x.data_ptr(),
            len(x),
            None if active is None else ctypes.addressof(active),
            threads(),
        )


def fits(layers: Sequence[Layer], spec: Spec) -> bool:
    """Whether kernels.c has all that the layers do: RMS norms before attention and a SiLU-gated MLP (or none), each
    added to its own input."""
    widths = {layer.attention.qkv.weight.shape[1] for layer in layers}
    inner = {layer.mlp.down.weight.shape[1] for layer in layers if layer.mlp is not None}
    with_mlp = sum(layer.mlp is not None for layer in layers)
    return (
        len(inner) == (1 if with_mlp else 0)
        and with_mlp in (0, len(layers))
        and not any(width % LANES for width in (*widths, *inner))
        and all(_fits(layer, spec) for layer in layers)
    )


def _fits(layer: Layer, spec: Spec) -> bool:
    attention, mlp = layer.attention, layer.mlp
    per_head = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    before = [layer.attn_norm, *([] if mlp is None else [layer.mlp_norm])]
    dtype = attention.qkv.weight.dtype
    return (
        layer.post_attn_norm is None
        and layer.post_mlp_norm is None
        and not layer.parallel
        and (mlp is None or (mlp.gated and mlp.activation == "silu"))
        and len(per_head) != 1
        and not attention.norms_turned
        and not any(len(norm.weight) != spec.head_dim for norm in per_head)
        and all(
            norm is not None and norm.kind == "rms" and norm.weight.dtype == dtype
            for norm in (*before, *per_head)
        )
    )


def attention_shape(spec: Spec, window: int | None) -> Shape:
    """What kernels.c knows of a layer's attention."""
    return Shape(spec.heads, spec.kv_heads, spec.head_dim, window or 0, spec.scale, spec.attn_softcap or 0.0)


def step_tokens(batch: TokenBatch, cache: KVCache) -> StepTokens:
    """What kernels.c knows of a step's tokens; valid while `batch` lives."""
    paths = batch.paths
    branches = (
        (None, None, 0)
        if paths is None
        else (paths.starts.data_ptr(), paths.after.data_ptr(), paths.after.shape[1])
    )
    return StepTokens(
        batch.table_rows.data_ptr(),
        batch.positions.data_ptr(),
        batch.places.data_ptr(),
        *branches,
        cache.table.shape[2],
    )


def _native(layer: Layer, linears: Sequence[CpuLinear], ropes: Mapping[str, Rope]) -> NativeLayer:
    attention = layer.attention
    rope = None if attention.rope is None else ropes[attention.rope]
    attn_norm, mlp_norm = layer.attn_norm, layer.mlp_norm
    assert attn_norm is not None
    return NativeLayer(
        *(linear.struct for linear in linears),
        *(Product() for _ in range(PRODUCTS - len(linears))),
        attn_norm.weight.data_ptr(),
        None if mlp_norm is None else mlp_norm.weight.data_ptr(),
        *(None if norm is None else norm.weight.data_ptr() for norm in (attention.q_norm, attention.k_norm)),
        *((None, None, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1])),
        attention.window or 0,
        attn_norm.eps,
        0.0 if mlp_norm is None else mlp_norm.eps,
        0.0 if attention.q_norm is None else attention.q_norm.eps,
    )
