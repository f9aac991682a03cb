"""model_type -> the module of its family, one line each. A family's file holds only what differs.

Modules are named, not imported: asking whether a model is known loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayskip.model.spec import Family

FAMILIES: dict[str, str] = {
    "llama": "rayskip.model.families.llama",
    "mistral": "rayskip.model.families.llama",
    "qwen2": "rayskip.model.families.llama",
    "qwen3": "rayskip.model.families.llama",
    "gemma2": "rayskip.model.families.gemma",
    "gemma3": "rayskip.model.families.gemma",
    "gemma3_text": "rayskip.model.families.gemma",
    "gpt_neox": "rayskip.model.families.gpt_neox",
    "opt": "rayskip.model.families.opt",
}


def family(model_type: str) -> Family:
    """The family of a model_type in FAMILIES."""
    found: Family = import_module(FAMILIES[model_type]).FAMILY
    return found
