"""Training what drafts: it learns to foresee the model, and drafting gains what training measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayskip.config import DecodeConfig, EngineConfig, JobConfig, ModelConfig, SamplingParams
from rayskip.config.train import DataConfig, TrainingConfig, TrainKangarooConfig, TrainMedusaConfig
from rayskip.data.output import output_table
from rayskip.data.prompts import PromptBuilder
from rayskip.data.records import Shard
from rayskip.data.sources import discover, every_row
from rayskip.engine import Engine
from rayskip.errors import ConfigError, ModelError, RowError
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.kangaroo import load_kangaroo
from rayskip.model.trained import KangarooLabel, MedusaLabel, save_trained
from rayskip.train import kangaroo, medusa
from rayskip.train.drafts import (
    Targets,
    cut_off,
    frequent_tokens,
    guess,
    run_target,
    soft_loss,
    tokens_per_round,
)
from rayskip.train.examples import Example, collate
from rayskip.train.kangaroo import CONFIDENCE, Adapters
from rayskip.train.loop import Point, train
from rayskip.train.medusa import Heads
from rayskip.train.prepare import frozen, prepare
from rayskip.train.run_drafts import format_draft_quality, train_kangaroo, train_medusa

JOB = Path(__file__).parents[1] / "jobs" / "train_kangaroo.py"
VOCAB, GAMMA, ETA, TOKENS = 96, 3, 0.3, 24


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("kangaroo", 0, vocab_size=VOCAB, max_position_embeddings=128, initializer_range=0.1)


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


def _as_a_job_tells(examples: list[Example], folder: Path) -> list[Example]:
    """The same with the model's likeliest tokens at every place."""
    asked = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=8)
    found = _engine(folder, {"kind": "none"}).generate([example.prompt for example in examples], asked)
    return [
        replace(
            example,
            top_ids=np.array([[one for one, _ in token.top] for token in own.logprobs or []], np.int32),
            top_logprobs=np.array(
                [[two for _, two in token.top] for token in own.logprobs or []], np.float32
            ),
        )
        for example, (own,) in zip(examples, found, strict=True)
    ]


def _fit(
    model: nn.Module, target: Any, exits: Sequence[int], token_ids: Tensor, examples: list[Example], out: Path
) -> Any:
    def loss(model: nn.Module, part: Sequence[Example]) -> Tensor:
        targets = run_target(target, collate(part, 2), exits, token_ids)
        return soft_loss(model(targets), targets)

    points: list[Point] = []
    config = TrainingConfig.model_validate(
        {
            "name": "drafts",
            "model": {"path": "in the test"},
            "data": {"input": {"path": "in the test"}, "answer": "in the test"},
            "steps": 60,
            "learning_rate": 3e-3,
            "warmup_steps": 5,
            "evaluate_every": 30,
            "output": str(out),
        }
    )
    training, held_out = examples[:128], examples[128:]
    fitted = train(model, loss, training, held_out, config, lambda model, step: None, points.append)
    assert points[-1].loss < points[0].loss
    fitted.eval()
    return fitted


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _accepted(folder: Path, draft: dict[str, Any], examples: Sequence[Example]) -> float | None:
    engine = _engine(folder, draft)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    engine.generate([example.prompt for example in examples], params)
    return engine.take_stats().mean_accepted


