"""Quantised checkpoints give the weights that the format's own library makes of them, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from rayskip.config import JobConfig
from rayskip.config.train import DataConfig
from rayskip.dry_run import dry_run, facts, format_dry_run
from rayskip.engine.engine import Engine
from rayskip.errors import ModelError
from rayskip.model.checkpoint import dequantised, load, resolve, weights_fingerprint
from rayskip.model.files import read_headers
from rayskip.model.quantised import Dequantised, dequantised_headers
from rayskip.train.prepare import prepare

Pack = Callable[[Tensor], dict[str, Tensor]]
"""A weight's parts, by the ends of their names after the module's."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def folder(tiny_llama: Callable[..., Path]) -> Path:
    """In bfloat16, and with a size (hidden 72) that is no multiple of the blocks below."""
    return tiny_llama("plain", 3, hidden_size=72, num_hidden_layers=2, vocab_size=64, head_dim=16)


def quantise(
    folder: Path, settings: dict[str, Any], pack: Pack, names: tuple[str, ...] = PROJECTIONS
) -> Path:
    """Store the linear layers `names` of a checkpoint as `pack` has them, and say so in its config."""
    file = folder / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        if module.endswith(names):
            stored |= {f"{module}.{part}": own.contiguous() for part, own in pack(tensor).items()}
        else:
            stored[name] = tensor
    save_file(stored, file, metadata={"format": "pt"})
    configure(folder, settings)
    return folder


