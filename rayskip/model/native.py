"""The operations between the matrix products as C kernels (native.c), for CPU.

Compiled for this machine on first use, about two seconds, and kept in the user's cache. Without a C compiler the
torch operations serve; the engine's info says which run. Token ids may differ between the two in the last bit,
as between two kinds of CPU; within one they do not depend on the batch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rayskip.errors import ModelError
from rayskip.model.embedded import cache_root, publish
from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import Ops, TokenBatch
from rayskip.model.spec import Norm, Rope, Spec

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
DEFINES = {torch.bfloat16: ("-DBF16",), torch.float32: ()}
LANES = 16
"""Row lengths the kernels take are multiples of this, as in native.c."""

_log = logging.getLogger(__name__)


class _Shape(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("length", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


class NativeOps(Ops):
    """What the kernels do not cover (LayerNorm, other activations) is torch's, by inheritance."""

    name = "native"

    def __init__(self, spec: Spec, library: ctypes.CDLL) -> None:
        super().__init__(spec)
        self._library = library

    def add_normalise(self, x: Tensor, branch: Tensor | None, norm: Norm) -> Tensor:
        if norm.kind != "rms" or norm.weight.dtype != x.dtype or x.shape[-1] % LANES:
            return super().add_normalise(x, branch, norm)
        out = torch.empty_like(x)
        added = None if branch is None else branch.data_ptr()
        self._library.add_rms_norm(
            x.data_ptr(), added, norm.weight.data_ptr(), out.data_ptr(), *x.shape, norm.eps
        )
        return out

    def gate(self, up: Tensor) -> Tensor:
        width = up.shape[1] // 2
        if not self.spec.gated or self.spec.activation != "silu" or width % LANES:
            return super().gate(up)
        out = up.new_empty(len(up), width)
        self._library.silu_gate(up.data_ptr(), out.data_ptr(), len(up), width)
        return out

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
        shape = self._shape(cache, window)
        at, paths = (batch.slots.data_ptr(), batch.positions.data_ptr()), batch.paths
        branches = (
            (None, None, 0)
            if paths is None
            else (paths.starts.data_ptr(), paths.after.data_ptr(), paths.after.shape[1])
        )
        stored = cache.keys[layer].data_ptr(), cache.values[layer].data_ptr()
        strides = (c_int64 * 3)(q.stride(0), k.stride(0), v.stride(0))
        table = (
            (None, None, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1])
        )
        places = batch.places.data_ptr()
        self._library.rotate_and_store(
            shape, q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, *table, *at, places, *stored, len(q)
        )
        out = q.new_empty(len(q), self.spec.heads * self.spec.head_dim)
        query = q.data_ptr(), q.stride(0)
        if self._library.attend(shape, *query, *stored, *at, *branches, out.data_ptr(), len(q)):
            raise MemoryError("no memory for attention scores")
        return out

    def _shape(self, cache: KVCache, window: int | None) -> ctypes.Array[_Shape]:
        spec = self.spec
        shape = _Shape(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            cache.length,
            window or 0,
            spec.scale,
            spec.attn_softcap or 0.0,
        )
        return (_Shape * 1)(shape)


def native_ops(spec: Spec, dtype: torch.dtype, device: torch.device) -> Ops:
    """The kernels where they can serve the model, else torch's operations."""
    fits = device.type == "cpu" and dtype in DEFINES and spec.head_dim % LANES == 0
    library = _library(dtype) if fits else None
    return Ops(spec) if library is None else NativeOps(spec, library)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels for one element type; None, with a warning, where they cannot be had."""
    try:
        library = ctypes.CDLL(str(_compiled(DEFINES[dtype])))
    except (ModelError, OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        _log.warning("no native kernels, torch's operations run instead (slower): %s", detail)
        return None
    pointer, number = c_void_p, c_int64
    library.add_rms_norm.argtypes = [pointer] * 4 + [number] * 2 + [c_float]
    library.silu_gate.argtypes = [pointer] * 2 + [number] * 2
    library.rotate_and_store.argtypes = [pointer] * 7 + [number] + [pointer] * 5 + [number]
    library.attend.argtypes = [pointer] * 2 + [number] + [pointer] * 6 + [number, pointer, number]
    for function in (library.add_rms_norm, library.silu_gate, library.rotate_and_store):
        function.restype = None
    return library


def _compiled(defines: tuple[str, ...]) -> Path:
    """The shared library, compiled unless the cache has it. Its name tells source, flags, compiler and CPU."""
    compiler = shlex.split(os.environ.get("CC", "")) or list(filter(None, map(shutil.which, COMPILERS)))[:1]
    if not compiler:
        raise ModelError(f"no C compiler found ({', '.join(COMPILERS)}, or name one in CC)")
    command = [*compiler, *FLAGS, *defines]
    key = hashlib.blake2b(digest_size=10)
    for part in (SOURCE.read_text(), *command, _cpu()):
        key.update(part.encode())
    target = cache_root() / "kernels" / key.hexdigest()

    def compile_into(draft: Path) -> None:
        subprocess.run(
            [*command, str(SOURCE), "-o", str(draft / "native.so")],
            check=True,
            capture_output=True,
            text=True,
        )

    if not target.is_dir():
        publish(target, compile_into)
    return target / "native.so"


def _cpu() -> str:
    """What -march=native depends on, as far as the system tells."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"
