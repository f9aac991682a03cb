"""Fine-tuning under a skip schedule, on a tiny random model: it learns, resumes, and its checkpoint runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams
from rayskip.config.train import TrainSkipConfig
from rayskip.engine import Engine
from rayskip.errors import ConfigError, InputError, ModelError
from rayskip.model.checkpoint import trained_policy
from rayskip.train.examples import Example, batches, collate, split
from rayskip.train.loop import Point
from rayskip.train.run_skip import train_skip

COLOURS = ("red", "green", "blue", "grey")
THINGS = ("cat", "dog", "fox", "owl")
SKIP = {"kind": "skipdecode", "max_layers": 3, "min_layers": 2, "horizon": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a word tokenizer, and rows to learn: the answer repeats the prompt's words backwards."""
    root = tmp_path_factory.mktemp("train")
    words = ["<unk>", "<end>", *COLOURS, *THINGS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    rows = [{"p": f"{c} {t}", "a": f"{t} {c} {t} {c}"} for c in COLOURS for t in THINGS] * 8
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _config(folder: Path, output: Path, **changes: Any) -> TrainSkipConfig:
    return TrainSkipConfig.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(folder / "model")},
            "data": {
                "input": {"path": str(folder / "rows.jsonl"), "prompt": "p"},
                "answer": "a",
                "group": "p",
                "held_out": 0.2,
            },
            "skip": SKIP,
            "steps": 40,
            "batch_size": 16,
            "learning_rate": 5e-3,
            "evaluate_every": 20,
            "save_every": 20,
            "output": str(output),
            **changes,
        }
    )


def test_it_learns_and_the_checkpoint_decodes_what_it_learnt(folder: Path, tmp_path: Path) -> None:
    points: list[Point] = []
    checkpoint = train_skip(_config(folder, tmp_path / "out"), points.append)
    assert points[-1].loss < points[0].loss / 3
    assert [point.step for point in points if point.held_out is not None] == [20, 40]
    curve = [json.loads(line) for line in (tmp_path / "out/curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == list(range(1, 41))

    decode = DecodeConfig.model_validate({"skip": SKIP})
    engine = Engine.load(ModelConfig(path=str(checkpoint)), EngineConfig(max_batch_rows=4), decode)
    assert trained_policy(checkpoint) == engine.policy.name
    prompts = [f"{c} {t}" for c in COLOURS for t in THINGS]
    texts = [row[0].text for row in engine.generate(prompts, SamplingParams(max_tokens=8))]
    right = sum(
        text == f"{t} {c} {t} {c}" for text, (c, t) in zip(texts, map(str.split, prompts), strict=True)
    )
    assert right >= 12


def test_a_stopped_training_resumes_to_the_same_curve(folder: Path, tmp_path: Path) -> None:
    whole: list[Point] = []
    train_skip(_config(folder, tmp_path / "whole"), whole.append)

    class Stopped(Exception):
        pass

    def stop_at_30(point: Point) -> None:
        if point.step == 30:
            raise Stopped

    with pytest.raises(Stopped):
        train_skip(_config(folder, tmp_path / "parts"), stop_at_30)
    rest: list[Point] = []
    train_skip(_config(folder, tmp_path / "parts"), rest.append)
    assert [point.step for point in rest] == list(range(21, 41))
    assert [point.loss for point in rest] == pytest.approx([point.loss for point in whole[20:]], rel=1e-3)
    curve = [json.loads(line) for line in (tmp_path / "parts/curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == list(range(1, 41))
    assert [state.name for state in (tmp_path / "parts/state").glob("step-*")] == ["step-40"]


def test_a_training_does_not_go_on_from_another(folder: Path, tmp_path: Path) -> None:
    train_skip(_config(folder, tmp_path / "out", steps=4))
    with pytest.raises(ConfigError, match="holds a training with another steps and learning_rate; delete it"):
        train_skip(_config(folder, tmp_path / "out", steps=2, learning_rate=1e-3))
    assert json.loads((tmp_path / "out/model/rayskip.json").read_text())["steps"] == 4
    train_skip(_config(folder, tmp_path / "out", steps=4, evaluate_every=1))


@pytest.mark.parametrize("changes", [{"lora": {"rank": 4}}, {"distill": {"weight": 0.5}}])
def test_adapters_and_distillation_learn_too(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    points: list[Point] = []
    train_skip(_config(folder, tmp_path / "out", **changes), points.append)
    assert points[-1].held_out is not None
    assert points[-1].loss < points[0].loss * 0.9
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists() == ("lora" in changes)


def test_an_adapter_runs_on_its_base_and_is_refused_on_another(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path / "out", lora={"rank": 8}, steps=60)
    checkpoint = train_skip(config)
    adapter = str(tmp_path / "out/adapter")
    decode = DecodeConfig.model_validate({"skip": SKIP})
    prompts, params = ["red cat", "blue owl"], SamplingParams(max_tokens=6, logprobs=0)

    def logprobs(model: ModelConfig) -> torch.Tensor:
        rows = Engine.load(model, EngineConfig(max_batch_rows=2), decode).generate(prompts, params)
        return torch.tensor([entry.logprob for row in rows for entry in row[0].logprobs or ()])

    float32: Any = {"dtype": "float32"}
    merged = logprobs(ModelConfig(path=str(checkpoint), **float32))
    loaded = logprobs(ModelConfig(path=str(folder / "model"), adapter=adapter, **float32))
    torch.testing.assert_close(loaded, merged, atol=0.05, rtol=0.05)  # merged was rounded to bfloat16
    with pytest.raises(ModelError, match="was trained on"):
        Engine.load(ModelConfig(path=str(checkpoint), adapter=adapter))
    with pytest.raises(ModelError, match=r"has no adapter_config.json"):
        Engine.load(ModelConfig(path=str(folder / "model"), adapter=str(tmp_path)))


def test_a_missing_answer_column_is_named(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path / "out")
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"answer": "b"})})
    with pytest.raises(InputError, match=r"data.answer names 'b'.*columns: p, a"):
        train_skip(wrong)


def test_a_group_stays_on_one_side_of_the_split() -> None:
    examples = [Example([1], [2], str(row % 50)) for row in range(500)]
    training, held_out = split(examples, 0.2)
    assert {x.group for x in training}.isdisjoint(x.group for x in held_out)
    assert len(training) + len(held_out) == 500
    assert 40 <= len(held_out) <= 160


def test_the_first_held_out_examples_are_of_all_files() -> None:
    files = ("a", "b", "c")
    examples = [Example([1], [2], f"{file}:{row}") for file in files for row in range(400)]
    _, held_out = split(examples, 0.25)
    count = Counter(example.group[0] for example in held_out[:90])
    assert all(count[file] > 15 for file in files)


def test_batches_are_the_same_for_a_seed_and_cover_a_pass() -> None:
    examples = [Example([row], [0], "") for row in range(20)]
    first, second = (batches(examples, 5, seed=3) for _ in range(2))
    taken = [next(first) for _ in range(8)]
    assert taken == [next(second) for _ in range(8)]
    assert sorted(x.prompt[0] for batch in taken[:4] for x in batch) == list(range(20))


def test_padding_is_left_of_prompts_and_right_of_answers() -> None:
    batch = collate([Example([5], [6, 7], ""), Example([1, 2, 3], [4], "")], pad=0)
    assert batch.input_ids.tolist() == [[0, 0, 5, 6, 7], [1, 2, 3, 4, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.labels.tolist() == [[6, 7], [4, -100]]
    assert batch.prompt_width == 3