def configure(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def weights(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """As the loader has them."""
    file = folder / "model.safetensors"
    return dict(Dequantised(load_file(file), dequantised_headers(folder, read_headers([file])), dtype))


def packed(folder: Path, marker: str) -> dict[str, dict[str, Tensor]]:
    """The parts of each quantised weight, by its module."""
    stored = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(f".{marker}") for name in stored if name.endswith(f".{marker}")]
    found = {}
    for module in modules:
        parts = {n.removeprefix(f"{module}."): own for n, own in stored.items() if n.startswith(f"{module}.")}
        if len(parts) > 1:
            found[module] = parts
    return found


def block_scales(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(weight in FP8, scale of each block), the last blocks cut off."""
    down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale = torch.empty(down, across)
    whole = weight.float().clone()
    for i in range(down):
        for j in range(across):
            block = whole[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = block.abs().max() / 448
            block /= scale[i, j]
    return whole.to(torch.float8_e4m3fn), scale


def fp8_settings(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **more}


@pytest.mark.parametrize("block", [[24, 8], [32, 48]])
def test_fp8_in_blocks_is_transformers_own(block: list[int], folder: Path) -> None:
    """By its load-time conversion where the blocks come out even, by the one of its backward pass in any case."""

    def pack(weight: Tensor) -> dict[str, Tensor]:
        values, scale = block_scales(weight, *block)
        return {"weight": values, "weight_scale_inv": scale}

    quantise(folder, fp8_settings(weight_block_size=block), pack)
    ours, modules = weights(folder, torch.float32), packed(folder, "weight")
    assert len(modules) == 14
    for module, parts in modules.items():
        values, scale = parts["weight"], parts["weight_scale_inv"]
        theirs = _dequantize_fp8_weight(values, scale, block, torch.float32)
        assert torch.equal(ours[f"{module}.weight"], theirs)
        if not (values.shape[0] % block[0] or values.shape[1] % block[1]):
            theirs = Fp8Dequantize(None)._dequantize_one(values, scale, torch.bfloat16)
            assert torch.equal(ours[f"{module}.weight"].bfloat16(), theirs)


def test_a_quantised_checkpoint_is_loaded_and_said_to_be(folder: Path) -> None:
    plain = load(resolve(str(folder)), torch.float32, torch.device("cpu"))[1]
    before = weights_fingerprint(folder)

    def pack(weight: Tensor) -> dict[str, Tensor]:
        return fp8_parts(weight) | {"activation_scale": torch.ones(1)}

    quantise(folder, fp8_settings(activation_scheme="static"), pack)
    loaded = load(resolve(str(folder)), torch.float32, torch.device("cpu"))[1]
    for ours, theirs in zip(loaded.layers, plain.layers, strict=True):
        assert ours.mlp is not None
        assert theirs.mlp is not None
        for own, other in ((ours.attention.qkv, theirs.attention.qkv), (ours.mlp.down, theirs.mlp.down)):
            assert not torch.equal(own.weight, other.weight)
            torch.testing.assert_close(own.weight, other.weight, rtol=0.07, atol=1e-3)
    assert torch.equal(loaded.embed, plain.embed)  # not to be converted, nor was it
    assert weights_fingerprint(folder) != before
    assert dequantised(folder, "bfloat16") == "dequantised from FP8 to bfloat16 (0.0 GB)"


def test_plan_engine_and_training_say_it(folder: Path, tmp_path: Path) -> None:
    quantise(folder, fp8_settings(), fp8_parts)
    (tmp_path / "rows.jsonl").write_text('{"ids": [1, 2, 3]}\n')
    job = JobConfig.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(folder)},
            "input": {"path": str(tmp_path / "rows.jsonl"), "prompt_token_ids": "ids"},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    told = "dequantised from FP8 to bfloat16 (0.0 GB)"
    seen = dry_run(job)
    assert facts(seen)["dequantised"] == told
    assert f"tokens, {told}" in format_dry_run(seen).splitlines()[1]
    engine = Engine.load(folder, {"max_batch_rows": 1, "max_model_len": 64}, device="cpu")
    assert f"{folder} is {told}" in engine.info["warnings"]
    with pytest.raises(ModelError, match="training is of weights in floating point"):
        prepare(job.model, DataConfig.model_validate({"input": job.input, "answer": "text"}), 1)


def test_an_adapter_is_added_to_dequantised_weights(folder: Path, tmp_path: Path) -> None:
    quantise(folder, fp8_settings(), fp8_parts)
    a, b = torch.randn(4, 96), torch.randn(72, 4)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    base, merged = (
        load(folder, torch.float32, torch.device("cpu"), adapter)[1].layers[1].mlp
        for adapter in (None, tmp_path)
    )
    assert base is not None
    assert merged is not None
    assert torch.equal(merged.down.weight, base.down.weight + 2 * (b @ a))
    assert torch.equal(merged.up.weight, base.up.weight)


def ct_settings(kind: str, **args: Any) -> dict[str, Any]:
    """As llm-compressor writes them."""
    own = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    group = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": own | {"dynamic": False, "observer": "minmax", "observer_kwargs": {}} | args,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def ct_scales(weight: Tensor, args: dict[str, Any], levels: int) -> dict[str, Tensor]:
    """Of absolute maxima, in bfloat16; zero points are any."""
    match args["strategy"]:
        case "tensor":
            scale = weight.abs().max().reshape(1)
        case "channel":
            scale = weight.abs().amax(1, keepdim=True)
        case "group":
            scale = weight.unflatten(1, (-1, args["group_size"])).abs().amax(2)
        case _:
            scale = block_scales(weight, *args["block_structure"])[1] * 448
    made = {"weight_scale": (scale.float() / levels).bfloat16()}
    if not args["symmetric"]:
        made["weight_zero_point"] = torch.randint(-levels - 1, levels + 1, scale.shape).to(torch.int8)
    return made


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("float-quantized", {"type": "float", "strategy": "tensor"}),
        ("float-quantized", {"type": "float", "strategy": "channel"}),
        ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [32, 48]}),
        ("int-quantized", {}),
        ("int-quantized", {"strategy": "tensor", "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "actorder": "weight"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 8, "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    ],
)
def test_compressed_tensors_are_the_librarys_own(kind: str, args: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    settings = ct_settings(kind, **args)
    group = settings["config_groups"]["group_0"]
    own = group["weights"]
    if own["type"] == "float":
        group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    QuantizationConfig.model_validate(settings)  # one that the library takes
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**own))
    library = BaseCompressor.get_value_from_registry(kind)
    levels = 448 if own["type"] == "float" else (1 << own["num_bits"] - 1) - 1
    torch.manual_seed(5)

    def pack(weight: Tensor) -> dict[str, Tensor]:
        made: dict[str, Tensor] = library.compress(
            {"weight": weight, **ct_scales(weight, own, levels)}, scheme
        )
        return made

    quantise(folder, settings, pack)
    ours = weights(folder)
    modules = packed(folder, "weight_packed" if kind == "pack-quantized" else "weight")
    assert len(modules) == 14
    for module, parts in modules.items():
        theirs = library.decompress(parts, scheme)["weight"]
        assert torch.equal(ours[f"{module}.weight"], theirs), module
    check_loads(folder, ours)


def check_loads(folder: Path, ours: dict[str, Tensor]) -> None:
    """The folder is taken, and its layers have these weights."""
    layer = load(resolve(str(folder)), torch.bfloat16, torch.device("cpu"))[1].layers[1]
    assert layer.mlp is not None
    assert torch.equal(layer.mlp.down.weight, ours["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(layer.attention.out.weight, ours["model.layers.1.self_attn.o_proj.weight"])


def words(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Values of each row packed into words of 32 bits: `order` tells which of the next 32 / bits lies at each
    place, lowest bits first."""
    rows = []
    for row in values.tolist():
        packs = [row[i : i + len(order)] for i in range(0, len(row), len(order))]
        rows.append([sum(pack[at] << place * bits for place, at in enumerate(order)) for pack in packs])
    return torch.tensor(rows).to(torch.uint32).view(torch.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def test_words_are_those_of_the_libraries() -> None:
    """Eight columns 0 to 7 by AutoGPTQ and GPTQModel, and by AutoAWQ."""
    row = torch.arange(8)[None]
    assert words(row, 4, tuple(range(8))).tolist() == [[0x76543210]]
    assert words(row, 4, AWQ_ORDER).tolist() == [[0x75316420]]


def gptq_settings(**more: Any) -> dict[str, Any]:
    """As AutoGPTQ and transformers write them."""
    own = {
        "bits": 4,
        "group_size": 8,
        "damp_percent": 0.1,
        "desc_act": False,
        "sym": False,
        "true_sequential": True,
    }
    return {"quant_method": "gptq", "model_name_or_path": None, **own, **more}


def awq_settings(**more: Any) -> dict[str, Any]:
    own = {"bits": 4, "group_size": 8, "modules_to_not_convert": None, "version": "gemm", "zero_point": True}
    return {"quant_method": "awq", **own, **more}


GPTQ = [
    gptq_settings(),
    gptq_settings(desc_act=True, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:7.0"]}),
    gptq_settings(bits=8, checkpoint_format="gptq_v2"),
    gptq_settings(group_size=-1),
]


@pytest.mark.parametrize("settings", [*GPTQ, awq_settings(), awq_settings(group_size=-1)])
def test_gptq_and_awq_are_values_less_zero_points_times_scales(
    settings: dict[str, Any], folder: Path
) -> None:
    torch.manual_seed(6)
    bits = settings["bits"]
    awq = settings["quant_method"] == "awq"
    less = 0 if awq or settings.get("checkpoint_format") == "gptq_v2" else 1
    plain = tuple(range(32 // bits))
    meant: dict[str, Tensor] = {}
    modules = (
        name.removesuffix(".weight") for name in load_file(folder / "model.safetensors") if "proj" in name
    )

    def pack(weight: Tensor) -> dict[str, Tensor]:
        out, columns = weight.shape
        size = columns if settings["group_size"] == -1 else settings["group_size"]
        groups_of = torch.arange(columns, dtype=torch.int32) // size
        if settings.get("desc_act"):
            groups_of = groups_of[torch.randperm(columns)]
        values = torch.randint(1 << bits, (columns, out))
        zeros = torch.randint(less, 1 << bits, (columns // size, out))
        scales = torch.rand(columns // size, out).half() / 100
        whole = meant[next(modules)] = torch.empty(out, columns)
        for column, group in enumerate(groups_of.tolist()):
            whole[:, column] = (values[column] - zeros[group]) * scales[group].float()
        if awq:
            made = {"qweight": words(values, bits, AWQ_ORDER), "qzeros": words(zeros, bits, AWQ_ORDER)}
        else:
            made = {"qweight": words(values.T, bits, plain).T, "qzeros": words(zeros - less, bits, plain)}
            made["g_idx"] = groups_of
        return made | {"scales": scales}

    quantise(folder, settings, pack)
    ours = weights(folder, torch.float32)
    assert len(packed(folder, "qweight")) == len(meant) == 14
    for module, own in meant.items():
        assert torch.equal(ours[f"{module}.weight"], own), module
    check_loads(folder, weights(folder))


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [("qzeros", -1, "zero points of 0"), ("g_idx", 12, "g_idx that names groups")],
)
def test_gptq_weights_that_could_mean_several_things_are_refused(
    part: str, value: int, problem: str, folder: Path
) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        out, columns = weight.shape
        shapes = {"qweight": (columns // 8, out), "qzeros": (columns // 8, out // 8), "g_idx": (columns,)}
        made = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        made[part][-1] = value
        return made | {"scales": torch.ones(columns // 8, out).half()}

    quantise(folder, gptq_settings(), pack)
    with pytest.raises(ModelError, match=problem):
        load(resolve(str(folder)), torch.float32, torch.device("cpu"))


def fp8_parts(weight: Tensor) -> dict[str, Tensor]:
    values, scale = block_scales(weight, 128, 128)
    return {"weight": values, "weight_scale_inv": scale}


Spoil = Callable[[Path], Any]


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    """Of the stored tensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def ct_edited(change: Callable[[dict[str, Any]], Any], **args: Any) -> Spoil:
    settings = ct_settings("pack-quantized", **{"num_bits": 4, "strategy": "group", "group_size": 32} | args)
    change(settings)
    return lambda folder: configure(folder, settings)


DOWN = "model.layers.0.mlp.down_proj."


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: configure(f, fp8_settings(fmt="e5m2")), "fmt 'e5m2'; e4m3 is honoured"),
        (lambda f: configure(f, fp8_settings(scale_fmt="ue8m0")), "scale_fmt 'ue8m0', which is not honoured"),
        (
            lambda f: configure(f, fp8_settings(weight_block_size=[128])),
            r"weight_block_size \[128\]; two whole",
        ),
        (
            lambda f: configure(f, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "quant_method 'bitsandb",
        ),
        (lambda f: configure(f, {"bits": 4}), "quant_method null"),
        (lambda f: configure(f, {"quant_method": ["fp8"]}), "quant_method .'fp8'."),
        (ct_edited(lambda c: c.update(format="nvfp4-pack-quantized")), "format 'nvfp4-pack-quantized'"),
        (ct_edited(lambda c: c.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
        (ct_edited(lambda c: c.update(transform_config={"config_groups": {"u": 1}})), "transform_config"),
        (ct_edited(lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"})), "sparsity_config"),
        (
            ct_edited(lambda c: c["config_groups"].update(g=ct_settings("x")["config_groups"]["group_0"])),
            "several",
        ),
        (ct_edited(lambda c: c.update(config_groups={"W4A16": ["Linear"]})), "config_groups"),
        (ct_edited(lambda c: None, num_bits=3), "num_bits 3; 4 or 8 is honoured"),
        (ct_edited(lambda c: None, actorder="group"), "actorder 'group'"),
        (ct_edited(lambda c: None, group_size=None), "group_size null"),
        (lambda f: configure(f, gptq_settings(bits=3)), "bits 3; 4 or 8 is honoured"),
        (lambda f: configure(f, gptq_settings(dynamic={"-:lm_head": {}})), "dynamic .*not honoured"),
        (
            lambda f: configure(f, gptq_settings(checkpoint_format="marlin")),
            "checkpoint_format 'marlin'; gptq or",
        ),
        (lambda f: configure(f, awq_settings(version="gemv")), "version 'gemv'; gemm"),
        (lambda f: configure(f, awq_settings(zero_point=False)), "zero_point False"),
        (lambda f: configure(f, awq_settings(group_size=None)), "group_size null"),
        (edit(lambda t: t.pop(f"{DOWN}weight_scale_inv")), "without .*down_proj.weight_scale_inv"),
        (
            edit(lambda t: t.update({f"{DOWN}weight_scale_inv": torch.ones(1, 2)})),
            "do not fit each other as FP8",
        ),
        (
            edit(lambda t: t.update({f"{DOWN}weight": torch.ones(72, 96)})),
            "quantised .*weight_scale_inv, F32",
        ),
        (edit(lambda t: t.update({f"{DOWN}weight_scale": torch.ones(1)})), "quantised .*weight_scale, F32"),
        (
            edit(lambda t: t.update({f"{DOWN}weight_scale_inv": torch.ones(1, 1, dtype=torch.uint8)})),
            "type U8",
        ),
        (
            edit(lambda t: [t.pop(n) for n in [*t] if "proj" in n] and None),
            "quantised by its config.json .FP8., and has no weight",
        ),
        (lambda f: (f / "config.json").write_text(json.dumps(plain_config(f))), "quantised .model.layers"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(spoil: Spoil, problem: str, folder: Path) -> None:
    quantise(folder, fp8_settings(), fp8_parts)
    spoil(folder)
    with pytest.raises(ModelError, match=problem) as refused:
        resolve(str(folder))
    assert "\n" not in str(refused.value)


def plain_config(folder: Path) -> dict[str, Any]:
    """As the folder's, without a word on quantisation."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    return config
