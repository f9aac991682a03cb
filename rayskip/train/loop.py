"""The one training loop, on accelerate: CPU, one GPU or many; resumes from its last checkpoint.

Knows no task: a loss is a function of (model, examples). Writes into the output folder

    state/        what a resume needs, of the last save
    curve.jsonl   one line per step (loss, learning rate) and per evaluation (held-out loss)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from rayskip.train.examples import Example, batches

CLIP = 1.0
"""Largest gradient norm."""

Loss = Callable[[nn.Module, Sequence[Example]], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; see the config sections of the trainings."""

    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup_steps: int
    seed: int
    evaluate_every: int
    save_every: int
    keep_every: int | None


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
    schedule: Schedule,
    output: Path,
    keep: Callable[[nn.Module, int], None],
    on_point: Callable[[Point], None] = lambda point: None,
) -> nn.Module:
    """Fit the model's trainable parameters; returns the model, unwrapped. Goes on where an earlier call stopped.

    `keep` is given the model, unwrapped, and the steps done, every schedule.keep_every steps.
    """
    set_seed(schedule.seed)
    accelerator = Accelerator(
        mixed_precision="bf16",
        gradient_accumulation_steps=schedule.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    # accelerate steps a schedule once per process
    warmup, steps = (count * accelerator.num_processes for count in (schedule.warmup_steps, schedule.steps))
    rate = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    model, optimizer, rate = accelerator.prepare(model, optimizer, rate)
    state = output / "state"
    done = _resume(accelerator, state)
    own = _own_batches(examples, schedule, accelerator, done)
    began = time.monotonic()
    for step in range(done + 1, schedule.steps + 1):
        model.train()
        losses = []
        for _ in range(schedule.accumulate):
            with accelerator.accumulate(model):
                value = loss(model, next(own))
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable, CLIP)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                losses.append(float(value.detach()))
        last = step == schedule.steps
        measured = None
        if last or step % schedule.evaluate_every == 0:
            measured = evaluate(model, loss, held_out, schedule.batch_size)
        point = Point(
            step, time.monotonic() - began, sum(losses) / len(losses), rate.get_last_lr()[0], measured
        )
        if accelerator.is_main_process:
            _append(output / "curve.jsonl", point)
            on_point(point)
        if schedule.keep_every and step % schedule.keep_every == 0 and accelerator.is_main_process:
            keep(accelerator.unwrap_model(model), step)
        if last or step % schedule.save_every == 0:
            accelerator.save_state(str(state))
            if accelerator.is_main_process:
                (state / "step.json").write_text(json.dumps(step))
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped


def evaluate(model: nn.Module, loss: Loss, examples: Sequence[Example], batch_size: int) -> float:
    """Mean loss over examples, without learning."""
    model.eval()
    with torch.no_grad():
        parts = [examples[at : at + batch_size] for at in range(0, len(examples), batch_size)]
        total = sum(float(loss(model, part)) * len(part) for part in parts)
    return total / len(examples)


def _own_batches(
    examples: Sequence[Example], schedule: Schedule, accelerator: Accelerator, done: int
) -> Iterator[Sequence[Example]]:
    """This process's share of the endless batches, from step `done` on."""
    processes, index = accelerator.num_processes, accelerator.process_index
    whole = batches(examples, schedule.batch_size * processes, schedule.seed)
    for batch in islice(whole, done * schedule.accumulate, None):
        yield batch[index::processes]


def _resume(accelerator: Accelerator, state: Path) -> int:
    """Steps already done; their state is loaded."""
    if not (marker := state / "step.json").exists():
        return 0
    accelerator.load_state(str(state))
    return int(json.loads(marker.read_text()))


def _append(path: Path, point: Point) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")
