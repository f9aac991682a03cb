"""What a training computes in."""

from __future__ import annotations

import torch

MULTIPLY_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What CPUs that multiply in bfloat16 are said to have, x86 ones and Arm ones."""


def fast_dtype() -> torch.dtype:
    """bfloat16 on GPUs and CPUs that multiply in it; float32 on others, where torch's bfloat16 is far slower."""
    has = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or any(has.get(name) for name in MULTIPLY_BF16):
        return torch.bfloat16
    return torch.float32
