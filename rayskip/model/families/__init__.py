"""model_type -> family, one line each. A family's file holds only what differs."""

from __future__ import annotations

from rayskip.model.families import gemma, gpt_neox, llama, opt
from rayskip.model.spec import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": llama.FAMILY,
    "qwen2": llama.FAMILY,
    "qwen3": llama.FAMILY,
    "gemma2": gemma.FAMILY,
    "gemma3_text": gemma.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "opt": opt.FAMILY,
}
