"""What a training computes in."""

from __future__ import annotations

import torch


def fast_dtype() -> torch.dtype:
    """bfloat16 on GPUs and CPUs that multiply in it; float32 on others, where torch's bfloat16 is far slower."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
