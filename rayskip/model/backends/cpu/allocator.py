"""How the process's own memory is handed out."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GB = 1 << 30


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks instead of returning them to the system.

    A step's temporaries are a few hundred kilobytes each: by default every one is mapped, faulted in page by page
    and unmapped again (measured: 4 to 14% of a decode step on 2 cores). Elsewhere than on glibc, nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _ONE_GB)
        libc.mallopt(_M_TRIM_THRESHOLD, _ONE_GB)