def test_adapters_learn_and_draft_as_training_measured(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    target = frozen(folder)
    token_ids = frequent_tokens(examples[:128], 80, VOCAB)
    exits = (1, 3)
    adapters = Adapters(target, exits, token_ids)
    told = _as_a_job_tells(examples, folder)
    cut_off(target, 3)  # what the answers' job wrote is all that is needed of the rest
    fitted = _fit(adapters, target, exits, token_ids, told, tmp_path)
    held_out = told[128:]
    found, covered = guess(fitted, target, [collate(held_out, 2)], exits, token_ids)
    assert covered > 0.8
    assert found["3"].agreement > 0.2
    for (name, guesses), adapter in zip(found.items(), fitted.each.values(), strict=True):
        assert sum(places for *_, places in guesses.reliability) == len(held_out) * TOKENS
        label = KangarooLabel(
            "tiny", tensors_fingerprint(folder), len(token_ids), 0, guesses.agreement, exit_layer=int(name)
        )
        save_trained(tmp_path / "adapter", label, {**_tensors(adapter), "token_ids": token_ids})
        draft = {"kind": "kangaroo", "path": str(tmp_path / "adapter"), "gamma": GAMMA, "eta": ETA}
        expected = tokens_per_round(kangaroo.held_drafts(guesses, GAMMA, ETA))
        assert _accepted(folder, draft, held_out) == pytest.approx(expected, rel=0.03)


def test_heads_learn_and_draft_as_training_measured(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    target = frozen(folder)
    token_ids = frequent_tokens(examples[:128], 80, VOCAB)
    fitted = _fit(Heads(target, 3, token_ids), target, (), token_ids, examples, tmp_path)
    found, _ = guess(fitted, target, [collate(examples[128:], 2)], (), token_ids)
    assert [len(own.right[0]) for own in found.values()] == [TOKENS - 1, TOKENS - 2, TOKENS - 3]
    assert found["1"].agreement > 0.1
    label = MedusaLabel("tiny", tensors_fingerprint(folder), len(token_ids), 0, 0.0, heads=3)
    save_trained(tmp_path / "heads", label, {**_tensors(fitted), "token_ids": token_ids})
    expected = tokens_per_round(medusa.held_drafts(list(found.values())))
    assert expected > 1.05
    draft = {"kind": "medusa", "path": str(tmp_path / "heads")}
    assert _accepted(folder, draft, examples[128:]) == pytest.approx(expected, rel=0.03)


def test_a_job_tells_the_distribution_that_the_target_has(folder: Path, examples: list[Example]) -> None:
    target, token_ids = frozen(folder), torch.arange(10, VOCAB)
    told = run_target(target, collate(_as_a_job_tells(examples[:4], folder), 2), (), token_ids)
    computed = run_target(target, collate(examples[:4], 2), (), token_ids)

    def dense(targets: Targets) -> Tensor:
        whole = torch.zeros(len(targets.chosen), len(token_ids))
        return whole.scatter_add(1, targets.wanted, targets.shares)

    assert (dense(told) - dense(computed)).abs().mean() < 0.01


def test_the_list_holds_what_is_frequent_in_answers_then_in_prompts_then_the_lowest_ids() -> None:
    examples = [Example([1, 8], [9, 9, 7], "a"), Example([8], [7, 9, 5], "b")]
    assert frequent_tokens(examples, 2, 20).tolist() == [7, 9]
    assert frequent_tokens(examples, 4, 20).tolist() == [5, 7, 8, 9]
    assert frequent_tokens(examples, 6, 20).tolist() == [0, 1, 5, 7, 8, 9]
    assert len(frequent_tokens(examples, 50, 20)) == 20


def test_an_adapter_starts_as_the_layer_it_stands_for(folder: Path) -> None:
    target, token_ids = frozen(folder), torch.arange(VOCAB)
    adapters: Any = Adapters(target, (2,), token_ids)
    batch = collate([Example([5, 6, 7, 8], [9, 10], "a")], 2)
    kept: list[Tensor] = []
    hook = target.model.layers[2].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    targets = run_target(target, batch, (2,), token_ids)
    hook.remove()
    wanted = CONFIDENCE * target.model.norm(kept[0])
    with torch.no_grad():
        adapter = adapters.each["2"]
        found = adapter(targets.states[2].float(), targets.mask, targets.cos.float(), targets.sin.float())
    assert torch.allclose(found, wanted.float(), atol=0.02, rtol=0.05)
    assert sorted(_tensors(adapter)) == ["attn_norm", "final_norm", "out", "qkv"]


MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's output with log-probabilities, by the job itself."""
    root: Path = tmp_path_factory.mktemp("answers")
    rows = "".join(json.dumps({"prompt": f"Name {count} rivers."}) + "\n" for count in range(12))
    (root / "prompts.jsonl").write_text(rows)
    job = {
        "name": "answers",
        "model": {"path": MODEL},
        "input": {"path": str(root / "prompts.jsonl"), "chat": True},
        "sampling": {"max_tokens": 8, "logprobs": 4},
        "output": {"path": str(root / "out")},
    }
    decoder = Engine.load(MODEL)
    config = JobConfig.model_validate(job)
    source = discover(config.input)
    builder = PromptBuilder(config.input, config.sampling, decoder.tokenizer, 2048)
    for _, index, row in every_row(source, source.columns):
        decoder.add(builder.build(row, index, "prompts.jsonl"))
    found = sorted((done.generations[0] for done in decoder.run()), key=lambda own: own.row_index)
    shard = Shard(0, str(root / "prompts.jsonl"), "prompts.jsonl", 0, 12)
    table = pa.table({"prompt": [json.loads(line)["prompt"] for line in rows.splitlines()]})
    pq.write_table(output_table(table, found, shard, config), root / "answers.parquet")
    return root / "answers.parquet"


def _config(answers: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"path": MODEL},
        "data": {"input": {"path": str(answers), "chat": True}, "answer": "text", "held_out": 0.3},
        "head_tokens": 500,
        "steps": 2,
        "batch_size": 2,
        "output": str(out),
        **changes,
    }


def test_trainings_save_what_drafts(answers: Path, tmp_path: Path) -> None:
    adapters = TrainKangarooConfig.model_validate(_config(answers, tmp_path / "k", exit_layers=[1, 2]))
    heads = TrainMedusaConfig.model_validate(_config(answers, tmp_path / "m", heads=2))
    told = [*train_kangaroo(adapters), *train_medusa(heads)]
    assert [quality.name for quality in told] == ["exit-1", "exit-2", "heads"]
    assert "exit-2" in format_draft_quality(told)
    assert len(json.loads((tmp_path / "k" / "quality.json").read_text())) == 2
    assert load_kangaroo(Engine.load(MODEL).decoder, tmp_path / "k" / "exit-2").exit_layer == 2
    drafts = [
        {"kind": "kangaroo", "path": str(tmp_path / "k" / "exit-1")},
        {"kind": "medusa", "path": str(tmp_path / "m" / "heads")},
    ]
    for draft in drafts:
        decode = DecodeConfig.model_validate({"draft": draft})
        Engine.load(MODEL, EngineConfig(max_batch_rows=1), decode).generate(
            ["Once"], SamplingParams(max_tokens=4)
        )


def test_a_training_begins_with_an_adapter(answers: Path, tmp_path: Path) -> None:
    """One so slow that nothing is learnt gives the same adapter; what does not fit the adapter is named."""
    first = _config(answers, tmp_path / "first", exit_layers=[2], steps=1, learning_rate=0.1, warmup_steps=0)
    train_kangaroo(TrainKangarooConfig.model_validate(first))
    begun = load_file(tmp_path / "first" / "exit-2" / "kangaroo.safetensors")
    begin = {"start": str(tmp_path / "first" / "exit-2"), "head_tokens": None}
    more = {"exit_layers": [2], "learning_rate": 1e-12, **begin}
    config = TrainKangarooConfig.model_validate(_config(answers, tmp_path / "second", **more))
    train_kangaroo(config)
    ended = load_file(tmp_path / "second" / "exit-2" / "kangaroo.safetensors")
    assert all(torch.equal(begun[name], ended[name]) for name in begun)
    with pytest.raises(ConfigError, match=r"start: .* scores 500 tokens.* head_tokens is 400: leave it out"):
        train_kangaroo(config.model_copy(update={"head_tokens": 400}))
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "first" / "exit-2", damaged)
    save_file({"qkv": begun["qkv"]}, damaged / "kangaroo.safetensors")
    with pytest.raises(ModelError, match=r"start: .*damaged has no tensor out of shape"):
        train_kangaroo(config.model_copy(update={"start": str(damaged)}))
    with pytest.raises(ModelError, match=r"start: .* has no kangaroo.json"):
        train_kangaroo(config.model_copy(update={"start": str(tmp_path)}))


