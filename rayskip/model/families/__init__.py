"""model_type -> the module of its family, one line each. A family's file holds only what differs.

Modules are named, not imported: asking whether a model is known loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayskip.model.spec import Family

FAMILIES: dict[str, str] = {
    "arcee": "rayskip.model.families.llama",
    "cohere": "rayskip.model.families.llama",
    "cohere2": "rayskip.model.families.llama",
    "ernie4_5": "rayskip.model.families.llama",
    "exaone4": "rayskip.model.families.llama",
    "falcon": "rayskip.model.families.falcon",
    "gemma": "rayskip.model.families.llama",
    "gemma2": "rayskip.model.families.gemma",
    "gemma3": "rayskip.model.families.gemma",
    "gemma3_text": "rayskip.model.families.gemma",
    "glm": "rayskip.model.families.llama",
    "glm4": "rayskip.model.families.llama",
    "glm4_moe": "rayskip.model.families.moe",
    "gpt2": "rayskip.model.families.gpt2",
    "gpt_neox": "rayskip.model.families.gpt_neox",
    "gpt_oss": "rayskip.model.families.gpt_oss",
    "gptj": "rayskip.model.families.gptj",
    "granite": "rayskip.model.families.llama",
    "granitemoe": "rayskip.model.families.moe",
    "helium": "rayskip.model.families.llama",
    "hunyuan_v1_dense": "rayskip.model.families.llama",
    "llama": "rayskip.model.families.llama",
    "ministral": "rayskip.model.families.llama",
    "ministral3": "rayskip.model.families.llama",
    "mistral": "rayskip.model.families.llama",
    "mistral3": "rayskip.model.families.llama",
    "mixtral": "rayskip.model.families.moe",
    "nemotron": "rayskip.model.families.llama",
    "olmo": "rayskip.model.families.llama",
    "olmo2": "rayskip.model.families.llama",
    "olmo3": "rayskip.model.families.llama",
    "olmoe": "rayskip.model.families.moe",
    "opt": "rayskip.model.families.opt",
    "phi": "rayskip.model.families.llama",
    "phi3": "rayskip.model.families.llama",
    "qwen2": "rayskip.model.families.llama",
    "qwen2_5_vl": "rayskip.model.families.llama",
    "qwen2_5_vl_text": "rayskip.model.families.llama",
    "qwen2_moe": "rayskip.model.families.moe",
    "qwen2_vl": "rayskip.model.families.llama",
    "qwen2_vl_text": "rayskip.model.families.llama",
    "qwen3": "rayskip.model.families.llama",
    "qwen3_moe": "rayskip.model.families.moe",
    "qwen3_vl": "rayskip.model.families.llama",
    "qwen3_vl_text": "rayskip.model.families.llama",
    "seed_oss": "rayskip.model.families.llama",
    "smollm3": "rayskip.model.families.llama",
    "stablelm": "rayskip.model.families.llama",
    "starcoder2": "rayskip.model.families.llama",
}


def family(model_type: str) -> Family:
    """The family of a model_type in FAMILIES."""
    found: Family = import_module(FAMILIES[model_type]).FAMILY
    return found
