"""A decoder's layers as one C call: see library.py.

A call runs without the interpreter, so workers do not wait for each other between a layer's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_int64

from torch import Tensor

from rayskip.model.backends.base import Stack
from rayskip.model.backends.cpu.library import (
    LANES,
    LayersTask,
    NativeExperts,
    NativeLayer,
    NativeRouter,
    Product,
    Shape,
    StepTokens,
    threads,
)
from rayskip.model.backends.cpu.product import CpuLinear
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.spec import ClampedSwiGLU, Experts, Gate, Layer, Rope, Router, Spec
from rayskip.model.token_batch import TokenBatch


class CpuStack(Stack):
    """Layers that `fits`, over packed tokens, in one call.

    Bit-equal to running them operation by operation with the other kernels, but for the norms per head, which are
    torch's there.
    """

    def __init__(
        self,
        spec: Spec,
        layers: Sequence[Layer],
        linears: Sequence[CpuLinear],
        ropes: Mapping[str, Rope],
        stored_at: int,
    ) -> None:
        """linears: the layers' products, in `TorchStack`'s order."""
        self.linears = linears
        self._spec = spec
        self._stored_at = stored_at
        self._kept = layers, ropes  # the kernels read their memory
        self._library = linears[0].library
        each = iter(linears)
        self._layers = (NativeLayer * len(layers))(*(_native(layer, each, ropes) for layer in layers))

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
            attention_shape(self._spec, None, None),
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


def fits(layers: Sequence[Layer]) -> bool:
    """Whether kernels.c has all that the layers do: RMS norms before attention and gated MLPs or experts (or none),
    each added to its own input."""
    return all(_fits(layer) for layer in layers)


def _fits(layer: Layer) -> bool:
    attention, mlp = layer.attention, layer.mlp
    of_heads = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    before = [layer.attn_norm, *([] if mlp is None else [layer.mlp_norm])]
    dtype = attention.qkv.weight.dtype
    widths = [len(norm.weight) for norm in (*before, *of_heads) if norm is not None]
    gated = True
    if isinstance(mlp, Experts):
        widths.append(mlp.down.weight.shape[2])
        gated = gate_numbers(mlp.activation) is not None
    dense = mlp.shared if isinstance(mlp, Experts) else mlp
    if dense is not None:
        widths.append(dense.down.weight.shape[1])
        gated = gated and dense.gated and gate_numbers(dense.activation) is not None
    return (
        layer.post_attn_norm is None
        and layer.post_mlp_norm is None
        and not layer.parallel
        and gated
        and len(of_heads) != 1
        and not attention.norms_turned
        and not any(width % LANES for width in widths)
        and all(
            norm is not None and norm.kind == "rms" and norm.weight.dtype == dtype
            for norm in (*before, *of_heads)
        )
    )


def gate_numbers(activation: Gate) -> tuple[float, float] | None:
    """(alpha, limit) as in `gate_one` of kernels.c; None where it has no such gate."""
    if isinstance(activation, ClampedSwiGLU):
        return activation.alpha, activation.limit
    return (1.0, 0.0) if activation == "silu" else None


def attention_shape(spec: Spec, window: int | None, sinks: Tensor | None) -> Shape:
    """What kernels.c knows of a layer's attention; valid while `sinks` lives."""
    return Shape(
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        window or 0,
        spec.scale,
        spec.attn_softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
    )


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


def _native(layer: Layer, linears: Iterator[CpuLinear], ropes: Mapping[str, Rope]) -> NativeLayer:
    """linears: the layer's products are taken from there."""
    attention, mlp, mlp_norm = layer.attention, layer.mlp, layer.mlp_norm
    rope = None if attention.rope is None else ropes[attention.rope]
    attn_norm = layer.attn_norm
    assert attn_norm is not None
    norms = (attention.q_norm, attention.k_norm)
    qkv, out = next(linears).struct, next(linears).struct
    scores = next(linears) if isinstance(mlp, Experts) else None
    dense = mlp.shared if isinstance(mlp, Experts) else mlp
    up, down = (Product(), Product()) if dense is None else (next(linears).struct, next(linears).struct)
    experts = None
    if isinstance(mlp, Experts) and scores is not None:
        experts = ctypes.pointer(_native_experts(mlp, scores, linears))
    return NativeLayer(
        qkv,
        out,
        up,
        down,
        experts,
        attn_norm.weight.data_ptr(),
        None if mlp_norm is None else mlp_norm.weight.data_ptr(),
        *(None if norm is None else norm.weight.data_ptr() for norm in norms),
        *((None, None) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr())),
        None if attention.sinks is None else attention.sinks.data_ptr(),
        *(0 if norm is None else len(norm.weight) for norm in norms),
        0 if rope is None else rope.cos.shape[1],
        attention.window or 0,
        attn_norm.eps,
        0.0 if mlp_norm is None else mlp_norm.eps,
        0.0 if attention.q_norm is None else attention.q_norm.eps,
        *((0.0, 0.0) if dense is None else gate_numbers(dense.activation) or ()),
    )


def _native_experts(experts: Experts, scores: CpuLinear, linears: Iterator[CpuLinear]) -> NativeExperts:
    own = [(next(linears).struct, next(linears).struct) for _ in experts.each]
    products = ((Product * len(own))(*structs) for structs in zip(*own, strict=True))
    router = native_router(experts.router, gated=experts.shared_gate is not None)
    return NativeExperts(router, scores.struct, *products, *(gate_numbers(experts.activation) or ()))


def native_router(router: Router, gated: bool) -> NativeRouter:
    """gated: see experts.h. Valid while `router` lives."""
    return NativeRouter(
        None if router.correction is None else router.correction.data_ptr(),
        router.count,
        router.top_k,
        router.groups,
        router.top_groups,
        router.scores == "sigmoid",
        router.normalised,
        gated,
        router.scale,
    )
