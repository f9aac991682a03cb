"""A checkpoint's config.json as transformers reads it: defaults, older names and rotary frequencies are its own.

transformers takes seconds to import, so what it made of a config is kept in the user's cache: one that was read
before needs neither it nor torch. Does not know which families there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayskip.errors import ModelError, shown
from rayskip.user_cache import recall

LENGTH_DEPENDENT_ROPES = ("longrope",)
"""Of which angles change with the text's length. Those of `dynamic` do so past max_position_embeddings alone."""

Frequencies = dict[str, Any]
"""inverse: of each pair of turned dimensions, radians a position. scaling: of cosines and sines."""

RotaryModule = Callable[[Any], Any]
"""Makes transformers' rotary module of its config."""


class Config:
    """Attributes are those of transformers' config. ropes: rotary frequencies by layer type, "default" where all
    layers share them; what is wrong with them, where transformers can make none."""

    def __init__(
        self, values: dict[str, Any], ropes: dict[str, Frequencies | str], text: Config | None
    ) -> None:
        vars(self).update(values)
        self.ropes = ropes
        self._text = text

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def get_text_config(self) -> Config:
        """Of the model's language part, which may be the whole."""
        return self._text or self


def read_config(folder: Path, rotary: Callable[[str], RotaryModule | None]) -> Config:
    """The config of the checkpoint in the folder. rotary: the rotary module of a model_type, which may be imported
    for it; None where positions are learned.

    Raises ModelError where transformers cannot read it.
    """
    file = folder / "config.json"
    made = recall("configs", lambda: [*reader(), file.read_bytes()], lambda: _by_transformers(file, rotary))
    text = made["text"] and Config(made["text"], made["ropes"], None)
    return Config(made["whole"], made["ropes"], text)


@cache
def reader() -> tuple[bytes | str, ...]:
    """What decides how a checkpoint is read, beside its files: this code, and the libraries'."""
    own = sorted(Path(__file__).parent.rglob("*.py"))
    return *(file.read_bytes() for file in own), *map(version, ("transformers", "torch"))


def _by_transformers(file: Path, rotary: Callable[[str], RotaryModule | None]) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks values by whatever happens to fail on them
        raise ModelError(f"{file}: transformers cannot read it ({' '.join(str(error).split())})") from error
    text = config.get_text_config()
    return {
        "whole": _values(config),
        "text": None if text is config else _values(text),
        "ropes": _ropes(text, rotary),
    }


def _values(config: Any) -> dict[str, Any]:
    """What of a config JSON can hold: what decides a decoder is numbers, texts, and lists and objects of them. What
    a model has a name of its own for is there by the common one too."""
    values = {"model_type": config.model_type}
    for name, value in vars(config).items():
        try:
            values[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    for common, own in config.attribute_map.items():
        values.setdefault(common, values.get(own))
    return values


def _ropes(config: Any, rotary: Callable[[str], RotaryModule | None]) -> dict[str, Frequencies | str]:
    module = rotary(config.model_type)
    if module is None:
        return {}
    parameters = config.rope_parameters
    types = [each for each in set(getattr(config, "layer_types", None) or ()) if each in (parameters or {})]
    if not types:
        return {"default": _frequencies(config, module, parameters, "")}
    return {each: _frequencies(config, module, parameters[each], f"{each}_") for each in types}


def _frequencies(config: Any, module: RotaryModule, parameters: Any, prefix: str) -> Frequencies | str:
    import torch

    try:
        if (kind := parameters["rope_type"]) in LENGTH_DEPENDENT_ROPES:
            return f"rope_type {kind!r} depends on the text's length and is not supported"
        with torch.device("cpu"):
            made = module(config)
        inverse, scaling = (getattr(made, prefix + name) for name in ("inv_freq", "attention_scaling"))
        return {"inverse": inverse.tolist(), "scaling": float(scaling)}
    except Exception as error:  # whatever the arithmetic makes of a value that is missing or of another type
        return f"transformers makes no rope of {shown(parameters)} ({type(error).__name__}: {error})"
