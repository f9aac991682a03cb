"""The one training loop, on accelerate: CPU, one GPU or many; resumes from its last checkpoint.

Knows no task: a loss is a function of (model, examples). Writes into the output folder

    state/        what a resume needs: step-N of the last save, and training.json, which says of which training
    curve.jsonl   one line per step (loss, learning rate) and per evaluation (held-out loss)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from rayskip.config.train import TrainingConfig
from rayskip.errors import ConfigError
from rayskip.train.examples import Example, batches
from rayskip.train.precision import fast_dtype

CLIP = 1.0
"""Largest gradient norm."""

_ONLY_WATCHES = ("name", "output", "evaluate_every", "held_out_examples", "save_every", "keep_every")
"""Keys of a config that do not decide what is learnt."""

Loss = Callable[[nn.Module, Sequence[Example]], Tensor]


@dataclass(frozen=True)
class Point:
    """One entry of the curve: after `step` steps, `seconds` since the process began; losses in nats per token."""

    step: int
    seconds: float
    loss: float
    learning_rate: float
    held_out: float | None = None


def train(
    model: nn.Module,
    loss: Loss,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainingConfig,
    keep: Callable[[nn.Module, int], None],
    on_point: Callable[[Point], None] = lambda point: None,
) -> nn.Module | None:
    """Fit the model's trainable parameters; returns the model, unwrapped, in the main process and None in the
    others, which have nothing left to do. Goes on where an earlier call stopped.

    `keep` is given the model, unwrapped, and the steps done, every config.keep_every steps. Raises ConfigError when
    config.output holds another training.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    done = _steps_done(output, config)
    set_seed(config.seed)
    accelerator = Accelerator(
        mixed_precision="bf16" if fast_dtype() == torch.bfloat16 else "no",
        gradient_accumulation_steps=config.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    # accelerate steps a schedule once per process
    warmup, steps = (count * accelerator.num_processes for count in (config.warmup_steps, config.steps))
    rate = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    model, optimizer, rate = accelerator.prepare(model, optimizer, rate)
    if done:
        accelerator.load_state(str(_state(output, done)))
    if accelerator.is_main_process:
        _cut(output / "curve.jsonl", done)
    own = _own_batches(examples, config, accelerator, done)
    began = time.monotonic()
    for step in range(done + 1, config.steps + 1):
        model.train()
        losses = []
        for _ in range(config.accumulate):
            with accelerator.accumulate(model):
                value = loss(model, next(own))
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable, CLIP)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                losses.append(float(value.detach()))
        last = step == config.steps
        measured = None
        if last or step % config.evaluate_every == 0:
            measured = evaluate(model, loss, held_out, config.batch_size)
        point = Point(
            step, time.monotonic() - began, sum(losses) / len(losses), rate.get_last_lr()[0], measured
        )
        if accelerator.is_main_process:
            _append(output / "curve.jsonl", point)
            on_point(point)
        if config.keep_every and step % config.keep_every == 0 and accelerator.is_main_process:
            keep(accelerator.unwrap_model(model), step)
        if last or step % config.save_every == 0:
            accelerator.save_state(str(_state(output, step)))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _mark(output, config, step)
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped if accelerator.is_main_process else None


def evaluate(model: nn.Module, loss: Loss, examples: Sequence[Example], batch_size: int) -> float:
    """Mean loss over examples, without learning."""
    model.eval()
    with torch.no_grad():
        parts = [examples[at : at + batch_size] for at in range(0, len(examples), batch_size)]
        total = sum(float(loss(model, part)) * len(part) for part in parts)
    return total / len(examples)


def _own_batches(
    examples: Sequence[Example], config: TrainingConfig, accelerator: Accelerator, done: int
) -> Iterator[Sequence[Example]]:
    """This process's share of the endless batches, from step `done` on."""
    processes, index = accelerator.num_processes, accelerator.process_index
    whole = batches(examples, config.batch_size * processes, config.seed)
    for batch in islice(whole, done * config.accumulate, None):
        yield batch[index::processes]


def _state(output: Path, step: int) -> Path:
    return output / "state" / f"step-{step}"


def _mark(output: Path, config: TrainingConfig, step: int) -> None:
    """From now on a resume begins after `step`; the states before it go."""
    marker = output / "state" / "training.json"
    whole = marker.with_suffix(".new")
    whole.write_text(json.dumps({"step": step, "training": _identity(config)}, indent=2) + "\n")
    whole.replace(marker)
    for state in marker.parent.glob("step-*"):
        if state != _state(output, step):
            shutil.rmtree(state)


def _identity(config: TrainingConfig) -> dict[str, Any]:
    """What decides what is learnt."""
    return config.model_dump(mode="json", exclude=set(_ONLY_WATCHES))


def _steps_done(output: Path, config: TrainingConfig) -> int:
    """Of this training, by its last save."""
    marker = output / "state" / "training.json"
    if not marker.exists():
        return 0
    earlier, own = json.loads(marker.read_text()), _identity(config)
    if differ := [key for key, value in own.items() if earlier["training"].get(key) != value]:
        raise ConfigError(
            f"output: {output} holds a training with another {' and '.join(differ)}; delete it or name "
            "another folder"
        )
    return int(earlier["step"])


def _cut(curve: Path, done: int) -> None:
    """Take out the points of steps that are done again."""
    lines = curve.read_text().splitlines(keepends=True) if curve.exists() else []
    curve.write_text("".join(line for line in lines if json.loads(line)["step"] <= done))


def _append(path: Path, point: Point) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")
