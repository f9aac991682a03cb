"""A GGUF file, as llama.cpp reads it, made into a checkpoint like any other: a bfloat16 safetensors folder.

transformers maps names, config and tokenizer, and passes over what it does not know. So only a file is taken of
which every tensor and every setting is known here; others are refused by name before anything is converted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.data.blocks import BLOCK, sampled
from rayskip.errors import ModelError, shown
from rayskip.model.files import read_json
from rayskip.model.quantised import WANTED
from rayskip.user_cache import cache_root, publish

if TYPE_CHECKING:
    from gguf import GGUFReader

LABEL = "rayskip_gguf.json"
"""File beside converted weights that says what they were converted from."""

_PRODUCTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_LAYER = {f"{name}.weight" for name in (*_PRODUCTS, "attn_norm", "ffn_norm")}

ARCHITECTURES: dict[str, set[str]] = {
    "llama": _LAYER,
    "qwen2": _LAYER | {"attn_q.bias", "attn_k.bias", "attn_v.bias"},
    "qwen3": _LAYER | {"attn_q_norm.weight", "attn_k_norm.weight"},
}
"""Names of a layer's tensors, by general.architecture."""

OUTSIDE = {"token_embd.weight", "output_norm.weight", "output.weight"}
"""Names of the tensors outside layers; the last may be missing."""

SETTINGS = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size",
    "rope.dimension_count", "rope.freq_base", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
}  # fmt: skip
"""Of an architecture, after its name and a dot. Others must be 0, false or none."""

FLOATS = {"F64", "F32", "F16", "BF16"}

HEAD = 16 << 20
"""Bytes at the beginning of a file that hold its settings and the names of its tensors."""

_OF_LAYER = re.compile(r"blk\.\d+\.(.+)")

SPLITS = {
    "gpt-2", "llama3", "llama-v3", "llama-bpe", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen",
}  # fmt: skip
"""tokenizer.ggml.pre: ways to split a text before byte-level merges, of those that transformers knows."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """types: of the quantised tensors. head_dim: None where the file does not say."""

    types: tuple[str, ...]
    head_dim: int | None


def folder(file: Path) -> Path:
    """The converted folder of a GGUF file, made once for each content. Raises ModelError for what is not taken."""
    target = cache_root() / "models" / f"gguf-{_content(file)}"
    if not target.is_dir():
        facts = _check(file)
        _log.warning("converting %s to bfloat16 in %s, once", file, target)
        publish(target, lambda draft: _convert_labelled(file, draft, facts))
    return target


def source(folder: Path) -> str | None:
    """What the weights of a folder were converted from: "GGUF Q4_K, Q6_K"; None for any other folder."""
    label = folder / LABEL
    return f"GGUF {', '.join(read_json(label)['types'])}" if label.is_file() else None


def convert(file: Path, target: Path, name: str, head_dim: int | None = None) -> None:
    """Write a GGUF file's model and tokenizer into the folder `target`. name: of the model, for its config.
    head_dim: dimensions of a head, where the file says it.

    Raises ModelError when weights are missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    # The conversion's progress bars heed no setting; errors are exceptions and still come out.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        if head_dim:
            config.head_dim = head_dim
        model, loaded = from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        if missing := sorted(loaded["missing_keys"]) or sorted(loaded["mismatched_keys"]):
            raise ModelError(f"model.path: {file} has no {missing[0]}, or one of another shape")
        model.config._name_or_path = name
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _content(file: Path) -> str:
    """Identity of a file by its size, its beginning and what lies evenly spaced in it: a hex digest."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(HEAD))
        for block in sampled(opened, size, BLOCK):
            digest.update(block)
    return digest.hexdigest()[:32]


def _check(file: Path) -> Facts:
    """Raises ModelError for a file that cannot be converted exactly."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(file)
        architecture = _value(reader, "general.architecture")
    except Exception as error:  # numpy's, of a file that ends early or counts wrong
        raise ModelError(
            f"model.path: {file} is no whole GGUF file ({' '.join(str(error).split())})"
        ) from error
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"model.path: {file} has the architecture {shown(architecture)}; {', '.join(ARCHITECTURES)} are read "
            f"of GGUF; {WANTED}"
        )
    if (parts := _value(reader, "split.count")) not in (None, 0, 1):
        raise ModelError(
            f"model.path: {file} is one of {shown(parts)} parts; merge them (llama-gguf-split --merge)"
        )
    _check_settings(file, reader, architecture)
    _check_tokenizer(file, reader)
    _check_names(file, [tensor.name for tensor in reader.tensors], architecture)
    types = {tensor.tensor_type: tensor for tensor in reader.tensors}
    for kind, tensor in types.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"model.path: {file} has {tensor.name} in {kind.name}, which cannot be dequantised; {WANTED}"
            ) from error
    packed = sorted(kind.name for kind in types if kind.name not in FLOATS) or [kind.name for kind in types]
    return Facts(tuple(packed), _value(reader, f"{architecture}.attention.key_length"))


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_settings(file: Path, reader: GGUFReader, architecture: str) -> None:
    settings = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.")
    }
    for key, value in settings.items():
        if key not in SETTINGS and value not in (0, False, "none"):
            raise ModelError(
                f"model.path: {file} has {architecture}.{key} ({shown(value)}), which is not honoured; {WANTED}"
            )
    heads = settings.get("attention.head_count")
    if type(heads) is not int or heads < 1:
        raise ModelError(
            f"model.path: {file} has {architecture}.attention.head_count {shown(heads)}; one number is wanted"
        )
    dims = {"attention.key_length", "attention.value_length", "rope.dimension_count"} & settings.keys()
    head_dim = settings.get("attention.key_length", settings.get("embedding_length", 0) // heads)
    if other := next((key for key in sorted(dims) if settings[key] != head_dim), None):
        raise ModelError(
            f"model.path: {file} has {architecture}.{other} ({shown(settings[other])}) beside heads of {head_dim} "
            f"dimensions, which is not honoured; {WANTED}"
        )


def _check_tokenizer(file: Path, reader: GGUFReader) -> None:
    """transformers would split a text as GPT-2 does where it doesn't know a way, and put a space before each."""
    model, split = (_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    spaced = _value(reader, "tokenizer.ggml.add_space_prefix") in (None, True)
    if not ((model == "gpt2" and split in SPLITS) or (model == "llama" and spaced)):
        raise ModelError(
            f"model.path: {file} has the tokenizer {shown(model)}, which splits a text as {shown(split)}"
            f"{'' if spaced else ' and puts no space before it'}; it cannot be converted exactly; {WANTED}"
        )


def _check_names(file: Path, names: list[str], architecture: str) -> None:
    """transformers would pass over other tensors, such as factors of rotary frequencies."""
    for name in names:
        of_layer = _OF_LAYER.fullmatch(name)
        if not (of_layer and of_layer[1] in ARCHITECTURES[architecture]) and name not in OUTSIDE:
            raise ModelError(
                f"model.path: {file} has {name}, which transformers reads of no {architecture}; {WANTED}"
            )


def _convert_labelled(file: Path, target: Path, facts: Facts) -> None:
    convert(file, target, file.stem, facts.head_dim)
    (target / LABEL).write_text(json.dumps({"file": file.name, "types": facts.types}) + "\n")
