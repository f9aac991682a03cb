"""Which checkpoints are taken, which are refused and how, and what identifies one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import reference_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rayskip.errors import ModelError
from rayskip.model import embedded
from rayskip.model.checkpoint import BLOCK, SAMPLES, load, resolve, weights_fingerprint
from rayskip.model.families import FAMILIES, family

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lose_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _point_outside(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: _edit(folder / "config.json", auto_map={"AutoModel": "m.M"}), "custom code"),
        (lambda folder: _edit(folder / "config.json", quantization_config={"bits": 4}), "quantised"),
        (lambda folder: _edit(folder / "config.json", model_type="bloom"), "'bloom'; known: gemma2, gemma3"),
        (_pickled, "no model.safetensors; pytorch_model.bin is not read, only safetensors"),
        (_cut, "not a whole safetensors file"),
        (_lose_shard, "no model-00002-of-00002.safetensors"),
        (_point_outside, "must name safetensors files beside it"),
    ],
)
def test_unusable_folder_is_refused(spoil: Callable[[Path], Any], problem: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)


def test_checking_a_folder_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from rayskip.model.checkpoint import resolve, weights_fingerprint;"
        "weights_fingerprint(resolve(sys.argv[1]));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelError, match=f"did you mean {folder}"):
        resolve(str(folder.with_name("tiny-lama")))
    with pytest.raises(ModelError, match=f"did you mean {embedded.NAME}"):
        resolve("smollm-135m-instruct")


def test_hub_id_without_network_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="no folder nobody/nothing, and the hub cannot be reached"):
        resolve("nobody/nothing")


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    _edit(folder / "config.json", vocab_size=68)
    with pytest.raises(ModelError, match=r"embedding is \(67, 32\), but config.json says \(68, 32\)"):
        load(folder, torch.float32, CPU)


def test_missing_tensor_is_named(folder: Path) -> None:
    _edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no tensor 'layers\.2\.self_attn"):
        load(folder, torch.float32, CPU)


def test_sharded_and_unprefixed_checkpoints_load_alike(folder: Path) -> None:
    _, whole = load(folder, torch.bfloat16, CPU)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        file = f"model-{number:05}.safetensors"
        save_file({name.removeprefix("model."): tensors[name]}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder / "consolidated.safetensors")

    _, sharded = load(resolve(str(folder)), torch.bfloat16, CPU)

    assert sharded.embed.dtype == torch.bfloat16
    assert torch.equal(sharded.embed, whole.embed)
    assert torch.equal(sharded.layers[1].qkv.weight, whole.layers[1].qkv.weight)


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, (2,))])
def test_generation_config_decides_what_ends_a_text(
    eos: Any, expected: tuple[int, ...], folder: Path
) -> None:
    _edit(folder / "generation_config.json", eos_token_id=eos)
    spec, _ = load(folder, torch.float32, CPU)
    assert spec.eos_token_ids == expected


def test_fingerprint_is_of_the_content(folder: Path) -> None:
    before = weights_fingerprint(folder)
    assert weights_fingerprint(Path(shutil.copytree(folder, folder.with_name("copy")))) == before

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors")
    changed_weight = weights_fingerprint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")

    assert len({before, changed_weight, weights_fingerprint(folder)}) == 3


def test_fingerprint_of_a_large_file_covers_header_start_and_end(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as target:
        target.truncate((SAMPLES + 4) * BLOCK)
    seen = {weights_fingerprint(folder)}
    for offset in (20, BLOCK - 1, file.stat().st_size - 1):
        with file.open("r+b") as target:
            target.seek(offset)
            target.write(b"\xff")
        seen.add(weights_fingerprint(folder))
    assert len(seen) == 4


def test_every_named_family_exists() -> None:
    assert all(family(model_type).weights for model_type in FAMILIES)


def test_of_two_writers_one_wins_and_both_end_well(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    both_filled = threading.Barrier(2)

    def fill(draft: Path) -> None:
        (draft / "config.json").write_text("whole")
        assert not target.exists()
        both_filled.wait(timeout=10)

    failed = []

    def publish() -> None:
        try:
            embedded.publish(target, fill)
        except Exception as error:
            failed.append(error)

    writers = [threading.Thread(target=publish) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "whole"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(draft: Path) -> None:
        (draft / "config.json").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        embedded.publish(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set RAYSKIP_CACHE"):
        embedded.publish(tmp_path / "file" / "models" / "model", lambda draft: None)


def test_embedded_model_is_a_plain_checkpoint(smollm2: Path) -> None:
    """transformers reads the folder as it is, and agrees on what the weights say."""
    spec, weights = load(smollm2, torch.float32, CPU)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    token_ids = tokenizer.encode("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n")
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    with torch.no_grad():
        expected = peer(torch.tensor([token_ids])).logits[0]

    torch.testing.assert_close(reference_logits(spec, weights, token_ids), expected, atol=2e-3, rtol=1e-3)
    assert (len(weights.layers), spec.eos_token_ids) == (30, (2,))
    assert tokenizer.decode([2]) == tokenizer.eos_token == "<|im_end|>"
    assert peer.generation_config.eos_token_id == 2


def test_embedded_tokenizer_is_the_original_one(smollm2: Path) -> None:
    ours = AutoTokenizer.from_pretrained(smollm2)
    gguf = embedded.gguf_file()
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    messages = [{"role": "user", "content": "Grüße, 你好 🎈!\n\n  1234567 tokens\tand <|im_end|> more"}]

    assert ours.chat_template == original.chat_template
    assert ours.encode(messages[0]["content"]) == original.encode(messages[0]["content"])
    assert ours.apply_chat_template(messages, return_dict=False) == original.apply_chat_template(
        messages, return_dict=False
    )
