"""Decoders without a family of ours, through transformers' modules: its generate's tokens, by our engine."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import SIZES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rayskip
from rayskip.config import DecodeConfig, EngineConfig, JobConfig, SamplingParams
from rayskip.dry_run import dry_run, format_dry_run
from rayskip.engine import Engine
from rayskip.errors import ModelError
from rayskip.model.checkpoint import check, load, resolve
from rayskip.model.decoder import Decoder
from rayskip.model.families import FAMILIES
from rayskip.model.invariance import is_batch_invariant
from rayskip.skip import skip_policy

EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 6, "head_dim": 8,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"] * 2
TYPES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "vaultgemma": {"head_dim": 32, "sliding_window": 8, "layer_types": WINDOWS, "query_pre_attn_scalar": 12},
    "cwm": {"head_dim": 32, "sliding_window": 8, "layer_types": WINDOWS},
    "persimmon": {},
    "modernbert-decoder": {"sliding_window": 8, "layer_types": WINDOWS},
    "minicpm3": LATENT,
    "afmoe": {
        **EXPERTS, "head_dim": 16, "num_experts": 4, "num_dense_layers": 1, "sliding_window": 8,
        "layer_types": WINDOWS,
    },
    "deepseek_v3": {
        **EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
"""Dense ones and experts, windows, softcaps, partial rotary, latent keys of another width than values."""
SKIP = {"kind": "skipdecode", "max_layers": 4, "min_layers": 2, "horizon": 9}
NEW_TOKENS = 16


def _saved(folder: Path, model_type: str, **config: Any) -> Any:
    """A random model, saved in the folder."""
    torch.manual_seed(0)
    own = AutoConfig.for_model(model_type, **{**SIZES, **TYPES.get(model_type, {}), **config})
    model: Any = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a swap
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def _decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(*load(resolve(str(folder)), dtype, torch.device("cpu")))


def _prompts() -> list[list[int]]:
    """Of unequal length; two begin alike, for more than a page."""
    generator = torch.Generator().manual_seed(1)
    first, *others = (
        torch.randint(3, 190, (length,), generator=generator).tolist() for length in (70, 1, 9, 33)
    )
    return [first, first[:66] + others[1], *others]


def _tokens(decoder: Decoder, **decode: Any) -> tuple[list[list[int]], int]:
    """Of the prompts in one batch, in few pages; and how many came from a shared prefix."""
    sizes = EngineConfig(max_batch_rows=3, max_model_len=128, kv_cache_gb=1e-6)
    engine = Engine(decoder, engine=sizes, decode=DecodeConfig.model_validate(decode))
    found = engine.generate(_prompts(), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    return [list(row[0].token_ids or ()) for row in found], engine.take_stats().prefix_tokens


@pytest.mark.parametrize("model_type", TYPES)
def test_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    assert model_type not in FAMILIES
    peer = _saved(tmp_path, model_type)
    theirs = [
        peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
        for prompt in _prompts()
    ]
    decoder = _decoder(tmp_path)

    ours, shared = _tokens(decoder)

    assert ours == theirs
    assert shared >= 64
    assert _tokens(decoder, draft={"kind": "lookup"})[0] == theirs


@pytest.mark.parametrize("model_type", ["cwm", "deepseek_v3"])
def test_skipped_layers_equal_a_slow_reference(model_type: str, tmp_path: Path) -> None:
    """The reference runs transformers over the whole text for each token; late ones pass a layer by."""
    peer = _saved(tmp_path, model_type)
    decode = DecodeConfig.model_validate({"skip": SKIP})
    policy = skip_policy(decode.skip, SIZES["num_hidden_layers"])
    prompt_length = 0

    def pass_by(index: int, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        positions = range(-prompt_length, output.shape[1] - prompt_length)
        runs = torch.tensor([index in policy.layers(position) for position in positions])
        return torch.where(runs[None, :, None], output, inputs[0])

    for index, layer in enumerate(peer.model.layers):
        layer.register_forward_hook(partial(pass_by, index))
    expected = []
    for prompt in _prompts():
        tokens, prompt_length = list(prompt), len(prompt)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                tokens.append(int(peer(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        expected.append(tokens[prompt_length:])
    decoder = _decoder(tmp_path)
    assert _tokens(decoder, skip=SKIP)[0] == expected
    assert _tokens(decoder, skip=SKIP, draft={"kind": "lookup"})[0] == expected


@pytest.mark.parametrize(
    ("model_type", "config", "problem"),
    [
        ("bloom", {"n_layer": 2, "n_head": 6}, "its forward takes no positions"),
        ("bert", {}, "sees other tokens than the last so many"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, r"layer 0 \(conv\) does not attend"),
        (
            "apertus",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ("diffllama", {}, "attends 2 times"),
    ],
)
def test_what_cannot_run_is_refused_by_its_config(
    model_type: str, config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    _saved(tmp_path, model_type, **config)
    with pytest.raises(ModelError, match=problem) as raised:
        check(resolve(str(tmp_path)))
    assert f"a {model_type} does not run" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensors_that_do_not_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    _saved(tmp_path, "apertus")
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    query, key = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight")
    for change, problem in (
        (lambda own: own.pop(query), f"no tensor '{query}'"),
        (
            lambda own: own.update({f"{query}s": own[query].clone()}),
            f"has {query}s, for which there is no place",
        ),
        (lambda own: own.update({key: torch.zeros(3, 3)}), rf"{key} is \(3, 3\), but config.json says"),
    ):
        own = dict(good)
        change(own)
        save_file(own, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=problem):
            check(tmp_path)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    own = _saved(tmp_path / "model", "apertus").model.layers[1].self_attn.q_proj.weight
    a, b = torch.randn(3, own.shape[1]), torch.randn(own.shape[0], 3)
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    pair = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter/adapter_model.safetensors")
    _, modules = load(tmp_path / "model", torch.float32, torch.device("cpu"), tmp_path / "adapter")
    torch.testing.assert_close(modules.model.model.layers[1].self_attn.q_proj.weight, own + 2 * b @ a)


def test_a_model_that_does_something_else_is_refused_as_it_is_loaded(tmp_path: Path) -> None:
    _saved(tmp_path, "cwm")
    spec, modules = load(resolve(str(tmp_path)), torch.float32, torch.device("cpu"))
    modules.windows = [2, None, 2, None]
    with pytest.raises(ModelError, match="standard deviations from those of transformers' own forward"):
        Decoder(spec, modules)


def test_a_dense_one_in_bfloat16_is_batch_invariant_and_says_what_it_runs_through(tmp_path: Path) -> None:
    _saved(tmp_path, "apertus", num_attention_heads=4, hidden_size=128, intermediate_size=128)
    decoder = _decoder(tmp_path, torch.bfloat16)
    info = Engine(decoder).info
    assert info["model"] == "apertus, through transformers"
    assert info["batch_invariant"] == is_batch_invariant(decoder)
    assert info["batch_invariant"]
    with pytest.raises(ModelError, match=r"decode.draft: kangaroo needs a model of a family of ours"):
        Engine(decoder, decode=DecodeConfig.model_validate({"draft": {"kind": "kangaroo"}}))


def test_a_whole_job(tmp_path: Path, smollm2: Path) -> None:
    vocab = len(json.loads((smollm2 / "tokenizer.json").read_text())["model"]["vocab"])
    _saved(model := tmp_path / "model", "apertus", vocab_size=vocab)
    for file in smollm2.glob("*token*"):
        shutil.copy(file, model)
    rows = [{"prompt": f"Count to {number}:"} for number in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = JobConfig.model_validate(
        {
            "name": "hosted",
            "model": {"path": str(model), "dtype": "float32"},
            "input": {"path": str(tmp_path / "in.jsonl")},
            "output": {"path": str(tmp_path / "out"), "shard_rows": 4},
            "sampling": {"max_tokens": 6},
            "decode": {"draft": {"kind": "lookup"}},
        },
    )
    said = format_dry_run(dry_run(job))
    assert re.search(
        rf"model {model} \(apertus, through transformers\), [\d.]+ GB in float32, context 256", said
    )
    report = rayskip.run(job)
    assert (report.rows, report.generations_failed) == (12, 0)
    assert report.engine["model"] == "apertus, through transformers"
