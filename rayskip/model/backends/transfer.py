"""Numbers on their way between host and device, without waiting for what the device is doing.

On CPU nothing moves. Knows nothing of what the numbers are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list of numbers, or of equally long lists, as a tensor. By numpy, which reads lists several times faster
    than torch; through pinned memory, since a copy from other memory waits until the device is done."""
    kind = np.int64 if dtype == torch.long else np.float64
    tensor = torch.from_numpy(np.asarray(values, kind)).to(dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """A tensor's copy on the host, begun now: whoever asks for it waits for what computes it, and no longer."""

    def __init__(self, x: Tensor) -> None:
        self._event = None
        self._copy = x
        if x.device.type == "cuda":
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tolist(self) -> Any:
        """As `Tensor.tolist`."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()
