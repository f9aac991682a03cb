"""What machine this is, as far as it decides how fast a model runs on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """Linux knows the model; elsewhere the architecture has to do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def machine(device: torch.device) -> str:
    """Processor, cores and libraries, and the GPU where the device is one."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {capability}, {os.cpu_count()} cores, torch {torch.__version__}, GPU {gpu}"
