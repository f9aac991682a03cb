"""What several families share when reading a checkpoint: names, norms, rotary tables, end tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rayskip.errors import ModelError
from rayskip.model.spec import Dense, Norm, Rope


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors under their short names: the first of `prefixes` that fits is dropped, so that a
    base model's checkpoint and a causal LM's read alike. A missing name is a ModelError."""

    def __init__(self, tensors: Mapping[str, Tensor], *prefixes: str) -> None:
        self._tensors = {_without(prefixes, name): tensor for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"the checkpoint has no tensor {name!r}; it has {', '.join(sorted(self._tensors)[:6])}, …")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> Dense:
        """The linear layer `name`, with its bias where there is one."""
        return Dense(self[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def rms_norm(self, name: str, eps: float, offset: float = 0.0) -> Norm:
        """RMSNorm; Gemma stores its weight less one and multiplies in float32 (offset 1)."""
        weight = self[f"{name}.weight"]
        return Norm("rms", weight.float() + offset if offset else weight, None, eps)

    def layer_norm(self, name: str, eps: float) -> Norm:
        return Norm("layer", self[f"{name}.weight"], self[f"{name}.bias"], eps)


def _without(prefixes: tuple[str, ...], name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def rope(rotary: Callable[..., tuple[Tensor, Tensor]], positions: int, *layer_type: str) -> Rope:
    """The table of a transformers rotary module, so that every kind of rope scaling is transformers' own."""
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None], *layer_type)
    return Rope(cos[0], sin[0])


def end_tokens(config: Any) -> tuple[int, ...]:
    """End-of-sequence ids of a config: one, several or none."""
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
