"""Named places where a test may have a process die, as a segmentation fault or the system would have it.

RAYSKIP_FAILPOINTS names one, as in "replica.row:kill@17,23": there the process kills itself for each of those
values. Does not know what the points are for.
"""

from __future__ import annotations

import os
import signal


def failpoint(name: str, value: int) -> None:
    """Die here if the environment says so."""
    point, _, values = os.environ.get("RAYSKIP_FAILPOINTS", "").partition(":kill@")
    if point == name and str(value) in values.split(","):
        os.kill(os.getpid(), signal.SIGKILL)
