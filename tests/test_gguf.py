"""A GGUF file is the checkpoint that it was made of, or is refused by name before anything is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rayskip.data.tokenizer import load_tokenizer
from rayskip.errors import ModelError
from rayskip.model.checkpoint import dequantised, load, resolve

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 259,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip
"""llama.cpp's, by transformers' parts of names."""

Change = Callable[[GGUFWriter], Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path / "cache"))


def write(
    file: Path,
    architecture: str,
    change: Change = lambda writer: None,
    leave_out: str = "",
    split: str = "gpt-2",
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
) -> dict[str, Tensor]:
    """A random model as llama.cpp's converter writes one; returns what its tensors are dequantised, by
    transformers' names."""
    torch.manual_seed(1)
    config = CONFIGS[architecture]
    model = AutoModelForCausalLM.from_config(config)
    for tensor in model.parameters():
        if tensor.dim() == 1:  # else all norms are alike, and biases nothing
            torch.nn.init.normal_(tensor, 1, 0.2)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    tokens = [*bytes_to_unicode().values(), "Ġt", "he", "Ġthe", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_token_types([TokenType.NORMAL] * 259 + [TokenType.CONTROL])
    writer.add_eos_token_id(259)
    change(writer)
    meant = {}
    for name, tensor in model.state_dict().items():
        if name == leave_out or (name.startswith("lm_head") and config.tie_word_embeddings):
            continue
        stored = tensor.float().contiguous()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # pairs lie beside each other
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = stored.view(heads, 2, -1, stored.shape[1]).transpose(1, 2).reshape(stored.shape)
        theirs = name
        for part, other in NAMES.items():
            theirs = theirs.replace(part, other)
        meant[name] = stored
        if tensor.dim() == 2:
            packed = quantize(stored.numpy(), kind)
            writer.add_tensor(theirs, packed, raw_dtype=kind)
            meant[name] = torch.tensor(dequantize(packed, kind))
        else:
            writer.add_tensor(theirs, stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("architecture", [*CONFIGS])
def test_a_gguf_file_is_the_model_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    stored = write(file, architecture)
    config = CONFIGS[architecture]
    folder = resolve(str(file))
    assert resolve(str(file)) == folder  # converted once
    assert dequantised(folder, "float32") == "dequantised from GGUF Q8_0 to float32 (0.0 GB)"
    spec, weights = load(folder, torch.float32, torch.device("cpu"))
    assert spec.max_positions == 128
    assert spec.eos_token_ids == (259,)
    assert spec.head_dim == getattr(config, "head_dim", 16)
    assert len(weights.layers) == 2

    peer = AutoModelForCausalLM.from_config(config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    turned = {}
    for name, tensor in stored.items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            tensor = tensor.view(heads[part], -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        turned[name] = tensor.bfloat16().float()
    peer.load_state_dict(turned, strict=not config.tie_word_embeddings)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(259, (1, 40))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, peer(ids).logits)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.decode([258, 257]) == " thehe"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"change": lambda w: w.add_rope_scaling_type(RopeScalingType.YARN)},
            "llama.rope.scaling.type ('yarn'), which is not",
        ),
        ({"change": lambda w: w.add_sliding_window(8)}, "llama.attention.sliding_window (8)"),
        ({"change": lambda w: w.add_expert_count(0), "split": "smollm"}, "splits a text as 'smollm'"),
        (
            {"change": lambda w: w.add_rope_dimension_count(8)},
            "llama.rope.dimension_count (8) beside heads of 16",
        ),
        (
            {"change": lambda w: w.add_tensor("rope_freqs.weight", torch.ones(8).numpy())},
            "rope_freqs.weight, which transformers reads of no llama",
        ),
        ({"change": lambda w: w.add_uint16("split.count", 3)}, "is one of 3 parts"),
        ({"leave_out": "model.layers.1.mlp.up_proj.weight"}, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_would_be_passed_over_is_refused_by_name(
    given: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write(tmp_path / "tiny.gguf", "llama", **given)
    with pytest.raises(ModelError) as refused:
        resolve(str(tmp_path / "tiny.gguf"))
    assert problem in str(refused.value)
    assert not [*(tmp_path / "cache").glob("models/*")]


@pytest.mark.parametrize("size", [0, 3, 2000])
def test_a_damaged_gguf_file_is_one_line(size: int, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, "llama")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match="no whole GGUF file") as refused:
        resolve(str(file))
    assert "\n" not in str(refused.value)
