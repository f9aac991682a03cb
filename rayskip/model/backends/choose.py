"""Which backend computes a model: one per kind of device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rayskip.errors import ConfigError, first_line
from rayskip.model.backends.cpu.allocator import keep_freed_memory
from rayskip.model.backends.cpu.backend import cpu_backend
from rayskip.model.backends.cpu.library import DEFINES, loaded
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.spec import Spec


def _cuda_backend(spec: Spec, dtype: torch.dtype, device: torch.device) -> TorchBackend:
    from rayskip.model.backends.cuda.backend import cuda_backend  # brings torch's compiler along, for seconds

    return cuda_backend(spec, dtype, device)


BACKENDS: dict[str, Callable[[Spec, torch.dtype, torch.device], TorchBackend]] = {
    "cpu": cpu_backend,
    "cuda": _cuda_backend,
}


def choose_backend(spec: Spec, dtype: torch.dtype, device: torch.device) -> TorchBackend:
    """The fastest that serves the model on the device."""
    return BACKENDS[device.type](spec, dtype, device)


def prepare_backend(dtype: torch.dtype, device: torch.device) -> None:
    """What `choose_backend` needs of the device and not of the model, and takes its time at first: a compiler."""
    if device.type == "cpu" and dtype in DEFINES:
        loaded(dtype)


def open_device(name: str | None) -> torch.device:
    """A device to load a model on, by torch's name; None: CUDA when there is one, else the CPU.

    Raises ConfigError for one that is not there.
    """
    keep_freed_memory()
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in BACKENDS:
        raise ConfigError(f"device: {name!r} is none of {', '.join(BACKENDS)}")
    try:
        check_device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: torch {torch.__version__} cannot use {name!r}: {first_line(error)}"
        ) from error
    return torch.device(name)


def check_device(name: str) -> None:
    """Raises RuntimeError or AssertionError where torch cannot compute on a device: it may lack kernels for a GPU
    that it sees."""
    torch.ones(1, device=name).add(1)


def gpu_facts(device: str) -> dict[str, str]:
    """What a report says of the GPU that `device` is; nothing of a CPU."""
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
