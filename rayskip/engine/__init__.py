"""The generation engine: prompts in, generations out. Does not know files or Ray."""

from rayskip.engine.engine import Completion, Engine

__all__ = ["Completion", "Engine"]
