"""Memory, on the host and on a device: taking it, what is left of it, and keeping what was freed."""

from __future__ import annotations

import ctypes
import math
import sys

import numpy as np
import psutil
import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GB = 1 << 30
LINE = 64
"""Bytes of a cache line."""


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def release(device: torch.device) -> None:
    """Give back what is free in pieces, after memory ran out. The host's memory needs no such call."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks instead of returning them to the system.

    A step's temporaries are a few hundred kilobytes each: by default every one is mapped, faulted in page by page
    and unmapped again (measured: 4 to 14% of a decode step on 2 cores). Elsewhere than on glibc, nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _ONE_GB)
        libc.mallopt(_M_TRIM_THRESHOLD, _ONE_GB)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that begin at a cache line. Another line follows: the kernels read whole vectors.

    On CPU they are numpy's, which leaves fresh memory untouched and asks for huge pages: memory is taken when it is
    first written, and a gigabyte costs a tenth of a second in place of one (measured on a virtual machine).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 2 * LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
