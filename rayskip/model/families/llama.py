"""Llama and what shares its shape: SmolLM, Vicuna, Mistral, Qwen2 (biases) and Qwen3 (head norms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rayskip.model.families.parts import Tensors, activation, head_dim, rope
from rayskip.model.spec import Family, Layer, Spec, Weights, stacked


def spec(config: Any) -> Spec:
    dim = head_dim(config)
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=dim,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        activation=activation(config.hidden_act),
        gated=True,
        scale=dim**-0.5,
    )


def weights(config: Any, spec: Spec, tensors: Mapping[str, Tensor]) -> Weights:
    named = Tensors(tensors, "model.")
    embed = named["embed_tokens.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config),
        layers=[_layer(config, named, index) for index in range(config.num_hidden_layers)],
        final_norm=named.rms_norm("norm", config.rms_norm_eps),
        ropes={"default": rope(config, LlamaRotaryEmbedding(config))},
    )


def _layer(config: Any, named: Tensors, index: int) -> Layer:
    at, eps = f"layers.{index}", config.rms_norm_eps
    attention, mlp = f"{at}.self_attn", f"{at}.mlp"
    has_head_norms = f"{attention}.q_norm.weight" in named
    return Layer(
        qkv=stacked(*(named.dense(f"{attention}.{part}_proj") for part in "qkv")),
        out=named.dense(f"{attention}.o_proj"),
        up=stacked(named.dense(f"{mlp}.gate_proj"), named.dense(f"{mlp}.up_proj")),
        down=named.dense(f"{mlp}.down_proj"),
        attn_norm=named.rms_norm(f"{at}.input_layernorm", eps),
        mlp_norm=named.rms_norm(f"{at}.post_attention_layernorm", eps),
        q_norm=named.rms_norm(f"{attention}.q_norm", eps) if has_head_norms else None,
        k_norm=named.rms_norm(f"{attention}.k_norm", eps) if has_head_norms else None,
        window=_window(config, index),
    )


def _window(config: Any, index: int) -> int | None:
    """Positions a layer sees: Mistral sets one for all, Qwen one for some."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


FAMILY = Family(spec, weights)
