"""The operations between the matrix products as C kernels, for CPU: see library.py."""

from __future__ import annotations

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from rayskip.model.backends.cpu.library import DEFINES, LANES, Shape, Step, kernels, loaded
from rayskip.model.cache.kv_cache import KVCache, Layout, Panels
from rayskip.model.ops import Ops, TokenBatch
from rayskip.model.spec import Norm, Rope, Spec


class NativeOps(Ops):
    """What the kernels do not cover (LayerNorm, other activations) is torch's, by inheritance."""

    name = "native"

    def __init__(self, spec: Spec, library: ctypes.CDLL, fallback: str | None = None) -> None:
        super().__init__(spec, fallback)
        self._library = library
        panels = Panels(library.panel_columns(), library.panel_depth())
        self.layout = Layout(library.page_positions(), panels)

    def add_normalise(self, x: Tensor, branch: Tensor | None, norm: Norm) -> Tensor:
        if norm.kind != "rms" or norm.weight.dtype != x.dtype or x.shape[-1] % LANES:
            return super().add_normalise(x, branch, norm)
        out = torch.empty_like(x)
        added = None if branch is None else branch.data_ptr()
        self._library.add_rms_norm(
            x.data_ptr(), added, norm.weight.data_ptr(), out.data_ptr(), *x.shape, x.shape[-1], norm.eps
        )
        return out

    def gate(self, up: Tensor) -> Tensor:
        width = up.shape[1] // 2
        if not self.spec.gated or self.spec.activation != "silu" or width % LANES:
            return super().gate(up)
        out = up.new_empty(len(up), width)
        stride = (c_int64 * 2)(2 * width, width)
        self._library.silu_gate(up.data_ptr(), out.data_ptr(), len(up), width, stride)
        return out

    def likeliest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if logits.dtype not in DEFINES or logits.shape[1] % LANES:
            return super().likeliest(logits, count)
        logits = logits.contiguous()
        places = logits.new_zeros(len(logits), count, dtype=torch.long)
        chances = logits.new_empty(len(logits), count, dtype=torch.float32)
        self._library.likeliest(
            logits.data_ptr(), *logits.shape, count, places.data_ptr(), chances.data_ptr()
        )
        return places, chances

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
        shape, step = native_shape(self.spec, window), native_step(batch, cache)
        at, around = ctypes.byref(step), ctypes.byref(shape)
        stored = cache.keys.data_ptr(), cache.values.data_ptr(), cache.table[layer].data_ptr()
        strides = (c_int64 * 3)(q.stride(0), k.stride(0), v.stride(0))
        table = (
            (None, None, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1])
        )
        self._library.rotate_and_store(
            around, q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, *table, at, *stored, len(q)
        )
        out = q.new_empty(len(q), self.spec.heads * self.spec.head_dim)
        if self._library.attend(around, at, q.data_ptr(), q.stride(0), *stored, out.data_ptr(), len(q)):
            raise MemoryError("no memory for attention scores")
        return out


def native_shape(spec: Spec, window: int | None) -> Shape:
    """What kernels.c knows of a layer's attention."""
    return Shape(
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        window or 0,
        spec.scale,
        spec.attn_softcap or 0.0,
    )


def native_step(batch: TokenBatch, cache: KVCache) -> Step:
    """What kernels.c knows of a step's tokens; valid while `batch` lives."""
    paths = batch.paths
    branches = (
        (None, None, 0)
        if paths is None
        else (paths.starts.data_ptr(), paths.after.data_ptr(), paths.after.shape[1])
    )
    return Step(
        batch.slots.data_ptr(),
        batch.positions.data_ptr(),
        batch.places.data_ptr(),
        *branches,
        cache.table.shape[2],
    )


def native_ops(spec: Spec, dtype: torch.dtype, device: torch.device) -> Ops:
    """The kernels where they can serve the model, else torch's operations."""
    if device.type != "cpu" or dtype not in DEFINES or spec.head_dim % LANES:
        shape = f"{dtype} with heads of {spec.head_dim} elements on {device.type}"
        return Ops(spec, f"torch's operations run, which are slower: there are no native kernels for {shape}")
    library, slower = loaded(dtype)
    return Ops(spec, slower) if library is None else NativeOps(spec, library, slower)


def highest(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """The highest of each row's logits [R, V] (not a number where one is none) and the first place it stands at,
    both [R]; None where there are no kernels for them."""
    library = kernels(logits.dtype) if logits.device.type == "cpu" and logits.dtype in DEFINES else None
    if library is None:
        return None
    logits = logits.contiguous()
    places = torch.empty(len(logits), dtype=torch.long)
    values = torch.empty(len(logits))
    library.highest(logits.data_ptr(), *logits.shape, places.data_ptr(), values.data_ptr())
    return values, places
