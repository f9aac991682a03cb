"""The C kernels (kernels.c and its headers), for CPU: compiled for this machine on first use, which takes some
seconds (half a minute without AVX-512), and kept in the user's cache. Of several processes one compiles, and the
others wait.

Without a C compiler there are none, and torch's operations serve; the engine's info says which run. Token ids may
differ between the two in the last bit, as between two kinds of CPU, or a process that may use tiles and one that
may not; within one they do not depend on the batch.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rayskip.errors import ModelError
from rayskip.user_cache import cache_root, is_own, publish, used

SOURCES = sorted((Path(__file__).parent / "kernels").glob("*.[ch]"))
"""Headers and the one file to compile."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-gcse",  # what it carries from one part of a product's loop to the next takes registers that sums need
    "-pthread",
    "-shared",
    "-fPIC",
)
MARCH = "native"
"""The processor that they are compiled for, as the compiler names it; tests name others."""
LIBRARY, DIGEST = "kernels.so", "digest"
DEFINES = {torch.bfloat16: ("-DBF16",), torch.float32: ()}
NO_TILES = "-DNO_TILES"
"""For systems that do not let a process use the tiles that its processor has."""
LANES = 16
"""Row lengths the kernels take are multiples of this, as in kernels.c."""

_own = threading.local()


def use_threads(count: int | None) -> None:
    """Products and layers that the calling thread runs take so many threads; None, and until it says so: as many as
    torch's operations."""
    _own.threads = count


def threads() -> int:
    """How many threads the calling thread's products and layers take."""
    return getattr(_own, "threads", None) or torch.get_num_threads()


class Shape(ctypes.Structure):
    """Heads, key-value heads, dim, window, scale, softcap, sinks: as in kernels.c, which fills in the last."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("length", c_int64),
    )


class StepTokens(ctypes.Structure):
    """A step's tokens: as in kernels.c."""

    _fields_ = (
        ("slots", c_void_p),
        ("positions", c_void_p),
        ("places", c_void_p),
        ("starts", c_void_p),
        ("after", c_void_p),
        ("branch", c_int64),
        ("blocks", c_int64),
    )


class Product(ctypes.Structure):
    """The weights of a matrix product: as in product.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in", c_int64),
        *((name, c_void_p) for name in ("lows", "highs", "tables", "odd", "odd_from", "whole")),
    )


class Compression(ctypes.Structure):
    """Weights to be compressed: as in compression.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("count", c_int64),
        ("lines", c_int64),
        *((name, c_void_p) for name in ("tables", "odd_from", "lows", "highs", "odd", "whole")),
    )


class Int8Weights(ctypes.Structure):
    """The packed weights of a matrix product, rounded: as in int8_product.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "scales", "lengths", "residues")),
        ("out", c_int64),
        ("in", c_int64),
    )


class NativeRouter(ctypes.Structure):
    """A router: as in experts.h."""

    _fields_ = (
        ("correction", c_void_p),
        *((name, c_int64) for name in ("experts", "top_k", "groups", "top_groups")),
        *((name, c_int64) for name in ("sigmoid", "normalised", "gated")),
        ("scale", c_float),
    )


class NativeExperts(ctypes.Structure):
    """A layer's experts: as in experts.h."""

    _fields_ = (
        ("router", NativeRouter),
        ("scores", Product),
        *((name, ctypes.POINTER(Product)) for name in ("up", "down")),
        *((name, c_float) for name in ("alpha", "limit")),
    )


class NativeLayer(ctypes.Structure):
    """One decoder layer: as in kernels.c."""

    _fields_ = (
        *((name, Product) for name in ("qkv", "out", "up", "down")),
        ("experts", ctypes.POINTER(NativeExperts)),
        *(
            (name, c_void_p)
            for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm", "cosines", "sines", "sinks")
        ),
        *((name, c_int64) for name in ("q_width", "k_width", "turned", "window")),
        *((name, c_float) for name in ("attn_eps", "mlp_eps", "head_eps", "alpha", "limit")),
    )


class LayersTask(ctypes.Structure):
    """Some layers over some tokens: as in kernels.c, which fills in all behind `threads`."""

    _fields_ = (
        ("layers", ctypes.POINTER(NativeLayer)),
        ("first", c_int64),
        ("last", c_int64),
        ("shape", Shape),
        ("step", StepTokens),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("table", c_void_p),
        ("table_size", c_int64),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("active", c_void_p),
        ("threads", c_int64),
        *(
            (name, c_void_p)
            for name in (
                "normed",
                "qkv",
                "attended",
                "branch",
                "up",
                "gated",
                "of_pairs",
                "logits",
                "weights",
            )
        ),
        *((name, c_void_p) for name in ("chosen", "tokens_of", "begins", "workspaces", "operands")),
        ("operands_size", c_int64),
    )


