"""Memory, on the host and on a device: taking it, and what is left of it."""

from __future__ import annotations

import math

import numpy as np
import psutil
import torch
from torch import Tensor

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
