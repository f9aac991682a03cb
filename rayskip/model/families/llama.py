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
    attention, mlp = f"{at}.self_attn", f"{at}.mlp"
    has_head_norms = config.model_type == "qwen3"
    qkv_bias, out_bias, mlp_bias = _biases(config)
    return Layer(
        Attention(
            qkv=stacked(*(named.dense(f"{attention}.{part}_proj", qkv_bias) for part in "qkv")),
            out=named.dense(f"{attention}.o_proj", out_bias),
            q_norm=named.rms_norm(f"{attention}.q_norm", eps) if has_head_norms else None,
            k_norm=named.rms_norm(f"{attention}.k_norm", eps) if has_head_norms else None,
            window=window,
        ),
        named.rms_norm(f"{at}.input_layernorm", eps),
        MLP(
            up=stacked(*(named.dense(f"{mlp}.{part}_proj", mlp_bias) for part in ("gate", "up"))),
            down=named.dense(f"{mlp}.down_proj", mlp_bias),
            activation=activation(config.hidden_act),
            gated=True,
        ),
        named.rms_norm(f"{at}.post_attention_layernorm", eps),
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
