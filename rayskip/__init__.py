"""rayskip: batch generation over datasets on Ray replicas, committed exactly once.

Importing this loads nothing else: the names below come on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayskip.config import DecodeConfig, EngineConfig, JobConfig, ModelConfig, SamplingParams
    from rayskip.engine import Engine

__all__ = [
    "DecodeConfig",
    "Engine",
    "EngineConfig",
    "JobConfig",
    "ModelConfig",
    "SamplingParams",
    "__version__",
]

_HOMES = {name: "rayskip.engine" if name == "Engine" else "rayskip.config" for name in __all__[:-1]}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The installed version; a source tree put on the path, as on a bare GPU box, has none."""
    from importlib.metadata import PackageNotFoundError, version  # half of what --help takes to import

    try:
        return version("rayskip")
    except PackageNotFoundError:
        return "0+unknown"
