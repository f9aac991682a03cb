"""Which checkpoints are taken, which are refused and how, and what identifies one."""

from __future__ import annotations

import io
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
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rayskip import user_cache
from rayskip.config import JobConfig, SamplingParams
from rayskip.data.blocks import BLOCK, SAMPLES
from rayskip.data.tokenizer import load_tokenizer
from rayskip.dry_run import dry_run, format_dry_run
from rayskip.errors import ModelError
from rayskip.model import embedded
from rayskip.model.checkpoint import (
    check,
    load,
    resolve,
    suggested_sampling,
    weights_fingerprint,
)
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


def _retype(folder: Path, name: str, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")


def _add(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(shape)}, folder / "model.safetensors")


def _remove(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _nest(folder: Path) -> None:
    (folder / "config.json").write_text('{"rope_scaling": ' + '{"a": ' * 10_000 + "1" + "}" * 10_001)


def _bloat(file: Path) -> None:
    with file.open("r+b") as target:
        target.truncate(1 << 30)  # sparse: it takes no room


def _forge_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as target:
        target.write((1 << 40).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (_nest, "config.json: nested more than 64 levels deep"),
        (lambda folder: _bloat(folder / "config.json"), "config.json: 1,073,741,824 bytes are no config"),
        (
            lambda folder: _bloat(folder / "generation_config.json"),
            "generation_config.json: 1,073,741,824 bytes",
        ),
        (
            lambda folder: _edit(folder / "config.json", num_hidden_layers=-1),
            "num_hidden_layers is -1; a whole",
        ),
        (lambda folder: _edit(folder / "config.json", num_hidden_layers=10**9), "from 1 to 10,000"),
        (lambda folder: _edit(folder / "config.json", vocab_size=0), "vocab_size is 0; a whole number"),
        (lambda folder: _edit(folder / "config.json", hidden_size="32"), "hidden_size is '32'; a whole"),
        (
            lambda folder: _edit(folder / "config.json", num_key_value_heads=3),
            "num_attention_heads 4 is no mult",
        ),
        (
            lambda folder: _edit(folder / "config.json", rms_norm_eps="small"),
            "rms_norm_eps is 'small'; a number",
        ),
        (lambda folder: _edit(folder / "config.json", model_type=["llama"]), "model_type .'llama'.; known"),
        (
            lambda folder: _edit(folder / "config.json", architectures=["LlamaForSequenceClassification"]),
            "architectures .'LlamaForSequenceClassification'.; a model that generates text is wanted",
        ),
        (
            lambda folder: (folder / "config_sentence_transformers.json").write_text("{}"),
            "sentence-transformers model, which embeds text",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: _edit(folder / "config.json", compression_config={"format": "x"}), "quantised"),
        (
            lambda folder: (folder / "hf_quant_config.json").write_text("{}"),
            "quantised .hf_quant_config.json",
        ),
        (
            lambda folder: _retype(folder, "model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
            "quantised .model.layers.0.mlp.up_proj.weight, F8_E4M3.; give the checkpoint in bfloat16",
        ),
        (lambda folder: _retype(folder, "lm_head.weight", torch.int8), "quantised .lm_head.weight, I8"),
        *(
            (lambda folder, name=name: _add(folder, name, (1,)), f"quantised .{name}, F32")
            for name in (
                "model.layers.0.mlp.up_proj.weight_scale",
                "model.layers.0.mlp.up_proj.weight_scale_inv",
                "model.layers.0.mlp.up_proj.qweight",
                "model.layers.0.mlp.up_proj.weight.absmax",
                "model.layers.0.mlp.up_proj.weight_packed",
            )
        ),
        (_forge_header, "not a whole safetensors file .*header"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: _edit(folder / "config.json", auto_map={"AutoModel": "m.M"}), "custom code"),
        (lambda folder: _edit(folder / "config.json", quantization_config={"bits": 4}), "quantised"),
        (lambda folder: _edit(folder / "config.json", model_type="lama"), r"'lama' \(did you mean llama"),
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


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    "content", [{"auto_map": {"AutoTokenizer": ["code.Run", None]}}, {"attn_implementation": "owner/kernel"}]
)
def test_code_that_any_config_names_is_refused(name: str, content: dict[str, Any], folder: Path) -> None:
    known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**known, "nested": [content]}))
    with pytest.raises(ModelError, match=f"model.path: .*{name} names custom code .{next(iter(content))}"):
        resolve(str(folder))


