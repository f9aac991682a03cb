"""Mixtures of experts: the router, the layouts of checkpoints, MXFP4, adapters on experts."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import _chosen, reference_logits
from safetensors.torch import load_file, save_file
from test_families import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from rayskip.errors import ModelError
from rayskip.model.backends.choose import choose_backend
from rayskip.model.backends.cpu.backend import CpuBackend
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.checkpoint import check, load, resolve
from rayskip.model.families.gpt_oss import dequantised
from rayskip.model.spec import Dense, Router, Spec

CPU = torch.device("cpu")
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 3, "normalised": False},
    "softmax of the chosen": {"top_k": 4, "scale": 0.5},
    "sigmoid in groups": {"top_k": 4, "scores": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5},
    "all": {"top_k": 16},
}


@pytest.mark.parametrize("fast", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_as_it_says(name: str, fast: bool) -> None:
    """Against a token at a time; with a shared expert's gate behind the experts' logits."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 32, generator=generator) for rows in (16, 50))
    correction = torch.randn(16, generator=generator) if name.startswith("sigmoid") else None
    router = Router(Dense(weight), correction=correction, **ROUTERS[name])
    spec = Spec("any", 32, 2, 2, 16, 9, 9, 1.0)
    backend = choose_backend(spec, torch.float32, CPU) if fast else TorchBackend(spec, torch.float32, CPU)
    if fast and not (isinstance(backend, CpuBackend) and backend.library.has_products()):
        pytest.skip("a library's products are used on this processor")
    gate = torch.randn(1, 32, generator=generator)

    experts, weights = backend.route(router, x @ torch.cat((weight, gate)).T)

    for token, own, shares in zip(x, experts.tolist(), weights.tolist(), strict=True):
        expected = _chosen(router, token)
        assert dict(zip(own, shares[:-1], strict=True)) == pytest.approx(expected, abs=1e-5)
        assert shares[-1] == pytest.approx(float((gate[0] @ token).sigmoid()), abs=1e-5)


def test_a_token_that_is_not_finite_still_goes_to_different_experts() -> None:
    backend = choose_backend(Spec("any", 32, 2, 2, 16, 9, 9, 1.0), torch.float32, CPU)
    logits = torch.tensor([[torch.nan] * 16, [torch.inf] * 16, [-torch.inf] * 16, [0.0] * 16])
    experts, weights = backend.route(Router(Dense(torch.zeros(16, 32)), top_k=4), logits)
    assert all(len(set(own)) == 4 and min(own) >= 0 and max(own) < 16 for own in experts.tolist())
    assert weights[:3].isnan().all()
    assert torch.equal(weights[3], torch.full((4,), 0.25))


def _saved(name: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = copy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_experts_may_lie_together_as_in_transformers_memory(tmp_path: Path) -> None:
    tensors = _saved("qwen3_moe", tmp_path)
    _, apart = load(tmp_path, torch.float32, CPU)
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for index, layer in enumerate(apart.layers):
        at: Any = layer.mlp
        fused[f"model.layers.{index}.mlp.experts.gate_up_proj"] = at.up.weight
        fused[f"model.layers.{index}.mlp.experts.down_proj"] = at.down.weight
    save_file(fused, tmp_path / "model.safetensors")

    _, together = load(resolve(str(tmp_path)), torch.float32, CPU)

    assert all(
        torch.equal(getattr(mine.mlp, part).weight, getattr(own.mlp, part).weight)
        for mine, own in zip(together.layers, apart.layers, strict=True)
        for part in ("up", "down")
    )


def test_mxfp4_is_the_numbers_that_it_stands_for() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 8, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 8, 3), generator=generator, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        expected = _convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        assert torch.equal(dequantised(blocks, scales, dtype), expected)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A GPT-OSS as the hub has it: its experts in MXFP4."""
    tensors, generator = _saved("gpt_oss", tmp_path, intermediate_size=64), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        shape = experts, out, width // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_checkpoint_in_mxfp4_is_read_as_transformers_reads_it(packed: Path) -> None:
    dequantise: Any = Mxfp4Config
    peer: Any = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, quantization_config=dequantise(dequantize=True)
    )
    tokens = list(range(3, 40))
    with torch.no_grad():
        expected = peer(torch.tensor([tokens])).logits[0]

    spec, weights = load(resolve(str(packed)), torch.float32, CPU)

    torch.testing.assert_close(reference_logits(spec, weights, tokens), expected, atol=1e-3, rtol=1e-3)


def test_half_of_mxfp4_and_other_quantisations_are_refused(packed: Path) -> None:
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name].float()}, file)
    with pytest.raises(ModelError, match=r"quantised \(model.layers.0.mlp.experts.down_proj_"):
        resolve(str(packed))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised by its config\.json"):
        resolve(str(packed))


def test_an_adapter_on_experts_merges_where_they_have_names_of_their_own(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    _saved("qwen3_moe", base)
    _, plain = load(base, torch.float32, CPU)
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    name = "model.layers.1.mlp.experts.5.up_proj"
    a, b = torch.randn(2, 96), torch.randn(48, 2)
    lora = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(lora, adapter / "adapter_model.safetensors")

    _, merged = load(base, torch.float32, CPU, adapter)

    of_plain, of_merged = ([layer.mlp for layer in weights.layers] for weights in (plain, merged))
    added = of_merged[1].up.weight - of_plain[1].up.weight  # type: ignore[union-attr]
    torch.testing.assert_close(added[5, 48:], b @ a * 2)
    added[5, 48:] = 0
    assert not added.any()

    fused = "base_model.model.model.layers.1.mlp.experts.gate_up_proj"
    save_file(
        {f"{fused}.lora_A.weight": a, f"{fused}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match=r"the model has no layers.1.mlp.experts.gate_up_proj.weight"):
        check(base, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": ["experts"]}))
    with pytest.raises(ModelError, match=r"more than a plain LoRA adapter \(target_parameters\)"):
        check(base, adapter)
