"""LoRA adapters: merged as peft merges them, or refused by name before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import reference_logits
from safetensors.torch import load_file, save_file
from test_families import CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rayskip.errors import ModelError
from rayskip.model.checkpoint import check, load

CPU = torch.device("cpu")
TOKENS = list(range(3, 40))
PLAIN = {"r": 4, "lora_alpha": 10}
LORA: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 10,
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.self_attn\.v_proj": 6, "proj": 3, "up": 5},
        "alpha_pattern": {"layers.1.mlp.down_proj": 40, "model.layers.2.self_attn.o_proj": 7, "^o_proj": 99},
    },
    "rslora-patterns": {"r": 4, "lora_alpha": 10, "use_rslora": True, "rank_pattern": {"up_proj": 9}},
}


def _train(config: PreTrainedConfig, base: Path, adapter: Path, lora: dict[str, Any]) -> None:
    """Save a model and a LoRA adapter whose products are far from zero."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    wrapped: Any = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", **lora}))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(adapter)


def _check_parity(base: Path, adapter: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(torch.tensor([TOKENS])).logits[0]
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        expected = merged(torch.tensor([TOKENS])).logits[0]
    assert (expected - plain).abs().mean() > 0.1  # else a wrong scale might go unseen

    spec, weights = load(base, torch.float32, CPU, adapter)

    logits = reference_logits(spec, weights, TOKENS)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", LORA)
def test_scales_are_pefts(name: str, tmp_path: Path) -> None:
    _train(CONFIGS["llama"], tmp_path / "base", tmp_path / "adapter", LORA[name])
    _check_parity(tmp_path / "base", tmp_path / "adapter")


def test_an_adapter_of_a_model_that_sees_images_loads(tmp_path: Path) -> None:
    """Under the names that transformers gives its language model now, and those that it gave it once."""
    targets = r".*language_model.*\.(q_proj|up_proj|down_proj)"
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    _train(CONFIGS["gemma3"], base, adapter, {**PLAIN, "target_modules": targets})
    _check_parity(base, adapter)
    _, expected = load(base, torch.float32, CPU, adapter)

    file, now = adapter / "adapter_model.safetensors", "base_model.model.model.language_model."
    tensors = load_file(file)
    assert all(name.startswith(now) for name in tensors)
    once = "base_model.model.language_model.model."
    save_file({once + name.removeprefix(now): tensor for name, tensor in tensors.items()}, file)

    _, weights = load(base, torch.float32, CPU, adapter)
    assert torch.equal(weights.layers[3].attention.qkv.weight, expected.layers[3].attention.qkv.weight)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _train(CONFIGS["llama"], folder / "base", folder / "adapter", PLAIN)
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))


def _set(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors.get(name, torch.zeros(1)))
        save_file({key: value for key, value in tensors.items() if value is not None}, file)

    return spoil


UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_set(use_dora=True), "more than a plain LoRA adapter .use_dora.; merge it"),
        (_set(modules_to_save=["lm_head"]), "modules_to_save"),
        (_set(bias="all"), "bias: 'all'"),
        (_set(fan_in_fan_out=True), "fan_in_fan_out"),
        (_set(layer_replication=[[0, 2]]), "layer_replication"),
        (_set(lora_bias=True), "lora_bias"),
        (_set(target_parameters=["x"]), "target_parameters"),
        (_set(trainable_token_indices=[1]), "trainable_token_indices"),
        (_set(init_lora_weights="pissa_niter_4"), "init_lora_weights: 'pissa_niter_4'"),
        (_set(a_key_of_tomorrow={"x": 1}), "a_key_of_tomorrow"),
        (_set(peft_type="LOHA"), "peft_type 'LOHA'; LORA is wanted"),
        (_set(auto_map={"x": "y"}), "custom code"),
        (_set(r="4"), r"the rank \(r, rank_pattern\) '4'"),
        (_set(lora_alpha=None), r"the alpha \(lora_alpha, alpha_pattern\) null"),
        (_set(rank_pattern={"up_proj": 8}), r"up_proj.*says rank 8"),
        (_set(rank_pattern={"(": 8}), "rank_pattern is not readable"),
        (_set(alpha_pattern=["up_proj"]), "alpha_pattern is not readable"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            "adapter_config.json: not valid JSON",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99),
            "not a whole safetensors",
        ),
        (_tensor(f"{UP}.lora_magnitude_vector", lambda _: torch.ones(80)), "has .*lora_magnitude_vector"),
        (_tensor(f"{UP}.lora_A.weight", lambda _: None), "without the other of lora_A and lora_B"),
        (_tensor(f"{UP}.lora_A.weight", lambda a: a.to(torch.int8)), r"lora_A.weight \(I8\)"),
        (
            _tensor(f"{UP}.lora_A.weight", lambda a: a[:, :-1].contiguous()),
            r"\[80, 4\] times .*lora_A.weight \[4, 95\] is no \[80, 96\], which layers.0.mlp.up_proj.weight is",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_exactly_is_refused_by_name(
    spoil: Callable[[Path], object], problem: str, trained: Path, adapter: Path
) -> None:
    spoil(adapter)
    with pytest.raises(ModelError, match=problem) as caught:
        check(trained / "base", adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_told_from_the_headers(trained: Path, tmp_path: Path) -> None:
    _train(CONFIGS["qwen3"], tmp_path / "base", tmp_path / "qwen3", PLAIN)
    with pytest.raises(ModelError, match=r"does not fit the model: .*k_proj\.lora_B"):
        check(trained / "base", tmp_path / "qwen3")
