"""`rayskip train skip`: from a config to a fine-tuned checkpoint, labelled with its base, schedule and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayskip.config.train import TrainSkipConfig
from rayskip.model.checkpoint import LABEL, resolve, tensors_fingerprint
from rayskip.skip import full_depth, skip_policy
from rayskip.train.examples import Example, collate
from rayskip.train.loop import Point, train
from rayskip.train.prepare import frozen, prepare, transformers_model
from rayskip.train.skip import answer_logits, answer_loss, distillation_loss


def train_skip(
    config: TrainSkipConfig, on_point: Callable[[Point], None] = lambda point: None
) -> Path | None:
    """Train, and save to config.output as safetensors with its tokenizer; returns the checkpoint's folder. Of
    several processes the main one alone saves, and the others return None.

    Raises UserError for what the config names and is not there.
    """
    ready = prepare(config.model, config.data, config.batch_size)
    folder, training = ready.folder, ready.training
    model: Any = transformers_model(folder, torch.float32)
    policy = skip_policy(config.skip, model.config.get_text_config().num_hidden_layers)
    full = full_depth(len(policy.until))
    teacher = None
    if config.distill is not None:
        teacher = frozen(resolve(config.distill.teacher) if config.distill.teacher else folder)
    if config.lora is not None:
        model = _with_adapters(model, config)

    def loss(model: nn.Module, part: Sequence[Example]) -> Tensor:
        batch = collate(part, ready.end).to(next(model.parameters()).device)
        logits = answer_logits(model, batch, policy)
        value = answer_loss(logits, batch.labels)
        if teacher is None or not model.training:
            return value
        weight = config.distill.weight if config.distill else 0.0
        with torch.no_grad():
            target = answer_logits(teacher, batch, full)
        return (1 - weight) * value + weight * distillation_loss(logits, target, batch.labels)

    output = Path(config.output)

    def save(model: Any, target: Path, steps: int) -> None:
        """The whole checkpoint, or the adapter alone while there is one."""
        model.save_pretrained(target)
        label = {
            "base": config.model.path,
            "base_tensors": tensors_fingerprint(folder),
            "skip": policy.name,
            "data": config.data.model_dump(),
            "steps": steps,
            "examples": len(training),
        }
        (target / LABEL).write_text(json.dumps(label, indent=2) + "\n")

    def keep(model: nn.Module, step: int) -> None:
        save(model, output / f"step-{step}", step)
        ready.tokenizer.save_pretrained(output / f"step-{step}")

    looked_at = ready.held_out[: config.held_out_examples]
    trained = train(model, loss, training, looked_at, config, keep, on_point)
    if trained is None:
        return None
    model = trained.to(torch.bfloat16)
    if config.lora is not None:
        save(model, output / "adapter", config.steps)
        model = model.merge_and_unload()
    save(model, output / "model", config.steps)
    ready.tokenizer.save_pretrained(output / "model")
    return output / "model"


def _with_adapters(model: Any, config: TrainSkipConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(model, lora)
    wrapped.peft_config["default"].base_model_name_or_path = config.model.path  # not this machine's folder
    return wrapped