class DraftTask(ctypes.Structure):
    """One step of a draft: as in kernels.c, which fills in the last four."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayersTask)),
        ("adapter", ctypes.POINTER(LayersTask)),
        ("norm", c_void_p),
        ("eps", c_float),
        ("head", ctypes.POINTER(Int8Weights)),
        ("after", c_void_p),
        ("rows", c_int64),
        ("count", c_int64),
        ("places", c_void_p),
        ("chances", c_void_p),
        *((name, c_void_p) for name in ("normed", "logits", "whole", "each")),
    )


def kernels(dtype: torch.dtype) -> Library | None:
    """The compiled kernels for one element type; None where they cannot be had."""
    return loaded(dtype)[0]


class Library(ctypes.CDLL):
    """Compiled kernels, by their names without the prefix that they have among all symbols of a process."""

    def __getattr__(self, name: str) -> Any:
        function = self[f"rayskip_{name}"]
        setattr(self, name, function)
        return function


@cache
def loaded(dtype: torch.dtype) -> tuple[Library | None, str | None]:
    """The compiled kernels for one element type, and what is slower here than it could be, and why."""
    slower = None
    try:
        library = Library(str(_compiled(DEFINES[dtype])))
        if not library.usable():
            slower = "the system denies the process its processor's tiles (AMX): kernels without run, slower"
            library = Library(str(_compiled((*DEFINES[dtype], NO_TILES))))
    except (ModelError, OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        return None, f"no native kernels, torch's operations run instead, which are slower: {detail}"
    check_sizes(library)
    pointer, number = c_void_p, c_int64
    library.add_rms_norm.argtypes = [pointer] * 4 + [number] * 3 + [c_float]
    library.gate.argtypes = [pointer] * 2 + [number] * 2 + [pointer] + [c_float] * 2
    library.rotate_and_store.argtypes = [pointer] * 7 + [number] + [pointer] * 4 + [number]
    library.top_k.argtypes = [pointer] + [number] * 3 + [pointer] * 2
    library.attend.argtypes = [pointer] * 3 + [number] + [pointer] * 4 + [number]
    library.argmax.argtypes = [pointer] + [number] * 2 + [pointer] * 2
    for name in ("add_rms_norm", "gate", "rotate_and_store", "top_k", "argmax"):
        getattr(library, name).restype = None
    library.panel_columns.restype = library.panel_depth.restype = library.page_positions.restype = number
    if library.has_products():
        library.compressed_rows.restype = library.bounded_rows.restype = number
        library.to_panels.argtypes, library.to_panels.restype = [pointer] * 2 + [number] * 2, None
        library.product.argtypes = library.unrounded_product.argtypes = [pointer] * 3 + [number] * 2
        library.route.argtypes = [pointer] * 2 + [number] + [pointer] * 2
        library.route.restype = None
        library.int8_width.argtypes, library.int8_width.restype = [number], number
        library.to_int8_panels.argtypes, library.to_int8_panels.restype = [pointer] * 5 + [number] * 2, None
        library.int8_product.argtypes = [pointer] * 3 + [number] * 2
        library.bounded_argmax.argtypes = [pointer] * 3 + [number] * 2 + [pointer] * 2
        library.product_argmax.argtypes = [pointer] * 2 + [number] * 2 + [pointer] * 2
        if library.compressed_rows():
            library.exponent_tables.argtypes = library.compress.argtypes = [pointer, number]
        library.run_layers.argtypes = library.draft.argtypes = [pointer]
    return library, slower


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Shape,
    StepTokens,
    Product,
    Int8Weights,
    NativeRouter,
    NativeExperts,
    NativeLayer,
    LayersTask,
    DraftTask,
    Compression,
)
"""In the order of `rayskip_sizes`, which ends with the second where there are no products."""


def check_sizes(library: Library) -> None:
    """Raises RuntimeError where a structure here is not as large as the kernels' own."""
    own = STRUCTURES if library.has_products() else STRUCTURES[:2]
    theirs = list((c_int64 * len(own)).in_dll(library, "rayskip_sizes"))
    for structure, size in zip(own, theirs, strict=True):
        if ctypes.sizeof(structure) != size:
            raise RuntimeError(
                f"{structure.__name__} has {ctypes.sizeof(structure)} bytes in library.py and {size} in kernels.c"
            )


def _compiled(defines: tuple[str, ...]) -> Path:
    """The shared library, compiled unless the cache has it. Its folder's name tells source, flags, compiler, CPU
    and user. Raises ModelError without a compiler, or with a cache that is not to be trusted."""
    compiler = shlex.split(os.environ.get("CC", "")) or list(filter(None, map(shutil.which, COMPILERS)))[:1]
    if not compiler:
        raise ModelError(f"no C compiler found ({', '.join(COMPILERS)}, or name one in CC)")
    programs = [found for word in compiler if (found := shutil.which(word))]
    command = [*compiler, *FLAGS, f"-march={MARCH}", *defines]
    key = hashlib.blake2b(digest_size=10)
    for part in (*SOURCES, *map(Path, programs)):  # of one name there may be several compilers, or scripts
        key.update(part.read_bytes())
    key.update(" ".join([*command, _cpu(), str(os.getuid())]).encode())
    target = cache_root() / "kernels" / key.hexdigest()

    def compile_into(draft: Path) -> None:
        library = draft / LIBRARY
        sources = (str(source) for source in SOURCES if source.suffix == ".c")
        subprocess.run([*command, *sources, "-o", str(library)], check=True, capture_output=True, text=True)
        library.chmod(0o700)
        (draft / DIGEST).write_text(_digest(library))

    if not _is_whole(target):
        with _locked(target):
            if not _is_whole(target):  # nobody else has compiled it meanwhile
                shutil.rmtree(target, ignore_errors=True)
                publish(target, compile_into)
    used(target)
    return target / LIBRARY


def _is_whole(target: Path) -> bool:
    """Whether a folder holds what was compiled into it. Raises ModelError where others may have written there."""
    try:
        for path in (target, target / LIBRARY):
            if not is_own(path):
                raise ModelError(
                    f"{path} may have been written by another user and is not loaded; "
                    f"set RAYSKIP_CACHE to a folder of your own"
                )
        return (target / DIGEST).read_text() == _digest(target / LIBRARY)
    except FileNotFoundError:
        return False


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Wait for other processes of this user that compile the same."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise ModelError(f"cannot write to {lock.parent} ({error.strerror}); set RAYSKIP_CACHE") from error
    with file:
        with suppress(OSError):  # a file system without locks: each compiles, and one publishes
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _cpu() -> str:
    """What -march=native depends on, as far as the system tells."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"
