"""Which model_types have a causal LM in transformers. Importing this loads neither torch nor transformers."""

from __future__ import annotations

import difflib
from importlib.metadata import version

from rayskip.errors import shown
from rayskip.model.families import FAMILIES
from rayskip.user_cache import recall


def is_known(model_type: object) -> bool:
    """Whether it is ours, or transformers has a causal LM of that type."""
    return isinstance(model_type, str) and (model_type in FAMILIES or model_type in causal_types())


def causal_types() -> list[str]:
    """transformers' model_types of causal LMs."""
    known: list[str] = recall("causal-types", lambda: ["1", version("transformers")], _causal_types)
    return known


def _causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def unknown(model_type: object) -> str:
    """What is said of a model_type that is not known."""
    known = sorted({*FAMILIES, *causal_types()})
    near = difflib.get_close_matches(model_type, known, n=1) if isinstance(model_type, str) else []
    nearest = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"model_type {shown(model_type)}{nearest}; known: {', '.join(sorted(FAMILIES))}, and what transformers "
        f"{version('transformers')} has a causal LM of"
    )