def test_two_processes_train_one_adapter(answers: Path, tmp_path: Path) -> None:
    """As accelerate launches them: each learns from its share, and one of them measures, saves and says so."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(_config(answers, tmp_path / "out", exit_layers=[1])))
    launched = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0"]
    ran = subprocess.run(
        [sys.executable, "-m", *launched, str(JOB), str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert ran.stdout.count("exit-1") == 1
    assert len((tmp_path / "out" / "curve.jsonl").read_text().splitlines()) == 2
    assert load_kangaroo(Engine.load(MODEL).decoder, tmp_path / "out" / "exit-1").exit_layer == 1


def test_an_exit_layer_that_is_not_there_is_named(answers: Path, tmp_path: Path) -> None:
    config = TrainKangarooConfig.model_validate(_config(answers, tmp_path, exit_layers=[30]))
    with pytest.raises(ConfigError, match="exit_layers: 30 is not between 1 and 29"):
        train_kangaroo(config)


def test_answers_with_logprobs_are_the_jobs_tokens(answers: Path) -> None:
    told = prepare(ModelConfig(path=MODEL), _data(answers), 1, logprobs=True)
    plain = prepare(ModelConfig(path=MODEL), _data(answers), 1)
    assert all(example.top_ids is None for example in (*plain.training, *plain.held_out))
    for with_tops, without in zip(told.training, plain.training, strict=True):
        assert with_tops.prompt == without.prompt
        assert with_tops.top_ids is not None
        assert with_tops.top_ids.shape == (len(with_tops.answer), 4)
        assert with_tops.top_logprobs is not None
        tops = zip(with_tops.top_ids.tolist(), with_tops.top_logprobs.tolist(), strict=True)
        for token, (ids, logprobs) in zip(with_tops.answer, tops, strict=True):
            assert logprobs[ids.index(token)] == max(logprobs)  # greedy, and bfloat16 has ties
        assert len(with_tops.answer) in (8, len(without.answer))


def test_another_column_than_the_jobs_text_has_no_logprobs(answers: Path, tmp_path: Path) -> None:
    table = pq.read_table(answers)
    gold = table.append_column("gold", pa.array(["the right answer"] * len(table)))
    pq.write_table(gold, tmp_path / "gold.parquet")
    data = _data(tmp_path / "gold.parquet").model_copy(update={"answer": "gold"})
    assert prepare(ModelConfig(path=MODEL), data, 1, logprobs=True).training[0].top_ids is None


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("logprobs", {"content": []}, "not what a job writes"),
        ("logprobs", [{"token_id": 99_999, "logprob": 0.0, "top": []}], "past the model's 49152"),
        ("skip_policy", "skipdecode-2x", "answers of the whole model are wanted"),
    ],
)
def test_logprobs_of_something_else_are_refused(
    answers: Path, tmp_path: Path, column: str, value: Any, message: str
) -> None:
    rows = pq.read_table(answers).to_pylist()
    for row in rows:
        row[column] = value
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RowError, match=f"rows.jsonl: row 0: .*{message}"):
        prepare(ModelConfig(path=MODEL), _data(tmp_path / "rows.jsonl"), 1, logprobs=True)


def test_answers_with_more_and_with_fewer_likeliest_tokens_share_a_batch() -> None:
    def example(width: int) -> Example:
        ids = np.arange(2 * width, dtype=np.int32).reshape(2, width)
        return Example([1], [3, 4], "a", ids, np.zeros((2, width), np.float32))

    batch = collate([example(2), example(3)], 0)
    assert batch.top_ids is not None
    assert batch.top_logprobs is not None
    assert batch.top_ids.tolist() == [[0, 1, 0], [2, 3, 0], [0, 1, 2], [3, 4, 5]]
    assert batch.top_logprobs.exp().sum(1).tolist() == [2, 2, 3, 3]


def _data(path: Path) -> DataConfig:
    return DataConfig.model_validate(_config(path, path)["data"])
