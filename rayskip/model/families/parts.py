"""What several families share when reading a config and a checkpoint: names, norms, rotary tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayskip.errors import ModelError
from rayskip.model.spec import Activation, Dense, Norm, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


class Tensors:
    """A checkpoint's tensors under their short names: the first of `prefixes` that fits is dropped, so that a
    base model's checkpoint and a causal LM's read alike. A missing name is a ModelError."""

    def __init__(self, stored: Mapping[str, Tensor], *prefixes: str) -> None:
        self._stored = stored
        self._names = {_without(prefixes, name): name for name in stored}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            some = ", ".join(sorted(self._names)[:6])
            raise ModelError(f"the checkpoint has no tensor {name!r}; it has {some}, …")
        return self._stored[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def dense(self, name: str) -> Dense:
        """The linear layer `name`, with its bias where there is one."""
        has_bias = f"{name}.bias" in self
        return Dense(self[f"{name}.weight"], self[f"{name}.bias"] if has_bias else None)

    def head(self, embed: Tensor, config: Any, name: str = "lm_head") -> Dense:
        """The output layer: the embedding itself where the config ties them."""
        return Dense(embed) if config.tie_word_embeddings else self.dense(name)

    def rms_norm(self, name: str, eps: float, offset: float = 0.0) -> Norm:
        """RMSNorm; Gemma stores its weight less one and multiplies in float32 (offset 1)."""
        weight = self[f"{name}.weight"]
        return Norm("rms", weight.float() + offset if offset else weight, None, eps)

    def layer_norm(self, name: str, eps: float) -> Norm:
        return Norm("layer", self[f"{name}.weight"], self[f"{name}.bias"], eps)


def _without(prefixes: tuple[str, ...], name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def rope(config: Any, rotary: Callable[..., tuple[Tensor, Tensor]], *layer_type: str) -> Rope:
    """The table of a transformers rotary module, so that every kind of rope scaling is transformers' own.

    Raises ModelError for a kind whose angles change with the length of the text: cached keys, and rows of
    other lengths, would have been turned by other angles.
    """
    parameters = config.rope_parameters[layer_type[0]] if layer_type else config.rope_parameters
    if (kind := parameters["rope_type"]) in LENGTH_DEPENDENT_ROPES:
        raise ModelError(f"config.json: rope_type {kind!r} depends on the text's length and is not supported")
    cos, sin = rotary(torch.zeros(1), torch.arange(config.max_position_embeddings)[None], *layer_type)
    return Rope(cos[0], sin[0])


def activation(name: str) -> Activation:
    """The feed-forward's activation under transformers' name for it."""
    if name not in ACTIVATIONS:
        raise ModelError(
            f"config.json: activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
