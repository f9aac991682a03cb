"""`rayskip train kangaroo` and `rayskip train medusa`: from a config to what drafts, with its held-out quality."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rayskip.config.train import DraftTrainingConfig, TrainKangarooConfig, TrainMedusaConfig
from rayskip.errors import ConfigError, ModelError
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.trained import KangarooLabel, Label, MedusaLabel, check_shapes, load_trained, save_trained
from rayskip.train import kangaroo, medusa
from rayskip.train.drafts import (
    DraftQuality,
    Guesses,
    cut_off,
    frequent_tokens,
    guess,
    run_target,
    soft_loss,
    tokens_per_round,
)
from rayskip.train.examples import Example, TrainBatch, collate
from rayskip.train.loop import Point, train
from rayskip.train.prepare import Prepared, frozen, prepare

OnPoint = Callable[[Point], None]

HEAD_TOKENS = 16384
"""That a draft's head scores where a config doesn't say."""


@dataclass(frozen=True)
class _Task:
    """What the two trainings differ in.

    exit_layers: layers whose input it reads. token_ids: its head's tokens. module: what learns, of (target,
    token ids). measure: of held-out guesses by name and the share of tokens listed. parts: what is saved,
    (subfolder, tensors, label, quality).
    """

    exit_layers: Sequence[int]
    token_ids: Tensor
    module: Callable[[Any, Tensor], nn.Module]
    measure: Callable[[Mapping[str, Guesses], float], list[DraftQuality]]
    parts: Callable[
        [Any, dict[str, Any], Sequence[DraftQuality]], Iterator[tuple[str, dict[str, Tensor], Label]]
    ]


def train_kangaroo(config: TrainKangarooConfig, on_point: OnPoint = lambda point: None) -> list[DraftQuality]:
    """Train one adapter per exit layer, in one pass; saved to config.output/exit-N, qualities to quality.json.

    Returns their qualities; of several processes the main one alone measures and saves, and others return nothing.
    Raises UserError for what the config names and is not there.
    """

    def measure(found: Mapping[str, Guesses], covered: float) -> list[DraftQuality]:
        return [
            DraftQuality(
                f"exit-{name}",
                own.agreement,
                tokens_per_round(kangaroo.held_drafts(own, config.gamma, config.eta)),
                own.reliability,
                covered,
            )
            for name, own in found.items()
        ]

    def parts(
        model: Any, label: dict[str, Any], found: Sequence[DraftQuality]
    ) -> Iterator[tuple[str, dict[str, Tensor], Label]]:
        for (name, adapter), quality in zip(model.each.items(), found, strict=True):
            own = KangarooLabel(**label, agreement=round(quality.agreement, 4), exit_layer=int(name))
            yield quality.name, _tensors(adapter), own

    ready, target = _prepared(config)
    layers = target.config.num_hidden_layers
    if wrong := [layer for layer in config.exit_layers if not 1 <= layer < layers]:
        raise ConfigError(
            f"exit_layers: {wrong[0]} is not between 1 and {layers - 1}, the model's layers less one"
        )
    start = _start(config, ready.folder, target)
    token_ids = _most_frequent(config, ready, target) if start is None else start["token_ids"].long()

    def adapters(target: Any, token_ids: Tensor) -> nn.Module:
        module = kangaroo.Adapters(target, config.exit_layers, token_ids)
        if start is not None:
            module.start_from(start)
        return module

    task = _Task(config.exit_layers, token_ids, adapters, measure, parts)
    return _train(config, task, ready, target, on_point)


def _start(config: TrainKangarooConfig, base: Path, target: Any) -> dict[str, Tensor] | None:
    """Tensors of the adapter to begin with, and its list of tokens. target: the model that both are of."""
    if config.start is None:
        return None
    label, tensors, folder = load_trained(KangarooLabel, base, Path(config.start), "start")
    if config.head_tokens not in (None, label.tokens):
        raise ConfigError(
            f"start: {folder} scores {label.tokens} tokens, which go on being scored; head_tokens is "
            f"{config.head_tokens}: leave it out"
        )
    wanted = {name: tuple(own.shape) for name, own in kangaroo.Adapter(target, 1).state_dict().items()}
    check_shapes(tensors, {**wanted, "token_ids": (label.tokens,)}, folder, "start")
    return tensors


def _most_frequent(config: DraftTrainingConfig, ready: Prepared, target: Any) -> Tensor:
    return frequent_tokens(ready.training, config.head_tokens or HEAD_TOKENS, target.config.vocab_size)


def train_medusa(config: TrainMedusaConfig, on_point: OnPoint = lambda point: None) -> list[DraftQuality]:
    """Train Medusa heads; saved to config.output/heads, their quality to quality.json. agreement: the first head's.

    Returns as `train_kangaroo`.
    Raises UserError for what the config names and is not there.
    """

    def measure(found: Mapping[str, Guesses], covered: float) -> list[DraftQuality]:
        heads = list(found.values())
        rounds = tokens_per_round(medusa.held_drafts(heads))
        return [DraftQuality("heads", heads[0].agreement, rounds, heads[0].reliability, covered)]

    def parts(
        model: Any, label: dict[str, Any], found: Sequence[DraftQuality]
    ) -> Iterator[tuple[str, dict[str, Tensor], Label]]:
        own = MedusaLabel(**label, agreement=round(found[0].agreement, 4), heads=config.heads)
        yield "heads", _tensors(model), own

    ready, target = _prepared(config)
    task = _Task(
        (),
        _most_frequent(config, ready, target),
        lambda target, token_ids: medusa.Heads(target, config.heads, token_ids),
        measure,
        parts,
    )
    return _train(config, task, ready, target, on_point)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What was trained, by the names it is saved under."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _prepared(config: DraftTrainingConfig) -> tuple[Prepared, Any]:
    ready = prepare(config.model, config.data, config.batch_size, logprobs=True)
    target = frozen(ready.folder)
    if target.config.model_type != "llama":
        raise ModelError(
            f"model.path: drafters can be trained for Llama models, and {config.model.path} is a "
            f"{target.config.model_type}"
        )
    return ready, target


def _train(
    config: DraftTrainingConfig, task: _Task, ready: Prepared, target: Any, on_point: OnPoint
) -> list[DraftQuality]:
    token_ids = task.token_ids

    def batch_of(part: Sequence[Example], model: nn.Module) -> TrainBatch:
        device = next(model.parameters()).device
        target.to(device)
        return collate(part, ready.end).to(device)

    def loss(model: nn.Module, part: Sequence[Example]) -> Tensor:
        targets = run_target(target, batch_of(part, model), task.exit_layers, token_ids)
        return soft_loss(model(targets), targets)

    output = Path(config.output)
    module = task.module(target, token_ids)
    if task.exit_layers and all(
        example.top_ids is not None for example in (*ready.training, *ready.held_out)
    ):
        cut_off(target, max(task.exit_layers))
    looked_at = ready.held_out[: config.held_out_examples]
    label = {"base": config.model.path, "base_tensors": tensors_fingerprint(ready.folder)}

    def save(model: nn.Module, folder: Path, steps: int) -> list[DraftQuality]:
        def batches() -> Iterator[TrainBatch]:
            for at in range(0, len(looked_at), config.batch_size):
                yield batch_of(looked_at[at : at + config.batch_size], model)

        model.eval()
        found = task.measure(*guess(model, target, batches(), task.exit_layers, token_ids))
        for name, tensors, own in task.parts(
            model, {**label, "tokens": len(token_ids), "steps": steps}, found
        ):
            save_trained(folder / name, own, {**tensors, "token_ids": token_ids})
        described = [asdict(quality) for quality in found]
        (folder / "quality.json").write_text(json.dumps(described, indent=2) + "\n")
        return found

    def keep(model: nn.Module, step: int) -> None:
        save(model, output / f"step-{step}", step)

    model = train(module, loss, ready.training, looked_at, config, keep, on_point)
    return [] if model is None else save(model, output, config.steps)


def format_draft_quality(qualities: Sequence[DraftQuality]) -> str:
    """A table for a terminal."""
    head = f"{'':<12}{'agreement':>10}{'tokens/round':>14}{'listed':>8}"
    rows = [
        f"{q.name:<12}{q.agreement:>10.3f}{q.tokens_per_round:>14.2f}{q.covered:>8.3f}" for q in qualities
    ]
    return "\n".join([head, *rows])
