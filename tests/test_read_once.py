"""What is kept of a checkpoint's config and tokenizer is what transformers makes of them, bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from rayskip.data import tokenizer as tokenizers
from rayskip.data.tokenizer import Tokenizer, load_tokenizer
from rayskip.model import config as configs
from rayskip.model.checkpoint import read_spec
from rayskip.model.config import Config, read_config
from rayskip.model.families import family
from rayskip.model.families.parts import rope

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 8, "max_position_embeddings": 300}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama"},
    "older": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64},
    },
    "yarn": {"model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": YARN, "use_sliding_window": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 3},
    "gemma2": {"model_type": "gemma2", "head_dim": 24},
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 9e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 12345},
    "opt": {"model_type": "opt"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path / "cache"))


def in_turn(monkeypatch: pytest.MonkeyPatch, module: Any, maker: str, read: Callable[[], Any]) -> list[Any]:
    """What `read` says at first, and once `maker` is not to be called any more."""
    first = read()

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("made a second time")

    monkeypatch.setattr(module, maker, forbidden)
    return [first, read()]


@pytest.mark.parametrize("own", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_that_of_transformers(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **own}))
    theirs = AutoConfig.from_pretrained(tmp_path)
    of_family = family(theirs.model_type)
    spec = of_family.spec(theirs)  # type: ignore[arg-type]  # the attributes are the same
    rotary = of_family.rotary(theirs.model_type)

    def read() -> tuple[Config, Any]:
        return read_config(tmp_path, of_family.rotary), read_spec(tmp_path)

    for config, read_again in in_turn(monkeypatch, configs, "_by_transformers", read):
        told = {name for name in vars(config) if name not in ("ropes", "_text")}
        assert told > {"hidden_size", "tie_word_embeddings", "eos_token_id"}
        for name in told:
            assert getattr(config, name) == json.loads(json.dumps(getattr(theirs, name))), name
        assert (read_again.hidden, read_again.scale) == (spec.hidden, spec.scale)
        if rotary is None:
            assert config.ropes == {}
            continue
        layer_types = sorted(set(config.layer_types)) if theirs.model_type == "gemma3_text" else []
        for layer_type in layer_types or ["default"]:
            table = rope(config, spec, layer_type)
            positions = torch.arange(spec.max_positions)[None]
            cos, sin = rotary(theirs)(torch.zeros(1), positions, *(layer_types and [layer_type]))
            assert torch.equal(table.cos, cos[0])
            assert torch.equal(table.sin, sin[0])


TEXTS = (
    "The quick <|im_start|>user\nbrown fox",
    "  1234 + 5 = x , it 's <|endoftext|> Grüße 漢字 🙂\n\n\t",
    "",
    "a\u0000b<|im_end|>",
)


def check_tokenizer(own: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for add in (True, False):
            for split in (True, False):
                ids = own.encode(text, add_special_tokens=add, split_special_tokens=split)
                assert ids == theirs.encode(text, add_special_tokens=add, split_special_tokens=split)
                for skip in (True, False):
                    assert own.decode(ids, skip_special_tokens=skip) == theirs.decode(
                        ids, skip_special_tokens=skip
                    )
    assert own.get_vocab() == theirs.get_vocab()
    assert own.named_tokens == theirs.special_tokens_map
    assert own.special_tokens >= set(theirs.all_special_tokens)
    assert own.chat_template == theirs.chat_template
    assert own.longest == max(map(len, theirs.get_vocab()))


def test_a_tokenizer_is_that_of_transformers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    for own in in_turn(monkeypatch, tokenizers, "load_pretrained", lambda: load_tokenizer(smollm2)):
        check_tokenizer(own, theirs)
    assert own.special_ids["<|im_end|>"] == theirs.eos_token_id


def test_a_tokenizer_that_does_more_than_the_library_is_transformers_own(tmp_path: Path) -> None:
    library = Library(models.WordPiece({"[UNK]": 0, "it": 1, "'": 2, "s": 3, ",": 4}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=library, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )
    made.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode(theirs.encode("it, it's")) == "it, it's"  # spaces before commas are taken out
    for _ in range(2):
        own = load_tokenizer(tmp_path)
        assert own is not None
        check_tokenizer(own, theirs)


def test_other_files_make_another_tokenizer(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((smollm2 / name).read_bytes())
    first = load_tokenizer(tmp_path)
    with monkeypatch.context() as once:
        once.setattr(tokenizers, "load_pretrained", None)  # what says nothing of tokens does not count
        for name in ("model.safetensors.index.json", "trainer_state.json", "notes.txt"):
            (tmp_path / name).write_text("{}")
        assert load_tokenizer(tmp_path) is not None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    second = load_tokenizer(tmp_path)
    assert first is not None
    assert second is not None
    assert (first.chat_template != second.chat_template, second.chat_template) == (True, "{{ messages }}")


PLAN = """
import sys
from rayskip.config.file import load_config
from rayskip.dry_run import dry_run
dry_run(load_config(sys.argv[1], ["output.path=" + sys.argv[2]]))
print([name for name in ("torch", "transformers", "ray", "datasets") if name in sys.modules])
"""


def test_what_plans_a_job_of_a_known_model_imports_nothing_heavy(smollm2: Path, tmp_path: Path) -> None:
    job = {
        "name": "plan",
        "model": {"path": str(smollm2)},
        "input": {"path": str(ROOT / "configs/data/quickstart.jsonl"), "prompt": "ticket", "chat": True},
        "decode": {"draft": {"kind": "auto"}},
        "output": {"path": "unset"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    command = [sys.executable, "-c", PLAN, str(tmp_path / "job.yaml"), str(tmp_path / "out")]
    for expected in (True, False):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert ("torch" in ran.stdout) == expected, ran.stdout
    assert ran.stdout == "[]\n"
