"""rayskip: batch generation over datasets on Ray replicas, committed exactly once.

`run` is a whole job, from config to report; `Engine` generates in this process, without Ray.

Importing this loads nothing else: the names below come on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayskip import errors
    from rayskip.config import DecodeConfig, EngineConfig, JobConfig, ModelConfig, SamplingParams
    from rayskip.data.records import Generation
    from rayskip.driver.report import Report
    from rayskip.engine import Completion, Engine
    from rayskip.job import run

__all__ = [
    "Completion",
    "DecodeConfig",
    "Engine",
    "EngineConfig",
    "Generation",
    "JobConfig",
    "ModelConfig",
    "Report",
    "SamplingParams",
    "__version__",
    "errors",
    "run",
]

_HOMES = {
    "rayskip.config": ("DecodeConfig", "EngineConfig", "JobConfig", "ModelConfig", "SamplingParams"),
    "rayskip.data.records": ("Generation",),
    "rayskip.driver.report": ("Report",),
    "rayskip.engine": ("Completion", "Engine"),
    "rayskip.job": ("run",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name == "errors":
        return import_module("rayskip.errors")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    """The installed version; a source tree put on the path, as on a bare GPU box, has none."""
    from importlib.metadata import PackageNotFoundError, version  # half of what --help takes to import

    try:
        return version("rayskip")
    except PackageNotFoundError:
        return "0+unknown"
