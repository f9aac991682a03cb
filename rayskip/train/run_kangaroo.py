"""`rayskip train kangaroo`: from a config to adapters with their held-out quality, one folder per exit layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rayskip.config import TrainKangarooConfig
from rayskip.errors import ConfigError, ModelError
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.kangaroo import KangarooLabel, save_kangaroo
from rayskip.train.examples import Batch, Example, collate
from rayskip.train.kangaroo import (
    Adapters,
    DraftQuality,
    adapters_loss,
    draft_quality,
    frequent_tokens,
    run_target,
)
from rayskip.train.loop import Point, Schedule, train
from rayskip.train.prepare import frozen, prepare


def train_kangaroo(
    config: TrainKangarooConfig, on_point: Callable[[Point], None] = lambda point: None
) -> list[DraftQuality]:
    """Train one adapter per exit layer, in one pass; saved to config.output/exit-N, qualities to quality.json.

    Raises UserError for what the config names and is not there.
    """
    ready = prepare(config.model, config.data, config.batch_size)
    target = frozen(ready.folder)
    _check(config, target)
    token_ids = frequent_tokens(ready.training, config.head_tokens, target.config.vocab_size)
    adapters = Adapters(target, config.exit_layers, token_ids)

    def batch_of(part: Sequence[Example], model: nn.Module) -> Batch:
        device = next(model.parameters()).device
        target.to(device)
        return collate(part, ready.end).to(device)

    def loss(model: nn.Module, part: Sequence[Example]) -> Tensor:
        targets = run_target(target, batch_of(part, model), config.exit_layers)
        return adapters_loss(model, target, targets, token_ids)

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(**{name: getattr(config, name) for name in Schedule.__dataclass_fields__})
    looked_at = ready.held_out[: config.held_out_examples]
    label = {"base": config.model.path, "base_tensors": tensors_fingerprint(ready.folder)}

    def save(model: nn.Module, folder: Path, steps: int) -> list[DraftQuality]:
        def batches() -> Iterator[Batch]:
            for at in range(0, len(looked_at), config.batch_size):
                yield batch_of(looked_at[at : at + config.batch_size], model)

        model.eval()
        found = draft_quality(model, target, batches(), token_ids, config.gamma, config.eta)
        for quality, adapter in zip(found, model.each.values(), strict=True):  # type: ignore[operator]
            own = KangarooLabel(
                **label,
                exit_layer=quality.exit_layer,
                tokens=len(token_ids),
                steps=steps,
                agreement=round(quality.agreement, 4),
            )
            tensors = {**adapter.tensors(), "token_ids": token_ids}
            save_kangaroo(folder / f"exit-{quality.exit_layer}", own, tensors)
        described = [asdict(quality) for quality in found]
        (folder / "quality.json").write_text(json.dumps(described, indent=2) + "\n")
        return found

    def keep(model: nn.Module, step: int) -> None:
        save(model, output / f"step-{step}", step)

    model = train(adapters, loss, ready.training, looked_at, schedule, output, keep, on_point)
    return save(model, output, config.steps)


def _check(config: TrainKangarooConfig, target: Any) -> None:
    """Refuse what the adapter is not made for. Raises ModelError or ConfigError."""
    if target.config.model_type != "llama":
        raise ModelError(
            f"model.path: Kangaroo adapters can be trained for Llama models, and {config.model.path} is a "
            f"{target.config.model_type}"
        )
    layers = target.config.num_hidden_layers
    if wrong := [layer for layer in config.exit_layers if not 1 <= layer < layers]:
        raise ConfigError(
            f"exit_layers: {wrong[0]} is not between 1 and {layers - 1}, the model's layers less one"
        )


def format_draft_quality(qualities: Sequence[DraftQuality]) -> str:
    """A table for a terminal."""
    head = f"{'exit layer':<12}{'agreement':>10}{'tokens/round':>14}{'listed':>8}"
    rows = [
        f"{q.exit_layer:<12}{q.agreement:>10.3f}{q.tokens_per_round:>14.2f}{q.covered:>8.3f}"
        for q in qualities
    ]
    return "\n".join([head, *rows])