def test_a_tokenizers_code_never_runs_not_even_with_consent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"tokenizer_class": "Run", "auto_map": {"AutoTokenizer": ["code.Run", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Run: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_a_damaged_tokenizer_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: _add(folder, "model.layers.0.mlp.up_proj.bias", (40,)), "there is no place"),
        (lambda folder: _add(folder, "model.norm.bias", (32,)), "has model.norm.bias, for which"),
        (lambda folder: _add(folder, "model.layers.2.mlp.up_proj.weight", (40, 32)), "has model.layers.2"),
        (lambda folder: _add(folder, "layers.0.mlp.up_proj.weight", (40, 32)), "one tensor under two names"),
        (lambda folder: _remove(folder, "lm_head.weight"), "no lm_head.weight, and config.json does not tie"),
        (lambda folder: _edit(folder / "config.json", attention_bias=True), "no tensor .*q_proj.bias"),
        (
            lambda folder: _edit(folder / "config.json", head_dim=16),
            "layer 0 qkv is .64, 32., but config.json",
        ),
        (lambda folder: _edit(folder / "config.json", hidden_size=33), "transformers cannot read it"),
        (lambda folder: _edit(folder / "config.json", eos_token_id="2"), "eos_token_id"),
        (lambda folder: _edit(folder / "generation_config.json", eos_token_id=["2"]), "eos_token_id is"),
        (
            lambda folder: _edit(
                folder / "config.json", rope_parameters={"rope_type": "new", "rope_theta": 1e4}
            ),
            "transformers makes no rope of .*KeyError: 'new'",
        ),
        (
            lambda folder: _edit(folder / "config.json", rope_parameters={"rope_type": "linear"}),
            "config.json",
        ),
        (
            lambda folder: _edit(
                folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": -1}
            ),
            "its angles are not finite",
        ),
        (
            lambda folder: _edit(folder / "config.json", model_type="qwen2", hidden_size=2, head_dim=None),
            "hidden_size 2 is less than num_attention_heads 4",
        ),
        (
            lambda folder: _edit(folder / "config.json", partial_rotary_factor=0.5),
            "partial_rotary_factor asks for 4 turned dimensions of a head, and transformers turns 8",
        ),
        (
            lambda folder: _edit(folder / "config.json", sliding_window=8),
            "sliding_window .8. is not supported",
        ),
    ],
)
def test_what_does_not_fit_together_is_told_before_a_weight_is_read(
    spoil: Callable[[Path], Any], problem: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        check(resolve(str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_older_checkpoints_hold_beside_their_weights_is_left_out(folder: Path) -> None:
    _add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", (4,))
    assert check(resolve(str(folder))).hidden == 32


def test_an_output_layer_of_its_own_is_used_though_the_config_ties_it(folder: Path) -> None:
    """As in transformers; one that equals the embedding is the embedding."""
    _edit(folder / "config.json", tie_word_embeddings=True)
    _, weights = load(folder, torch.float32, CPU)
    assert torch.equal(weights.head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    _, weights = load(folder, torch.float32, CPU)
    assert weights.head.weight is weights.embed


@pytest.mark.parametrize(
    ("longest", "scaling", "expected"),
    [
        (64, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (80, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (64, {"factor": 2.0}, 128),
    ],
)
def test_yarn_extends_the_context(longest: int, scaling: dict[str, Any], expected: int, folder: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **scaling}
    _edit(folder / "config.json", rope_parameters=rope, max_position_embeddings=longest)
    spec, weights = load(folder, torch.float32, CPU)
    assert (spec.max_positions, len(weights.ropes["default"].cos)) == (expected, expected)


def test_a_folder_of_links_is_read_like_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert check(resolve(str(snapshot))).hidden == 32
    assert weights_fingerprint(snapshot) == weights_fingerprint(folder)


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
    with pytest.raises(ModelError, match=r"no tensor 'layers\.2\."):
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
    assert torch.equal(sharded.layers[1].attention.qkv.weight, whole.layers[1].attention.qkv.weight)


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


def test_a_large_tokenizer_is_fingerprinted_whole(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text("{}")
    with file.open("r+b") as target:
        target.truncate((SAMPLES + 2) * BLOCK)
    seen = {weights_fingerprint(folder)}
    for offset in (20, 9 * BLOCK + 7):
        with file.open("r+b") as target:
            target.seek(offset)
            target.write(b"x")
        seen.add(weights_fingerprint(folder))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"top_k": None, "eos_token_id": 2}, {}),
    ],
)
def test_the_generation_config_suggests_how_to_sample(
    content: dict[str, Any], expected: dict[str, Any], folder: Path
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert suggested_sampling(folder) == expected


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
            user_cache.publish(target, fill)
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
        user_cache.publish(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set RAYSKIP_CACHE"):
        user_cache.publish(tmp_path / "file" / "models" / "model", lambda draft: None)


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


def test_a_sentencepiece_model_alone_is_a_tokenizer_if_its_tokens_are_kept(folder: Path) -> None:
    texts = folder / "texts"
    texts.write_text(
        "\n".join(f"the first of {number} words and its greeting, Grüße" for number in range(200))
    )
    SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    text = "the greeting of 2 words: 你好"
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)

    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ModelError, match="other tokens of it than SentencePiece does"):
        load_tokenizer(folder)


def test_plan_says_that_the_model_suggests_other_sampling_than_the_job(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"ids": [3, 4, 5]}\n')
    _edit(folder / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95, top_k=0)
    job = JobConfig.model_validate(
        {
            "name": "ids",
            "model": {"path": str(folder)},
            "input": {"path": str(tmp_path / "rows.jsonl"), "prompt_token_ids": "ids"},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    said = (
        "the model's generation_config.json suggests temperature 0.6, top_p 0.95; "
        "the job's sampling has temperature 0.0, top_p 1.0, greedy"
    )
    assert said in format_dry_run(dry_run(job)).splitlines()
    sampled = SamplingParams(temperature=0.6, top_p=0.95)
    assert "suggests" not in format_dry_run(dry_run(job.model_copy(update={"sampling": sampled})))
