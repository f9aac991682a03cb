"""Llama and what shares its shape: SmolLM, Vicuna, Mistral, Qwen2 (biases) and Qwen3 (head norms)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families.parts import (
    FULL,
    Tensors,
    activation,
    head_dim,
    max_positions,
    refuse_set,
    rope,
    windows,
)
from rayskip.model.spec import MLP, Attention, Family, Layer, Spec, Weights, stacked

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule


def spec(config: Config) -> Spec:
    if (
        config.model_type == "llama"
    ):  # in transformers it has neither key, and sees everything whatever they say
        refuse_set(config, "sliding_window")
        if set(getattr(config, "layer_types", None) or [FULL]) != {FULL}:
            refuse_set(config, "layer_types")
    dim = head_dim(config)
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=dim,
        vocab=config.vocab_size,
        max_positions=max_positions(config),
        scale=dim**-0.5,
    )


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["embed_tokens.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings),
        layers=[
            _layer(config, named, index, window)
            for index, window in zip(range(config.num_hidden_layers), _windows(config), strict=True)
        ],
        final_norm=named.rms_norm("norm", config.rms_norm_eps),
        ropes={"default": rope(config, spec)},
    )


def _layer(config: Config, named: Tensors, index: int, window: int | None) -> Layer:
    at, eps = f"layers.{index}", config.rms_norm_eps
    qkv_bias, out_bias, mlp_bias = _biases(config)
    return Layer(
        attention(
            named,
            f"{at}.self_attn",
            qkv_bias,
            out_bias,
            window,
            norm_eps=eps if config.model_type == "qwen3" else None,
        ),
        named.rms_norm(f"{at}.input_layernorm", eps),
        mlp(named, f"{at}.mlp", mlp_bias, config.hidden_act),
        named.rms_norm(f"{at}.post_attention_layernorm", eps),
    )


def attention(
    named: Tensors, at: str, qkv_bias: bool, out_bias: bool, window: int | None, norm_eps: float | None
) -> Attention:
    """norm_eps: of the norms of queries and keys; None where there are none."""
    return Attention(
        qkv=stacked(*(named.dense(f"{at}.{part}_proj", qkv_bias) for part in "qkv")),
        out=named.dense(f"{at}.o_proj", out_bias),
        q_norm=None if norm_eps is None else named.rms_norm(f"{at}.q_norm", norm_eps),
        k_norm=None if norm_eps is None else named.rms_norm(f"{at}.k_norm", norm_eps),
        window=window,
    )


def mlp(named: Tensors, at: str, bias: bool, hidden_act: str) -> MLP:
    return MLP(
        up=stacked(*(named.dense(f"{at}.{part}_proj", bias) for part in ("gate", "up"))),
        down=named.dense(f"{at}.down_proj", bias),
        activation=activation(hidden_act),
        gated=True,
    )


def _biases(config: Config) -> tuple[bool, bool, bool]:
    """Whether query, key and value, the attention's output and the MLP have biases."""
    match config.model_type:
        case "llama":
            return config.attention_bias, config.attention_bias, config.mlp_bias
        case "qwen3":
            return config.attention_bias, config.attention_bias, False
        case "qwen2":
            return True, False, False
        case _:
            return False, False, False


def _windows(config: Config) -> list[int | None]:
    """Positions that each layer sees: Mistral sets one number for all, Qwen one for some."""
    if config.model_type in ("qwen2", "qwen3"):
        return windows(config)
    window = config.sliding_window if config.model_type == "mistral" else None
    return [window] * config.num_hidden_layers


def rotary(model_type: str) -> RotaryModule:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding


FAMILY = Family(spec, weights, prefixes=("model.",), rotary=rotary)
