"""What is refused of a checkpoint by its json files and its tensors' names and types, before anything is loaded.

Knows no family's names: what a family makes of its config, and whether all of its tensors are there, is
`checkpoint.check`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayskip.errors import ModelError, shown
from rayskip.model.adapter import SETTINGS
from rayskip.model.families import FAMILIES
from rayskip.model.files import FLOATS, PACKED, Header, find_key, read_json
from rayskip.model.hosted.facts import read_facts
from rayskip.model.hosted.known import is_known, unknown
from rayskip.model.quantised import WANTED, read_scheme

WRAPPERS = frozenset({
    "Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
})  # fmt: skip
"""Architectures beside *ForCausalLM whose text model generates."""

CODE_KEYS = ("auto_map", "custom_pipelines")
KERNEL_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""transformers downloads and runs a kernel that these name by owner/name."""

QUANTISED_FILES = ("hf_quant_config.json",)
QUANTISED_NAMES = (
    "_scale", "_scale_2", "_scale_inv", "_scales", ".scales", "_zero_point", ".qweight", ".qzeros", ".g_idx",
    "_g_idx", ".absmax", ".quant_map", ".nested_absmax", ".SCB", "_packed", "_blocks", "_qdata", ".qscales",
    ".codes", ".codebooks", ".W_q",
)  # fmt: skip
"""Ends of names of the tensors that belong to quantised weights: their scales, offsets, maps and packed forms."""

MXFP4_NAMES = ("_blocks", "_scales")
"""Of gpt_oss's, whose family reads them."""

MOST_LAYERS = 10_000
MOST_POSITIONS = 1 << 24
MOST = (1 << 31) - 1
SIZES = {
    "vocab_size": MOST,
    "hidden_size": MOST,
    "intermediate_size": MOST,
    "ffn_dim": MOST,
    "ffn_hidden_size": MOST,
    "word_embed_proj_dim": MOST,
    "head_dim": MOST,
    "num_attention_heads": MOST,
    "num_key_value_heads": MOST,
    "num_kv_heads": MOST,
    "n_embd": MOST,
    "n_inner": MOST,
    "n_head": MOST,
    "n_layer": MOST_LAYERS,
    "n_positions": MOST_POSITIONS,
    "num_experts": MOST,
    "num_local_experts": MOST,
    "n_routed_experts": MOST,
    "num_experts_per_tok": MOST,
    "moe_intermediate_size": MOST,
    "shared_expert_intermediate_size": MOST,
    "n_shared_experts": MOST,
    "n_group": MOST,
    "topk_group": MOST,
    "decoder_sparse_step": MOST,
    "num_hidden_layers": MOST_LAYERS,
    "max_position_embeddings": MOST_POSITIONS,
    "sliding_window": MOST,
}
"""Keys of whole numbers from 1, and the most of each."""

UNSET = ("sliding_window",)
"""Of these 0 says none, as transformers writes it of a Qwen 2 with experts."""

POSITIVE = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta",
            "rope_local_base_freq", "rotary_emb_base", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
            "norm_epsilon", "norm_eps", "logits_scaling", "logit_scale", "attention_multiplier",
            "embedding_multiplier", "residual_multiplier", "routed_scaling_factor", "swiglu_alpha",
            "swiglu_limit")  # fmt: skip


def check_configs(folder: Path) -> None:
    """Refuse a folder by its json files: custom code, quantisation, no decoder that runs, absurd sizes.

    Raises ModelError.
    """
    if not (folder / "config.json").is_file():
        is_adapter = (folder / SETTINGS).is_file()
        raise ModelError(
            f"model.path: {folder} has no config.json; "
            + (
                "it is an adapter: name its base in model.path and this folder in model.adapter"
                if is_adapter
                else "give a folder saved by transformers, or a .gguf file"
            )
        )
    check_code(folder)
    if (folder / SETTINGS).is_file():
        raise ModelError(
            f"model.path: {folder} holds an adapter ({SETTINGS}) beside its weights, and is another model with it "
            "than without; move the adapter to a folder of its own, and name that in model.adapter to have it"
        )
    file = folder / "config.json"
    config = read_json(file)
    scheme = read_scheme(folder)
    if marked := next((name for name in QUANTISED_FILES if (folder / name).is_file()), None):
        raise ModelError(f"model.path: {folder} is quantised ({marked}); {WANTED}")
    model_type = config.get("model_type")
    if not is_known(model_type):
        raise ModelError(f"model.path: {file} has {unknown(model_type)}")
    _check_architecture(file, config)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            _check_sizes(file, section)
    if model_type not in FAMILIES:
        if scheme is not None:
            raise ModelError(
                f"model.path: {folder} is quantised ({scheme.name}), which is not read of a {model_type}, a model "
                f"through transformers' modules; {WANTED}"
            )
        read_facts(folder)


def check_code(folder: Path, key: str = "model.path") -> None:
    """Refuse a folder in which any config names code to run. key: of the job's config, for the message."""
    for file in sorted(folder.glob("*config*.json")):
        config = read_json(file)
        if found := find_key(config, CODE_KEYS):
            raise ModelError(f"{key}: {file} names custom code ({found[0]}); rayskip runs none")
        kernels = find_key(config, KERNEL_KEYS)
        if kernels and "/" in json.dumps(kernels[1]):
            raise ModelError(
                f"{key}: {file} names custom code ({kernels[0]}: {shown(kernels[1])}); rayskip runs none"
            )


def _check_architecture(file: Path, config: dict[str, Any]) -> None:
    """A model with another head (a reward, a class, an embedding) has a decoder's tensors and generates rubbish."""
    named = config.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        known = isinstance(name, str) and (name.endswith(("ForCausalLM", "Model")) or name in WRAPPERS)
        if not known:
            raise ModelError(
                f"model.path: {file} has architectures [{shown(name)}]; a model that generates text is wanted "
                f"(…ForCausalLM or {', '.join(sorted(WRAPPERS))})"
            )
    if (file.parent / "config_sentence_transformers.json").is_file():
        raise ModelError(
            f"model.path: {file.parent} is a sentence-transformers model, which embeds text and generates none"
        )


def _check_sizes(file: Path, config: dict[str, Any]) -> None:
    for key, most in SIZES.items():
        value = config.get(key)
        if value == 0 and type(value) is int and key in UNSET:
            continue
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ModelError(f"{file}: {key} is {shown(value)}; a whole number from 1 to {most:,} is wanted")
    for key in POSITIVE:
        value = config.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
            raise ModelError(f"{file}: {key} is {shown(value)}; a number above 0 is wanted")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ModelError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )


def check_tensors(headers: Mapping[str, Header], key: str = "model.path") -> None:
    """Refuse tensors that are quantised in another way than the config says: cast without their scales they would
    be other weights.

    headers: as `dequantised_headers` leaves them.
    key: of the job's config, for the message. Raises ModelError.
    """
    for name, header in headers.items():
        if header.dtype == PACKED and _is_mxfp4(name, headers):
            continue
        packed = name.endswith(".weight") and header.dtype not in FLOATS
        if packed or name.endswith(QUANTISED_NAMES) or ".quant_state." in name:
            raise ModelError(f"{key}: {header.file} is quantised ({name}, {header.dtype}); {WANTED}")


def _is_mxfp4(name: str, headers: Mapping[str, Header]) -> bool:
    """Whether bytes are MXFP4's: numbers, or scales of them, with the others beside them."""
    start = next((name.removesuffix(end) for end in MXFP4_NAMES if name.endswith(end)), None)
    return start is not None and all(
        start + end in headers and headers[start + end].dtype == PACKED for end in MXFP4_NAMES
    )
