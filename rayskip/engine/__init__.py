"""The generation engine: prompts in, generations out. Does not know files or Ray."""

from rayskip.engine.engine import Engine
from rayskip.engine.requests import Completion

__all__ = ["Completion", "Engine"]
