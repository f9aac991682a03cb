"""Training Kangaroo adapters: they learn to foresee the model, and drafting does what training measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.kangaroo import KangarooLabel, save_kangaroo
from rayskip.train.examples import Example, collate
from rayskip.train.kangaroo import Adapters, adapters_loss, draft_quality, frequent_tokens, run_target
from rayskip.train.loop import Point, Schedule, train
from rayskip.train.prepare import frozen

VOCAB, GAMMA, ETA, TOKENS = 96, 3, 0.3, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root: Path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
    return root


def _engine(folder: Path, draft: dict[str, Any]) -> Engine:
    decode = DecodeConfig.model_validate({"draft": draft})
    return Engine.load(ModelConfig(path=str(folder)), EngineConfig(max_batch_rows=16), decode)


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    """The model's own greedy answers."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (6,), generator=generator).tolist() for _ in range(160)]
    found = _engine(folder, {"kind": "none"}).generate(
        prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    )
    return [
        Example(prompt, own.token_ids or [], str(index))
        for index, (prompt, (own,)) in enumerate(zip(prompts, found, strict=True))
    ]


def test_adapters_learn_and_draft_as_training_measured(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    training, held_out = examples[:128], examples[128:]
    target = frozen(folder)
    token_ids = frequent_tokens(training, 80, VOCAB)
    exits = (1, 3)

    def loss(model: nn.Module, part: Sequence[Example]) -> Tensor:
        return adapters_loss(model, target, run_target(target, collate(part, 2), exits), token_ids)

    points: list[Point] = []
    schedule = Schedule(60, 16, 1, 3e-3, 5, 0, 30, 1000, None)
    adapters: Any = train(
        Adapters(target, exits, token_ids),
        loss,
        training,
        held_out,
        schedule,
        tmp_path,
        lambda model, step: None,
        points.append,
    )
    assert points[-1].loss < points[0].loss
    adapters.eval()
    qualities = draft_quality(adapters, target, [collate(held_out, 2)], token_ids, GAMMA, ETA)
    assert qualities[1].agreement > 0.2
    for quality, adapter in zip(qualities, adapters.each.values(), strict=True):
        assert sum(places for *_, places in quality.reliability) == len(held_out) * TOKENS
        label = KangarooLabel(
            "tiny", tensors_fingerprint(folder), quality.exit_layer, len(token_ids), 0, quality.agreement
        )
        save_kangaroo(tmp_path / "adapter", label, {**adapter.tensors(), "token_ids": token_ids})
        engine = _engine(
            folder, {"kind": "kangaroo", "path": str(tmp_path / "adapter"), "gamma": GAMMA, "eta": ETA}
        )
        engine.generate(
            [example.prompt for example in held_out], SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        )
        assert engine.take_stats().mean_accepted == pytest.approx(quality.tokens_per_round, rel=0.03)


def test_the_list_holds_what_is_frequent_and_then_the_lowest_ids() -> None:
    examples = [Example([1], [9, 9, 7], "a"), Example([1], [7, 9, 5], "b")]
    assert frequent_tokens(examples, 2, 20).tolist() == [7, 9]
    assert frequent_tokens(examples, 5, 20).tolist() == [0, 1, 5, 7, 9]
    assert len(frequent_tokens(examples, 50, 20)) == 20


def test_an_adapter_starts_as_the_layer_it_stands_for(folder: Path) -> None:
    target = frozen(folder)
    adapters: Any = Adapters(target, (2,), torch.arange(VOCAB))
    layer = target.model.layers[2]
    batch = collate([Example([5, 6, 7, 8], [9, 10], "a")], 2)
    targets = run_target(target, batch, (2,))
    kept: list[Tensor] = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    run_target(target, batch, (2,))
    hook.remove()
    wanted = target.model.norm(kept[0])
    with torch.no_grad():
        adapter = adapters.each["2"]
        found = adapter(targets.states[2].float(), targets.mask, targets.cos.float(), targets.sin.float())
    assert torch.allclose(found, wanted.float(), atol=0.05, rtol=0.05)
    assert json.dumps(sorted(adapter.tensors())) == '["attn_norm", "final_norm", "out", "qkv"]'
