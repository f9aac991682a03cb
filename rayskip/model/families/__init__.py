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
    "glm4_moe": "rayskip.model.families.moe",
    "gpt_neox": "rayskip.model.families.gpt_neox",
    "gpt_oss": "rayskip.model.families.gpt_oss",
    "granitemoe": "rayskip.model.families.moe",
    "mixtral": "rayskip.model.families.moe",
    "olmoe": "rayskip.model.families.moe",
    "opt": "rayskip.model.families.opt",
    "qwen2_moe": "rayskip.model.families.moe",
    "qwen3_moe": "rayskip.model.families.moe",
}


def family(model_type: str) -> Family:
    """The family of a model_type in FAMILIES."""
    found: Family = import_module(FAMILIES[model_type]).FAMILY
    return found
