"""A CPU's backend: the C kernels for what they have, torch for the rest. See library.py.

Shapes: N tokens, d hidden, f feed-forward, R rows of outputs, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from pathlib import Path

import torch
from torch import Tensor

from rayskip.model.backends.base import DraftStep, Head, HeadOutput, Linear, Stack
from rayskip.model.backends.cpu import library as native
from rayskip.model.backends.cpu.draft import CpuDraftStep
from rayskip.model.backends.cpu.library import DEFINES, LANES, Library, loaded
from rayskip.model.backends.cpu.product import CpuLinear, argmax_linear, cpu_linear, cpu_scores, int8_linear
from rayskip.model.backends.cpu.stack import (
    CpuStack,
    attention_shape,
    fits,
    gate_numbers,
    native_router,
    step_tokens,
)
from rayskip.model.backends.torch import TorchBackend, TorchHead, TorchStack
from rayskip.model.cache.kv_cache import KVCache, Layout, Panels
from rayskip.model.spec import Attention, Dense, Gate, Layer, Norm, Router, Spec
from rayskip.model.token_batch import TokenBatch

MOST_COMPRESSED = 2_000_000_000
"""Weights of a stack up to which they are kept a second time, in twelve bits each."""


class CpuBackend(TorchBackend):
    """What the kernels do not cover (LayerNorm, other activations) is torch's, by inheritance."""

    name = "native"

    def __init__(
        self, spec: Spec, dtype: torch.dtype, library: Library, warnings: Sequence[str] = ()
    ) -> None:
        super().__init__(spec, dtype, torch.device("cpu"), warnings)
        self.library = library
        panels = Panels(library.panel_columns(), library.panel_depth())
        self.layout = Layout(library.page_positions(), panels)

    @property
    def machine(self) -> str:
        return f"{super().machine}, kernels {Path(self.library._name).parent.name}"

    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        """Their weights are kept in twelve bits too, if the memory is little: a few rows take as long as reading
        them, and that is a quarter less."""
        by_torch = TorchStack(self, layers, stored_at)
        linears = [linear for linear in by_torch.linears if isinstance(linear, CpuLinear)]
        if sum(layer.size for layer in layers) <= MOST_COMPRESSED:
            for linear in linears:
                linear.compress()
        if not fits(layers) or len(linears) < len(by_torch.linears):
            return by_torch
        return CpuStack(self.spec, layers, linears, self.ropes, stored_at)

    def head(self, dense: Dense, norm: Norm | None, exact: bool = True) -> Head:
        linear = None if exact else int8_linear(dense)
        return CpuHead(self, linear or self.linear(dense), dense, norm, exact)

    def linear(self, dense: Dense) -> Linear:
        return cpu_linear(dense) or super().linear(dense)

    def draft_step(self, layers: Stack, exit_layer: int, adapter: Stack, head: Head) -> DraftStep:
        return CpuDraftStep.of(layers, exit_layer, adapter, head) or super().draft_step(
            layers, exit_layer, adapter, head
        )

    def use_threads(self, count: int) -> None:
        """Torch's operations take one where the products are the kernels': what is left to them is small, and a
        thread of torch's that has nothing to do spins on a core that a kernel's thread needs."""
        native.use_threads(count)
        super().use_threads(1 if self.library.has_products() else count)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        with super().threads(count):
            try:
                yield
            finally:
                native.use_threads(None)

    def add_normalise(self, x: Tensor, branch: Tensor | None, norm: Norm | None) -> Tensor:
        if norm is None or norm.kind != "rms" or norm.weight.dtype != x.dtype or x.shape[-1] % LANES:
            return super().add_normalise(x, branch, norm)
        out = torch.empty_like(x)
        added = None if branch is None else branch.data_ptr()
        self.library.add_rms_norm(
            x.data_ptr(), added, norm.weight.data_ptr(), out.data_ptr(), *x.shape, x.shape[-1], norm.eps
        )
        return out

    def gate(self, up: Tensor, activation: Gate, gated: bool) -> Tensor:
        width, numbers = up.shape[1] // 2, gate_numbers(activation)
        if not gated or numbers is None or width % LANES:
            return super().gate(up, activation, gated)
        out = up.new_empty(len(up), width)
        stride = (c_int64 * 2)(2 * width, width)
        self.library.gate(up.data_ptr(), out.data_ptr(), len(up), width, stride, *numbers)
        return out

    def scores(self, dense: Dense) -> Linear:
        return cpu_scores(dense) or super().scores(dense)

    def route(self, router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self.library.has_products():
            return super().route(router, logits)
        beside = logits.shape[1] - router.count
        experts = torch.empty(len(logits), router.top_k, dtype=torch.long)
        weights = torch.empty(len(logits), router.top_k + beside)
        own = ctypes.byref(native_router(router, gated=beside > 0))
        self.library.route(
            own, logits.contiguous().data_ptr(), len(logits), experts.data_ptr(), weights.data_ptr()
        )
        return experts, weights

    def top_k(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if logits.shape[1] % LANES:
            return super().top_k(logits, count)
        logits = logits.contiguous()
        places = logits.new_zeros(len(logits), count, dtype=torch.long)
        chances = logits.new_empty(len(logits), count, dtype=torch.float32)
        self.library.top_k(logits.data_ptr(), *logits.shape, count, places.data_ptr(), chances.data_ptr())
        return places, chances

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        places = torch.empty(len(logits), dtype=torch.long)
        values = torch.empty(len(logits))
        self.library.argmax(logits.data_ptr(), *logits.shape, places.data_ptr(), values.data_ptr())
        return values, places

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
        shape, step = attention_shape(self.spec, own.window, own.sinks), step_tokens(batch, cache)
        at, around = ctypes.byref(step), ctypes.byref(shape)
        stored = cache.keys.data_ptr(), cache.values.data_ptr(), cache.table[layer].data_ptr()
        strides = (c_int64 * 3)(q.stride(0), k.stride(0), v.stride(0))
        rope = None if own.rope is None else self.ropes[own.rope]
        table = (
            (None, None, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1])
        )
        self.library.rotate_and_store(
            around, q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, *table, at, *stored, len(q)
        )
        out = q.new_empty(len(q), self.spec.heads * self.spec.head_dim)
        if self.library.attend(around, at, q.data_ptr(), q.stride(0), *stored, out.data_ptr(), len(q)):
            raise MemoryError("no memory for attention scores")
        return out


class CpuHead(TorchHead):
    """A row that takes the likeliest token needs no other: no other logit is stored (kernels/outputs.h), and for a
    few rows most are not computed (kernels/bounded_argmax.h)."""

    def __init__(
        self, backend: CpuBackend, linear: Linear, dense: Dense, norm: Norm | None, exact: bool
    ) -> None:
        super().__init__(backend, linear, norm, exact)
        plain = self._scale == 1.0 and self._softcap is None
        self._argmax = argmax_linear(linear, dense) if plain else None

    def output(self, x: Tensor, full: Sequence[int]) -> HeadOutput:
        others = len(x) - len(full)
        if self._argmax is None or not others or (full and others > self._argmax.bounded_beside):
            return super().output(x, full)
        normed = self.normed(x)
        if not full:
            return HeadOutput(*self._find(normed), x.new_empty(0, self.linear.out_features), full)
        known = self.output_of(self.logits_of(normed[full]))
        best, argmax = torch.empty(len(x)), torch.empty(len(x), dtype=torch.long)
        rest = sorted(set(range(len(x))).difference(full))
        best[full], argmax[full] = known.best, known.argmax
        best[rest], argmax[rest] = self._find(normed[rest])
        return HeadOutput(best, argmax, known.logits, full)

    def _find(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(best, argmax) of normalised states [R, d]; the kernels may leave some rows to all their logits."""
        assert self._argmax is not None
        best, argmax = self._argmax(normed)
        if unknown := [row for row, place in enumerate(argmax.tolist()) if place < 0]:
            known = self.output_of(self.logits_of(normed[unknown]))
            best[unknown], argmax[unknown] = known.best, known.argmax
        return best, argmax


def cpu_backend(spec: Spec, dtype: torch.dtype, device: torch.device) -> TorchBackend:
    """The kernels where they can serve the model, else torch's operations."""
    if dtype not in DEFINES or spec.head_dim % LANES:
        shape = f"{dtype} with heads of {spec.head_dim} elements on {device.type}"
        said = f"torch's operations run, which are slower: there are no native kernels for {shape}"
        return TorchBackend(spec, dtype, device, [said])
    library, slower = loaded(dtype)
    warnings = [slower] if slower else []
    return (
        TorchBackend(spec, dtype, device, warnings)
        if library is None
        else CpuBackend(spec, dtype, library, warnings)
    )
