"""Fine-tuning under a skip schedule: every position runs its own layers, as it will in decoding.

Schedules are nested, so the positions that a layer runs are the prompt and the first so many of the answer: with
prompts padded on the left they are a prefix of the batch's columns. A layer is given that prefix and the rest
passes by, so skipped work is not computed in training either (SkipDecode, arXiv 2307.02628, section 3).

Works on any transformers decoder whose layers take hidden states first, and masks and positions by those names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayskip.errors import ModelError
from rayskip.skip import SkipPolicy
from rayskip.train.examples import IGNORED, TrainBatch


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers in a transformers causal LM, wrapped by peft or not."""
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(model).__name__}: its decoder layers cannot be found")


@contextmanager
def skipping(model: nn.Module, policy: SkipPolicy, prompt_width: int) -> Iterator[None]:
    """Inside the block every layer of `model` runs only the columns that `policy` gives it."""
    hooks = []
    for layer, until in zip(decoder_layers(model), policy.until, strict=True):
        columns = _Columns(prompt_width + until)
        hooks.append(layer.register_forward_pre_hook(columns.cut, with_kwargs=True))
        hooks.append(layer.register_forward_hook(columns.restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Columns:
    """Gives one layer the first `count` columns and puts the others back behind its result."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._rest: Tensor | None = None

    def cut(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (_, hidden), *others = inspect.signature(layer.forward).bind(*args, **kwargs).arguments.items()
        count = self._count
        if count >= hidden.shape[1]:
            self._rest = None
            return None
        self._rest = hidden[:, count:]
        kwargs = dict(others)
        kwargs |= kwargs.pop("kwargs", {})  # what a layer takes by no name of its own
        if (mask := kwargs.get("attention_mask")) is not None:  # [B, 1, T, T]
            kwargs["attention_mask"] = mask[:, :, :count, :count]
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[:, :count]
        if (turns := kwargs.get("position_embeddings")) is not None:
            kwargs["position_embeddings"] = tuple(part[:, :count] for part in turns)
        return (hidden[:, :count],), kwargs

    def restore(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if self._rest is None:
            return None
        if isinstance(output, tuple):
            return (torch.cat((output[0], self._rest), dim=1), *output[1:])
        return torch.cat((output, self._rest), dim=1)


def answer_logits(model: nn.Module, batch: TrainBatch, policy: SkipPolicy) -> Tensor:
    """Logits [B, R, V] that choose each of the R answer tokens, every position under its own layers."""
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with skipping(model, policy, batch.prompt_width):
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=batch.labels.shape[1] + 1,
        )
    logits: Tensor = out.logits[:, :-1]
    return logits


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the answers' tokens; logits [B, R, V], labels [B, R]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean KL divergence from the teacher's distribution over the answers' tokens; logits [B, R, V]."""
    where = labels != IGNORED
    ours, theirs = logits[where].float(), teacher[where].float()
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
