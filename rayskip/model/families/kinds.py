"""What each model_type of Llama's shape has of its own, as a table: llama.py reads it, and moe.py and gpt_oss.py,
whose layers have experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rayskip.errors import ModelError
from rayskip.model.families.parts import FULL, Tensors, max_positions, windows
from rayskip.model.spec import Norm

if TYPE_CHECKING:
    from rayskip.model.config import Config


def _rms(named: Tensors, config: Config, name: str) -> Norm:
    return named.rms_norm(name, config.rms_norm_eps)


def _rms_less_one(named: Tensors, config: Config, name: str) -> Norm:
    return named.rms_norm(name, config.rms_norm_eps, offset=1.0)


def _layer_norm(named: Tensors, config: Config, name: str) -> Norm:
    return named.layer_norm(name, config.layer_norm_eps)


def _layer_norm_epsilon(named: Tensors, config: Config, name: str) -> Norm:
    return named.layer_norm(name, config.norm_epsilon)


def _layer_norm_less_one(named: Tensors, config: Config, name: str) -> Norm:
    own = named.layer_norm(name, config.norm_eps)
    return replace(own, weight=own.weight + 1)


def _layer_norm_without_bias(named: Tensors, config: Config, name: str) -> Norm:
    return Norm("layer", named[f"{name}.weight"], None, config.layer_norm_eps)


def _layer_norm_of_ones(named: Tensors, config: Config, name: str) -> Norm:
    embed = named["embed_tokens.weight"]
    return Norm("layer", embed.new_ones(config.hidden_size), None, 1e-5)


def _no_window(config: Config) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _one_window(config: Config) -> list[int | None]:
    if config.sliding_window == 0:
        raise ModelError(
            "config.json: sliding_window is 0; a whole number from 1, or null for none, is wanted"
        )
    return [config.sliding_window] * config.num_hidden_layers


def _all_turned(config: Config) -> list[bool]:
    return [True] * config.num_hidden_layers


def _turned_as_listed(config: Config) -> list[bool]:
    listed, layers = config.no_rope_layers, config.num_hidden_layers
    if len(listed) < layers:
        raise ModelError(f"config.json: no_rope_layers has {len(listed)} entries for {layers} layers")
    return [bool(own) for own in listed[:layers]]


def _turned_in_windows(config: Config) -> list[bool]:
    """If there are windows at all, layers that see everything have no rope."""
    return [not config.sliding_window or kind != FULL for kind in config.layer_types]


def _logit_scale(config: Config) -> float:
    if config.logit_scale is None:
        raise ModelError("config.json: logit_scale is null; a number above 0 is wanted")
    return float(config.logit_scale)


def _up_to_scaling(config: Config) -> int:
    """From its original length on a Ministral 3 scales queries by their position, which nothing here does."""
    own = config.rope_parameters
    longest = max_positions(config)
    if not own.get("llama_4_scaling_beta"):
        return longest
    return min(longest, int(own["original_max_position_embeddings"]))


BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Kind:
    """What a model_type has of its own; the defaults are Mistral's.

    qkv_bias, out_bias, mlp_bias, parallel, has_head_norms: the answer, or the config's key that gives it.
    norm: makes one, of its name. norms: names of those before attention, after it, before the MLP and after it; in
    a parallel layer the first serves both. qkv, out, up, down: names of products; a single name of what has several
    parts is of one that has them stacked. head_norms: names of norms on queries and keys; norms_turned: they come
    after rope. interleaved: rope turns neighbours, not halves. windows: positions that each layer sees; turned:
    which layers have rope. embed_scale, logit_scale, scale: as Spec's. residual: multiplies what attention and MLP
    add. refused: keys of the config that are not honoured. positions: how long a text may be. rotary: folder and
    first letters of transformers' module.
    """

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    parallel: bool | str = False
    norm: Callable[[Tensors, Config, str], Norm] = _rms
    norms: tuple[str | None, str | None, str | None, str | None] = BEFORE
    final_norm: str = "norm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    head_norms: tuple[str, str] | None = None
    has_head_norms: bool | str = True
    norms_turned: bool = False
    interleaved: bool = False
    windows: Callable[[Config], list[int | None]] = _no_window
    turned: Callable[[Config], list[bool]] = _all_turned
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    gated: bool = True
    head_bias: bool = False
    scale: Callable[[Config], float] | None = None
    embed_scale: Callable[[Config], float] | None = None
    logit_scale: Callable[[Config], float] | None = None
    residual: Callable[[Config], float] | None = None
    refused: tuple[str, ...] = ()
    positions: Callable[[Config], int] = max_positions
    rotary: tuple[str, str] = ("llama", "Llama")


HEAD_NORMS = ("q_norm", "k_norm")
BIASED = Kind(qkv_bias="attention_bias", out_bias="attention_bias")
LLAMA = replace(BIASED, mlp_bias="mlp_bias")
QWEN2 = Kind(qkv_bias=True, windows=windows)
QWEN3 = replace(BIASED, head_norms=HEAD_NORMS)
OLMO2 = replace(QWEN3, norms=AFTER)
GLM = Kind(qkv_bias="attention_bias", up=("gate_up_proj",), interleaved=True, rotary=("glm", "Glm"))
GRANITE = replace(
    LLAMA,
    scale=lambda config: config.attention_multiplier,
    embed_scale=lambda config: config.embedding_multiplier,
    logit_scale=lambda config: 1 / config.logits_scaling,
    residual=lambda config: config.residual_multiplier,
)
COHERE = replace(
    BIASED,
    parallel=True,
    norm=_layer_norm_without_bias,
    interleaved=True,
    logit_scale=_logit_scale,
    refused=("use_qk_norm",),
)

KINDS: dict[str, Kind] = {
    "arcee": replace(LLAMA, up=("up_proj",), gated=False),
    "cohere": COHERE,
    "cohere2": replace(COHERE, windows=windows, turned=_turned_in_windows),
    "ernie4_5": Kind(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", interleaved=True),
    "exaone4": Kind(norms=AFTER, head_norms=HEAD_NORMS, windows=windows, turned=_turned_in_windows),
    "gemma": replace(
        BIASED,
        norm=_rms_less_one,
        embed_scale=lambda config: float(config.hidden_size**0.5),
        refused=("use_bidirectional_attention",),
    ),
    "glm": GLM,
    "glm4": replace(GLM, norms=AROUND),
    "glm4_moe": Kind(
        qkv_bias="attention_bias",
        head_norms=HEAD_NORMS,
        has_head_norms="use_qk_norm",
        rotary=("glm4_moe", "Glm4Moe"),
    ),
    "gpt_oss": replace(BIASED, windows=windows, rotary=("gpt_oss", "GptOss")),
    "granite": GRANITE,
    "granitemoe": replace(GRANITE, mlp_bias=False, refused=("sliding_window",)),
    "helium": Kind(qkv_bias="attention_bias", mlp_bias="mlp_bias", interleaved=True),
    "hunyuan_v1_dense": replace(
        BIASED,
        head_norms=("query_layernorm", "key_layernorm"),
        norms_turned=True,
        rotary=("hunyuan_v1_dense", "HunYuanDenseV1"),
    ),
    "llama": LLAMA,
    "ministral": Kind(windows=windows),
    "ministral3": Kind(windows=_one_window, positions=_up_to_scaling),
    "mistral": Kind(windows=_one_window),
    "mixtral": Kind(windows=_one_window),
    "nemotron": replace(
        LLAMA, norm=_layer_norm_less_one, up=("up_proj",), gated=False, rotary=("nemotron", "Nemotron")
    ),
    "olmo": replace(BIASED, norm=_layer_norm_of_ones, refused=("clip_qkv",)),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, windows=windows, rotary=("olmo3", "Olmo3")),
    "olmoe": replace(QWEN3, refused=("clip_qkv", "sliding_window")),
    "phi": Kind(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        parallel=True,
        norm=_layer_norm,
        final_norm="final_layernorm",
        out="dense",
        head_norms=("q_layernorm", "k_layernorm"),
        has_head_norms="qk_layernorm",
        up=("fc1",),
        down="fc2",
        gated=False,
        head_bias=True,
        rotary=("phi", "Phi"),
    ),
    "phi3": Kind(qkv=("qkv_proj",), up=("gate_up_proj",), windows=_one_window, rotary=("phi3", "Phi3")),
    "qwen2": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen2_moe": Kind(qkv_bias="qkv_bias", windows=windows),
    "qwen2_vl_text": QWEN2,
    "qwen3": replace(QWEN3, windows=windows),
    "qwen3_moe": replace(QWEN3, windows=_one_window),
    "qwen3_vl_text": QWEN3,
    "seed_oss": Kind(qkv_bias="attention_bias", out_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": replace(LLAMA, windows=windows, turned=_turned_as_listed),
    "stablelm": Kind(
        qkv_bias="use_qkv_bias",
        parallel="use_parallel_residual",
        norm=_layer_norm,
        refused=("qk_layernorm",),
        rotary=("stablelm", "StableLm"),
    ),
    "starcoder2": Kind(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm=_layer_norm_epsilon,
        windows=_one_window,
        up=("c_fc",),
        down="c_proj",
        gated=False,
    ),
}
"""By model_type."""

WRAPPED: dict[str, tuple[str, ...]] = {
    "mistral3": ("ministral3", "mistral"),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen3_vl": ("qwen3_vl_text",),
}
"""What model_types the language models of those that also see images may have. On text alone a token has one
position in all three directions that Qwen's rope knows, which makes it a plain one."""
