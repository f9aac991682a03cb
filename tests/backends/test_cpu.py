"""The C kernels against torch's operations, and the way to them."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from rayskip.errors import ModelError
from rayskip.model.backends.cpu import backend as cpu
from rayskip.model.backends.cpu import library as native
from rayskip.model.backends.cpu.backend import CpuBackend, cpu_backend
from rayskip.model.backends.cpu.product import ArgmaxLinear, CpuLinear, argmax_linear, cpu_linear, int8_linear
from rayskip.model.backends.cpu.stack import CpuStack
from rayskip.model.backends.torch import TorchBackend, TorchHead, TorchStack
from rayskip.model.cache.kv_cache import Assignment, KVCache, Layout, Panels
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder
from rayskip.model.spec import Attention, Dense, Norm, Rope, Spec
from rayskip.model.token_batch import Paths, Span, TokenBatch

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    native.kernels(torch.bfloat16) is None, reason="no C compiler here; torch's operations serve"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
SHAPES = [
    # heads, key-value heads, head dim, softcap, window
    (9, 3, 64, None, None),
    (4, 4, 16, None, 9),
    (14, 2, 32, 20.0, None),
    (5, 1, 80, None, 33),
    (8, 2, 128, 5.0, 40),
]


def _spec(heads: int = 2, kv_heads: int = 1, dim: int = 64, cap: float | None = None) -> Spec:
    return Spec("llama", 64, heads, kv_heads, dim, 99, 256, dim**-0.5, attn_softcap=cap)


def _both(spec: Spec, dtype: torch.dtype) -> tuple[CpuBackend, TorchBackend]:
    fast = cpu_backend(spec, dtype, CPU)
    assert isinstance(fast, CpuBackend)
    return fast, TorchBackend(spec, dtype, CPU)


def _attention_of(backend: TorchBackend, rope: Rope | None, window: int | None) -> Attention:
    """Its products are not asked."""
    backend.ropes = {} if rope is None else {"default": rope}
    nothing = Dense(torch.empty(0))
    return Attention(nothing, nothing, window=window, rope=None if rope is None else "default")


def _fill(cache: KVCache, layer: int, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys and values [Hkv, T, D] become a slot's first T positions."""
    positions = torch.arange(keys.shape[1])
    cache.write(
        layer, torch.full_like(positions, slot), positions, keys.transpose(0, 1), values.transpose(0, 1)
    )


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "cap", "window"), SHAPES)
@pytest.mark.parametrize("turned", [0, 8, 16])
def test_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    cap: float | None,
    window: int | None,
    turned: int,
    dtype: torch.dtype,
) -> None:
    spec = _spec(heads, kv_heads, dim, cap)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(6, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    stored = torch.randn(2, 4, kv_heads, 128, dim, generator=generator).to(dtype)
    angles = torch.randn(128, turned, generator=generator)
    rope = Rope(angles.cos().to(dtype), angles.sin().to(dtype)) if turned else None
    slots = torch.tensor([2, 0, 1])
    positions = torch.tensor([50, 51, 100, 101, 0, 1])
    batch = TokenBatch(positions, positions, slots.repeat_interleave(2), [Span(0, 2, slots, 128)], slots)

    results = []
    for backend in _both(spec, dtype):
        cache = KVCache(spec, 2, backend)
        cache.fill(4, 128)
        for slot in range(4):
            _fill(cache, 1, slot, *stored[:, slot])
        q, k, v = torch.split(packed.clone(), [heads, kv_heads, kv_heads], dim=1)
        out = backend.attention(q, k, v, _attention_of(backend, rope, window), 1, batch, cache)
        assert not cache.keys[cache.table[0].long()].any()
        results.append((out, *cache.read(1, torch.arange(4), 128)))

    for found, expected in zip(*results, strict=True):
        _assert_close(found, expected)


def _tree(start: int) -> Paths:
    """Six drafted tokens from place `start` on: at positions 0, 1, 1, 2, 2, 2 after it."""
    after = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 1, 3], [0, 2, 4], [0, 1, 5]])
    return Paths(torch.arange(start, start + 6), torch.full((6,), start), after + start)


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "cap", "window"),
    [*SHAPES, (9, 3, 64, 20.0, 77), (14, 2, 64, None, None), (24, 1, 32, None, None)],
)
@pytest.mark.parametrize(
    ("slots", "positions", "paths"),
    [
        ([1] * 150, list(range(150)), None),
        ([1] * 6 + [2] * 3 + [0], [100, 101, 102, 103, 104, 105, 7, 8, 9, 30], None),
        ([1] * 6, [100, 101, 101, 102, 102, 102], _tree(100)),
        ([1] * 6, [94, 95, 95, 96, 96, 96], _tree(94)),  # over the border of two panels
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_row_attend_to_the_same_bits_together_and_one_by_one(
    slots: list[int],
    positions: list[int],
    paths: Paths | None,
    heads: int,
    kv_heads: int,
    dim: int,
    cap: float | None,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """And what lies behind a token, finite or not, is nothing to it."""
    backend, _ = _both(_spec(heads, kv_heads, dim, cap), dtype)
    packed = torch.randn(
        len(slots), heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(0)
    ).to(dtype)
    cache = KVCache(backend.spec, 1, backend)
    own_attention = _attention_of(backend, None, window)
    cache.fill(3, 192)
    cache.table = cache.table[:, :, [2, 0, 1]].contiguous()  # a row's pages lie in any order
    stored = torch.full((2, 3, kv_heads, 192, dim), torch.nan, dtype=dtype)
    known = min(100, positions[0] or 100)
    stored[:, :, :, :known] = torch.randn(
        2, 3, kv_heads, known, dim, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    for slot in range(3):
        _fill(cache, 0, slot, *stored[:, slot])
    place, row = torch.tensor(positions), torch.tensor(slots)

    def attend(first: int, last: int) -> torch.Tensor:
        own = (
            None
            if paths is None
            else Paths(*(part[first:last] for part in (paths.places, paths.starts, paths.after)))
        )
        batch = TokenBatch(place[first:last], place[first:last], row[first:last], [], row[:0], None, own)
        q, k, v = torch.split(packed[first:last].clone(), [heads, kv_heads, kv_heads], dim=1)
        return backend.attention(q, k, v, own_attention, 0, batch, cache)

    together = attend(0, len(slots))
    assert together.isfinite().all()
    assert torch.equal(together, torch.cat([attend(at, at + 1) for at in range(len(slots))]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", [True, False])
def test_norm(dtype: torch.dtype, branch: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, added = (torch.randn(2, 5, 48, generator=generator) * 3).to(dtype)
    norm = Norm("rms", torch.rand(48, generator=generator).to(dtype), None, 1e-5)
    fast, slow = _both(_spec(), dtype)
    ours, theirs = x.clone(), x.clone()
    _assert_close(
        fast.add_normalise(ours, added if branch else None, norm),
        slow.add_normalise(theirs, added if branch else None, norm),
    )
    _assert_close(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype: torch.dtype) -> None:
    up = torch.cat((torch.linspace(-200, 200, 64), torch.linspace(-2, 2, 64))).repeat(3, 1).to(dtype)
    fast, slow = _both(_spec(), dtype)
    _assert_close(fast.gate(up, "silu", True), slow.gate(up, "silu", True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "count"), [(16, 16), (48, 1), (4096, 3), (50, 5)])
def test_top_k(width: int, count: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[1] = logits[1, 0]  # nothing but equals
    fast, slow = _both(_spec(), dtype)
    places, chances = fast.top_k(logits, count)
    _, expected = slow.top_k(logits, count)
    torch.testing.assert_close(chances, expected)
    torch.testing.assert_close(torch.softmax(logits.float(), dim=-1).gather(1, places), expected)
    assert all(len(set(row)) == count for row in places.tolist())
    if width % 16 == 0:
        assert places[1].tolist() == list(range(count))


def _cache(spec: Spec, dtype: torch.dtype, panels: Panels | None) -> KVCache:
    backend = TorchBackend(spec, dtype, CPU)
    backend.layout = Layout(panels=panels)
    return KVCache(spec, 2, backend)


LAYOUTS = [None, Panels(1, 1), Panels(32, 2), Panels(16, 1)]


@pytest.mark.parametrize("panels", LAYOUTS)
def test_a_cleared_page_is_finite_and_a_new_row_of_the_table_keeps_the_others(panels: Panels | None) -> None:
    cache = _cache(_spec(), torch.bfloat16, panels)
    cache.allocate(8)
    cache.assign([Assignment(0, 0, (0, 1), (3, 5)), Assignment(1, 0, (0, 1), (7, 2))])
    for layer in range(2):
        _fill(cache, layer, 0, *torch.full((2, 1, 9, 64), 3.0, dtype=torch.bfloat16))
        _fill(cache, layer, 1, *torch.full((2, 1, 60, 64), torch.nan, dtype=torch.bfloat16))
    cache.assign([Assignment(40, 30, (1,), (8,)), Assignment(1, 0, (0,), (1,))])
    assert cache.table[:, 40, 30].tolist() == [0, 8]
    assert cache.table[:, 1, 0].tolist() == [1, 0]
    for layer in range(2):
        keys, values = cache.read(layer, torch.tensor([0]), 64)
        assert (keys[:, :, :9] == 3.0).all()
        assert (values[:, :, :9] == 3.0).all()
    cache.clear([7, 2])
    assert cache.keys.isfinite().all()
    assert cache.values.isfinite().all()
    assert cache.keys.data_ptr() % 64 == cache.values.data_ptr() % 64 == 0


@pytest.mark.parametrize("panels", LAYOUTS[1:])
def test_positions_are_where_they_are_asked_for_however_they_lie(panels: Panels) -> None:
    """Reads, moves, copies and clearing give what a cache without panels gives."""
    spec, generator = _spec(6, 3, 16), torch.Generator().manual_seed(0)
    stored = torch.randn(2, 2, 3, 100, 16, generator=generator)
    found = []
    for own in (None, panels):
        cache = _cache(spec, torch.float32, own)
        cache.fill(3, 128)
        for layer in range(2):
            _fill(cache, layer, 2, *stored[layer])
        cache.move([(2, 66, 63), (2, 75, 64)])
        cache.copy(list(zip(cache.table[:, 2, 0].tolist(), cache.table[:, 0, 0].tolist(), strict=True)), 64)
        cache.clear_row(0, 37, 64)
        cache.clear_row(2, 61, 70)
        places = torch.tensor([[3, 68, 69, 70], [1, 0, 63, 40]])
        found.append(
            [
                part
                for layer in range(2)
                for part in (
                    *cache.read(layer, torch.tensor([2, 0, 1]), 128),
                    *cache.read_places(layer, torch.tensor([2, 0]), places),
                )
            ]
        )
    for mine, own in zip(found[1], found[0], strict=True):
        assert torch.equal(mine, own)


@needs_kernels
def test_a_value_that_is_not_finite_spreads() -> None:
    """A broken row must come out as such, not as zeros."""
    fast, _ = _both(_spec(), torch.bfloat16)
    nan = torch.full((1, 64), torch.nan, dtype=torch.bfloat16)
    norm = Norm("rms", torch.ones(64, dtype=torch.bfloat16), None, 1e-5)
    assert fast.add_normalise(nan.clone(), nan, norm).isnan().all()
    assert fast.gate(nan, "silu", True).isnan().all()


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no-such-compiler"), ("false", "no native kernels")]
)
def test_without_a_compiler_torch_serves(
    compiler: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path))
    native.loaded.cache_clear()
    try:
        backend = cpu_backend(_spec(), torch.float32, CPU)
        assert backend.name == "torch"
        assert said in backend.warnings[0]
    finally:
        native.loaded.cache_clear()


WITHOUT_TILES = """
import ctypes, torch
from rayskip.model.backends.cpu.product import cpu_linear
from rayskip.model.spec import Dense

class Stack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

small = ctypes.create_string_buffer(4096)  # too small to save tiles on: Linux lets the process have none
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(small), 0, 4096)), None) == 0
weight, x = torch.randn(40, 64).bfloat16(), torch.randn(3, 64).bfloat16()
product = cpu_linear(Dense(weight, None))
found, wanted = product(x) if product else x @ weight.T, x.float() @ weight.float().T
torch.testing.assert_close(found.float(), wanted, atol=0.2, rtol=0)
print(product is not None)
"""


@needs_kernels
def test_a_process_that_may_not_use_tiles_has_other_products() -> None:
    """On a processor without tiles it passes as well."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(cpu_linear(_dense(4, 64, torch.bfloat16, bias=False)) is not None)


@needs_kernels
def test_another_compiler_of_the_same_name_compiles_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cc"
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, native.COMPILERS)))
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path / "cache"))
    try:
        for line, works in (
            ('for file; do :; done; echo broken > "$file"', False),
            (f'exec {compiler} "$@" -O0', True),
        ):
            script.write_text(f"#!/bin/sh\n{line}\n")
            script.chmod(0o755)
            native.loaded.cache_clear()
            assert (native.kernels(torch.float32) is not None) == works
    finally:
        native.loaded.cache_clear()


@pytest.fixture
def counted_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes a while and writes its process id; the file that has a line for each of its runs."""
    script, log = tmp_path / "cc", tmp_path / "log"
    script.write_text(f'#!/bin/sh\necho run >> {log}\nsleep 0.3\nfor file; do :; done\necho $$ > "$file"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path / "cache"))
    return log


def test_of_many_that_need_the_kernels_one_compiles(counted_compiler: Path) -> None:
    with ThreadPoolExecutor(6) as threads:
        (library,) = {task.result() for task in [threads.submit(native._compiled, ()) for _ in range(6)]}
    assert library.exists()
    assert counted_compiler.read_text().splitlines() == ["run"]


def test_a_damaged_library_is_compiled_again(counted_compiler: Path) -> None:
    library = native._compiled(())
    for damage in (lambda: os.truncate(library, 1), library.unlink):
        damage()
        assert native._compiled(()) == library
        assert library.stat().st_size > 1
    assert len(counted_compiler.read_text().splitlines()) == 3


@pytest.mark.parametrize("part", ["folder", "library", "link"])
def test_what_another_user_may_have_written_is_not_loaded(part: str, counted_compiler: Path) -> None:
    library = native._compiled(())
    if part == "link":  # is anyone's to make who owns the folder above
        library.parent.rename(elsewhere := library.parent.with_name("elsewhere"))
        library.parent.symlink_to(elsewhere)
    else:
        (library if part == "library" else library.parent).chmod(0o775)
    with pytest.raises(ModelError, match="another user and is not loaded; set RAYSKIP_CACHE"):
        native._compiled(())


@needs_kernels
def test_structures_are_as_large_in_c_and_no_symbol_can_meet_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = native.kernels(torch.bfloat16)
    assert library is not None
    native.check_sizes(library)

    class Longer(native.StepTokens):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr(native, "STRUCTURES", (native.Shape, Longer, *native.STRUCTURES[2:]))
    with pytest.raises(RuntimeError, match=r"Longer has 64 bytes .* and 56 in"):
        native.check_sizes(library)
    if nm := shutil.which("nm"):
        listed = subprocess.run([nm, "-D", "--defined-only", library._name], capture_output=True, text=True)
        names = {line.split()[-1] for line in listed.stdout.splitlines()}
        assert "rayskip_attend" in names
        assert {name for name in names if not name.startswith(("rayskip_", "_"))} == set()


class Isa(NamedTuple):
    """An instruction set that the kernels have code of their own for.

    features: what a processor needs to run it, as Linux names them. macros: of vectors.h, for float32 and bfloat16.
    """

    flags: tuple[str, ...]
    features: frozenset[str]
    macros: tuple[str, str]


AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
BF16, AMX = "-mavx512bf16", ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
ISAS = {
    "baseline": Isa(("-march=x86-64",), frozenset(), ("", "")),
    "AVX2": Isa(("-march=x86-64-v3",), AVX2, ("EIGHTS", "EIGHTS")),
    "AVX-512": Isa(("-march=x86-64-v4",), AVX512, ("SIXTEENS", "EIGHTS")),
    "AVX-512 bf16": Isa(("-march=x86-64-v4", BF16), AVX512 | {"avx512_bf16"}, ("SIXTEENS", "PAIRS")),
    "AMX": Isa(
        ("-march=x86-64-v4", BF16, *AMX),
        AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
        ("SIXTEENS", "TILES"),
    ),
}
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
each_compiler = pytest.mark.parametrize("compiler", [os.environ.get("CC") or "gcc", "clang"])


def _must_know(compiler: str, isa: Isa) -> None:
    """Skip where there is no such compiler, or one older than the instructions."""
    if shutil.which(shlex.split(compiler)[0]) is None:
        pytest.skip(f"no {compiler} here")
    command = [*shlex.split(compiler), *isa.flags, "-x", "c", "-E", os.devnull]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{compiler} does not know {isa.flags}")


@x86
@each_compiler
@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_the_kernels_compile_for_every_instruction_set(isa: Isa, compiler: str, tmp_path: Path) -> None:
    """To machine code: only then does a compiler refuse an instruction that it was not told of."""
    _must_know(compiler, isa)
    (source,) = (source for source in native.SOURCES if source.suffix == ".c")
    flags = [flag for flag in native.FLAGS if flag not in ("-O3", "-shared")]
    for dtype, macro in zip((torch.float32, torch.bfloat16), isa.macros, strict=True):
        command = [*shlex.split(compiler), *flags, *isa.flags, *native.DEFINES[dtype], str(source)]
        asked = subprocess.run([*command, "-E", "-dM"], capture_output=True, text=True, check=True)
        defined = {line.split()[1] for line in asked.stdout.splitlines()}
        assert ("PRODUCTS" in defined) == bool(macro)
        assert {macro} - {""} <= defined, macro
        done = subprocess.run(
            [
                *command,
                "-O1",
                "-Wall",
                "-Wno-psabi",
                "-Wno-unused-function",
                "-Wno-ignored-optimization-argument",
                "-Werror",
                "-c",
                "-o",
                str(tmp_path / "kernels.o"),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


@x86
@each_compiler
@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_every_instruction_set_gives_what_torch_does(
    isa: Isa, compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of those that this processor has; all other tests are of the newest of them, by the first compiler."""
    _must_know(compiler, isa)
    if missing := isa.features - set(native._cpu().split()):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(native, "MARCH", isa.flags[0].removeprefix("-march="))
    monkeypatch.setattr(
        native, "FLAGS", (*(flag for flag in native.FLAGS if flag != "-O3"), "-O1", *isa.flags[1:])
    )
    native.loaded.cache_clear()
    try:
        for dtype, macro in zip((torch.float32, torch.bfloat16), isa.macros, strict=True):
            library = native.kernels(dtype)
            assert library is not None
            assert bool(library.has_products()) == bool(macro)
            test_attention(9, 3, 64, None, 33, 16, dtype)
            test_norm(dtype, True)
            test_gate(dtype)
            test_top_k(48, 5, dtype)
            test_argmax(300, dtype)
            if macro:
                test_product(33, 130, True, dtype)
                test_an_int8_product_is_that_of_weights_in_255_steps(33, 64, dtype)
                test_the_highest_outputs_are_found(33, 64, dtype, 3, True)
                for config in (Qwen2Config, Qwen2MoeConfig):
                    test_all_layers_in_one_call_give_the_same_bits_as_one_operation_at_a_time(
                        "rows", config, dtype, tmp_path / config.model_type
                    )
            if macro and library.compressed_rows():
                test_compressed_weights_are_the_same_weights("of every size", 33, 130, True)
    finally:
        native.loaded.cache_clear()


def test_shapes_without_a_kernel_take_torch() -> None:
    assert cpu_backend(_spec(dim=24), torch.float32, CPU).name == "torch"
    assert cpu_backend(_spec(), torch.float16, CPU).name == "torch"


def _dense(out: int, width: int, dtype: torch.dtype, bias: bool) -> Dense:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    return Dense(weight.to(dtype), torch.randn(out, generator=generator).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "width", "bias"), [(96, 64, False), (33, 130, True), (199, 48, True), (520, 1538, False)]
)
def test_product(out: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    """Close to torch's, and the same bits for a row whatever runs beside it and on however many threads."""
    dense = _dense(out, width, dtype, bias)
    product = cpu_linear(dense)
    if product is None:
        pytest.skip("a library's products are used on this processor")
    x = torch.randn(384, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = F.linear(x.float(), dense.weight.float(), None if dense.bias is None else dense.bias.float())
    whole = product(x)
    torch.testing.assert_close(
        whole.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
    )
    assert product(x[:0]).shape == (0, out)
    for threads in (1, 2, 3, 2):
        native.use_threads(threads)
        for rows in (1, 2, 5, 11, 12, 13, 16, 17, 25, 33, 97, 256, 300, 384):
            parts = [product(part) for part in torch.split(x, rows)]
            assert torch.equal(torch.cat(parts), whole), (threads, rows)
    native.use_threads(None)


@pytest.mark.parametrize("weights", ["a model's", "of every size", "zeros", "not finite"])
@pytest.mark.parametrize(("out", "width", "bias"), [(96, 576, False), (33, 130, True), (7, 30, False)])
def test_compressed_weights_are_the_same_weights(weights: str, out: int, width: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = _dense(out, width, torch.bfloat16, bias)
    weight = dense.weight
    if weights == "of every size":  # so that no table holds all exponents
        weight *= 2.0 ** torch.randint(-60, 20, weight.shape, generator=generator)
    elif weights == "zeros":
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    elif weights == "not finite":
        weight[3, 7], weight[5, 9], weight[6, width - 1] = torch.nan, torch.inf, -torch.inf
    product = cpu_linear(dense)
    if product is None or not product.library.compressed_rows():
        pytest.skip("no compressed products here")
    few = product.library.compressed_rows()
    x = torch.randn(few + 1, width, generator=generator).bfloat16()
    expected = product(x)
    product.compress()
    product._panels.fill_(7.0)  # so that it shows which are read
    for rows in range(1, few + 1):
        torch.testing.assert_close(product(x[:rows]), expected[:rows], atol=0, rtol=0, equal_nan=True)
    assert not torch.equal(product(x), expected)


def test_layers_are_compressed_if_they_are_not_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for most, compressed in ((2 * 64 * (3 * 96 + 2 * 64 + 2 * 32), True), (100, False)):
        monkeypatch.setattr(cpu, "MOST_COMPRESSED", most)
        decoder = Decoder(*load(tmp_path, torch.bfloat16, CPU))
        of_layers = [linear for linear in decoder.layers.linears if isinstance(linear, CpuLinear)]
        if not of_layers or not of_layers[0].library.compressed_rows():
            pytest.skip("no compressed products here")
        assert {product.struct.lows is not None for product in of_layers} == {compressed}


LONG = 70
"""Tokens of a row that attend in several spans, whatever the processor."""


def _tokens_of(slots: list[int], positions: list[int], paths: Paths | None = None) -> TokenBatch:
    tokens, at = torch.arange(len(slots)) % 90 + 3, torch.tensor(slots)
    spans = [Span(0, 1, at, 128)]
    return TokenBatch(tokens, torch.tensor(positions), at, spans, torch.arange(len(slots)), paths=paths)


def _rows(slots: list[int], positions: list[int]) -> TokenBatch:
    """Every slot's tokens, at all positions, side by side."""
    return _tokens_of([slot for slot in slots for _ in positions], positions * len(slots))


def _steps(order: str) -> list[TokenBatch]:
    """What runs one after the other: of each slot tokens that see each other, or what ran before."""
    ahead = _rows([2, 0, 1, 3, 4], list(range(40)))
    match order:
        case "rows":
            return [_rows([2, 0, 1], list(range(LONG)))]
        case "rows backwards":
            return [_rows([2, 0, 1], list(range(LONG))[::-1])]
        case "positions":
            return [_tokens_of([2, 0, 1, 3] * LONG, [at for at in range(LONG) for _ in range(4)])]
        case "a row's last token first":
            return [ahead, _tokens_of([0, 1, 0, 2], [41, 40, 40, 40])]
        case "one token a row":
            return [ahead, _tokens_of([3, 0, 4, 2, 1], [40] * 5)]
        case "a tree":
            return [ahead, _tokens_of([1] * 6, [40, 41, 41, 42, 42, 42], _tree(40))]
    raise AssertionError(order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, Qwen2MoeConfig, GptOssConfig])
@pytest.mark.parametrize(
    "order",
    ["rows", "rows backwards", "positions", "a row's last token first", "one token a row", "a tree"],
)
def test_all_layers_in_one_call_give_the_same_bits_as_one_operation_at_a_time(
    order: str, config: type[PreTrainedConfig], dtype: torch.dtype, tmp_path: Path
) -> None:
    """With biases (Qwen 2), norms per head (Qwen 3; those are torch's when apart), shared experts behind gates and
    dense layers in between (Qwen 2 MoE), sinks, windows and clamped gates (GPT-OSS), tokens that skip layers, on
    several threads, and wherever in the batch the tokens stand that another one sees."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    experts: dict[type[PreTrainedConfig], dict[str, Any]] = {
        Qwen2MoeConfig: {
            "num_experts": 7,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
        GptOssConfig: {
            "num_local_experts": 5,
            "sliding_window": 50,
            "swiglu_limit": 0.5,
            "initializer_range": 0.2,
        },
    }
    own = config(**sizes, **heads, **experts.get(config, {}))
    AutoModelForCausalLM.from_config(own, dtype=dtype).save_pretrained(tmp_path)
    decoder = Decoder(*load(tmp_path, dtype, CPU))
    if not isinstance(decoder.layers, CpuStack):
        pytest.skip("a library's products are used on this processor")
    steps = _steps(order)
    count = len(steps[-1].table_rows)
    apart = copy(decoder)
    assert isinstance(decoder.backend, CpuBackend)
    apart.layers = TorchStack(decoder.backend, decoder.weights.layers, 0)
    for active in (None, [count, count * 2 // 3, 0, count // 3]):
        steps[-1].active = active
        found = []
        for one, threads in ((apart, 1), (decoder, 1), (decoder, 2), (decoder, 3)):
            cache = one.new_cache()
            cache.fill(5, 128)
            with one.backend.threads(threads):
                for step in steps:
                    hidden = one.hidden(step, cache)
                found.append((hidden, one.logits(hidden), cache.keys, cache.values))
        for mine, own in zip(found[1], found[0], strict=True):
            _assert_close(mine, own) if config is Qwen3Config else torch.testing.assert_close(
                mine, own, atol=0, rtol=0
            )
        for other in found[2:]:
            assert all(torch.equal(mine, own) for mine, own in zip(other, found[1], strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width"), [(33, 64), (256, 576), (7, 30)])
def test_an_int8_product_is_that_of_weights_in_255_steps(out: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    weight[3], weight[4] = 0, 1
    product = int8_linear(Dense(weight))
    if product is None:
        pytest.skip("no products here")
    # in float32, as the kernels': elsewhere a weight halfway between two steps may go to the other one
    step = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    rounded = (weight.float() / step).round().double() * step

    for rows in (1, 2, 5, 6, 7, 13, 16, 17, 40):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        x[-1] = -1  # with weights of 1 the largest sum, of which parts may not fit in 32 bits
        found, expected = product(x).double(), x.double() @ rounded.T
        assert not found[:, 3].any()
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    x[3, 2] = torch.nan
    assert product(x).isnan().all(dim=1).tolist() == [row == 3 for row in range(len(x))]
    with pytest.raises(ValueError, match=f"N, {width}"):
        product(x[:, 1:])


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _both(_spec(), logits.dtype)[0].argmax(logits)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width"), [(7, 30), (33, 64), (5000, 576), (300, 2048)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("screens", [True, False])
def test_the_highest_outputs_are_found(
    out: int, width: int, dtype: torch.dtype, threads: int, screens: bool
) -> None:
    """Those that the product has, and of equals the first; with a screen, and of all outputs."""
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    weight[5] = weight[out - 1]  # equals, of which the first counts
    weight[out // 2 :: 3] = weight[out - 1] * (1 + 1e-3 * torch.randn(1, width, generator=generator)).to(
        dtype
    )
    weight[2] = 0
    dense = Dense(weight)
    product = cpu_linear(dense)
    best = None if product is None else argmax_linear(product, dense)
    if product is None or best is None:
        pytest.skip("no products here")
    best.bounded_rows = 999 if screens else 0
    along = weight[[out - 1, 5, out // 2]]  # whose highest outputs are close
    for rows in (1, 2, 5, 6, 7, 13, 16, 17, 40, 400):
        x = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) * 20
        x[: len(along)] += along[:rows].float()
        x[rows // 2] *= 0 if rows == 13 else 1
        x = x.to(dtype)
        native.use_threads(threads)
        values, places = best(x)
        native.use_threads(None)
        expected = _argmax(product(x))
        assert torch.equal(values, expected[0])
        assert torch.equal(places, expected[1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [7, 33])
@pytest.mark.parametrize("screens", [True, False])
def test_the_highest_output_is_one_though_all_are_negative(
    out: int, dtype: torch.dtype, screens: bool
) -> None:
    """What a panel is filled up with is zero, and no output."""
    generator = torch.Generator().manual_seed(0)
    dense = Dense(-torch.rand(out, 64, generator=generator).to(dtype) - 0.01)
    product = cpu_linear(dense)
    best = None if product is None else argmax_linear(product, dense)
    if product is None or best is None:
        pytest.skip("no products here")
    best.bounded_rows = 99 if screens else 0
    x = (torch.rand(20, 64, generator=generator) + 0.01).to(dtype)
    expected = _argmax(product(x))
    assert all(torch.equal(*pair) for pair in zip(best(x), expected, strict=True))


def _misleading(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [out, in], x [rows, in]) of which bounds without the part that is named miss the highest output: it
    is off by almost as much as it can be, all in one direction."""
    weight = torch.zeros(64, 64)
    x = torch.ones(1, 64)
    match case:
        case "inputs":
            x[0, 1:] = (torch.rand(63, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.28
            x[0, 0] = 1e4
            weight[40, 1:], weight[3, 0] = 100 * x[0, 1:].sign(), 0.037
        case "weights":
            x[0, 0] = 0
            weight[40, 0], weight[40, 1:], weight[3, 1] = 127, 0.49, 20
        case "sums of floats":
            x, weight = torch.full((1, 2048), 31.0), torch.zeros(64, 2048)
            x[0, :1041] = 8256
            weight[40, :1040], weight[40, 1041:], weight[3, 1040] = 127, 1, (127 * 8256 * 1040 + 15000) / 8256
        case "rounded outputs":
            generator = torch.Generator().manual_seed(0)
            weight = torch.randint(-3, 4, (999, 64), generator=generator).float()
            weight[:, 0] = 127
            x = torch.zeros(80, 64)
            x[:, 0], x[:, 1], x[:, 2] = 1, 0.1 * torch.rand(80, generator=generator), 0.1
        case "next to nothing":
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(300, 64, generator=generator) * 1e-27
            x = torch.randn(40, 64, generator=generator) * 1e-12
    return weight, x


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["inputs", "weights", "sums of floats", "rounded outputs", "next to nothing"]
)
def test_a_screen_is_not_misled_by_what_rounding_takes(case: str, dtype: torch.dtype) -> None:
    weight, x = (tensor.to(dtype) for tensor in _misleading(case))
    product = cpu_linear(Dense(weight))
    best = None if product is None else argmax_linear(product, Dense(weight))
    if product is None or best is None:
        pytest.skip("no products here")
    best.bounded_rows = len(x)
    expected = _argmax(product(x))
    values, places = best(x)
    assert torch.equal(values, expected[0])
    assert torch.equal(places, expected[1])


@needs_kernels
def test_a_screen_reads_no_more_than_it_must() -> None:
    """Of weights with a clear winner it multiplies that one's panel: higher outputs elsewhere go unseen."""
    weight, x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), torch.ones(1, 64)
    weight[100] = 9
    elsewhere = torch.full_like(weight, 99)
    rounded, product = int8_linear(Dense(weight)), cpu_linear(Dense(weight))
    if rounded is None or product is None:
        pytest.skip("no products here")
    columns = product.library.panel_columns()
    own = slice(100 // columns * columns, (100 // columns + 1) * columns)
    elsewhere[own] = weight[own]
    misread = cpu_linear(Dense(elsewhere))
    assert misread is not None
    values, places = ArgmaxLinear(misread, rounded)(x)
    assert (values.tolist(), places.tolist()) == ([9 * 64], [100])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_outputs_are_those_of_all_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also with one row that is not finite, whichever rows ask for all their logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 999, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path)
    decoder = Decoder(*load(tmp_path, dtype, CPU))
    if (
        not isinstance(decoder.head, TorchHead)
        or argmax_linear(decoder.head.linear, decoder.weights.head) is None
    ):
        pytest.skip("no products here")
    x = torch.randn(19, 64).to(dtype)
    x[4] = torch.nan
    expected = decoder.head.output_of(decoder.logits(x))
    assert expected.best.isfinite().tolist() == [row != 4 for row in range(19)]
    for full in ([], [1, 4, 7], [0, 1, 2, *range(8, 19)], [*range(4), *range(5, 19)], list(range(19))):
        found = decoder.head_output(x, full)
        torch.testing.assert_close(found.best, expected.best, atol=0, rtol=0, equal_nan=True)
        assert torch.equal(found.argmax, expected.argmax)
        torch.testing.assert_close(found.of(full), expected.of(full), atol=0, rtol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("screens", [True, False])
def test_nothing_is_said_of_what_may_not_be_finite(screens: bool) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    product = cpu_linear(Dense(weight))
    best = None if product is None else argmax_linear(product, Dense(weight))
    if product is None or best is None:
        pytest.skip("no products here")
    best.bounded_rows = 5 if screens else 0
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[1, 3], x[2, 3], x[3, 3] = torch.nan, torch.inf, 1e30
    assert [place == -1 for place in best(x)[1].tolist()] == [False, True, True, True, False]
    for much in (torch.inf, 2e38):  # sums may not be finite either way
        weight[7, 7] = much
        assert argmax_linear(product, Dense(weight)) is None


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 300, 49_152])
def test_argmax(width: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] = 0.5  # the first of equals
    logits[2] = -torch.inf
    logits[3, width // 2] = torch.inf
    logits[4, -1] = torch.nan
    logits[5, -1] = 99.0

    values, places = _argmax(logits)

    assert values[4].isnan()
    kept = torch.tensor([0, 1, 2, 3, 5])
    assert torch.equal(values[kept], logits[kept].float().amax(dim=1))
    assert places[kept].tolist() == [row.index(max(row)) for row in logits[kept].float().tolist()]
