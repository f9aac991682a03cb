"""Gemma 2 and 3: norms around both branches, GELU, windows on most layers.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys and turns windowed layers with another base.
Of a Gemma 3 that also sees images (model_type gemma3) only the language model is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from rayskip.model.families.parts import Tensors, activation, head_dim, rope
from rayskip.model.spec import Family, Layer, Norm, Rope, Spec, Weights, stacked


def spec(config: Any) -> Spec:
    config = config.get_text_config()
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        activation=activation(config.hidden_activation),
        gated=True,
        scale=config.query_pre_attn_scalar**-0.5,
        embed_scale=config.hidden_size**0.5,
        attn_softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
    )


def weights(config: Any, spec: Spec, tensors: Mapping[str, Tensor]) -> Weights:
    config = config.get_text_config()
    named = Tensors(tensors, "model.language_model.", "language_model.model.", "model.")
    embed = named["embed_tokens.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config),
        layers=[_layer(config, named, index) for index in range(config.num_hidden_layers)],
        final_norm=named.rms_norm("norm", config.rms_norm_eps, offset=1.0),
        ropes=_ropes(config),
    )


def _ropes(config: Any) -> dict[str, Rope]:
    if config.model_type == "gemma2":
        table = rope(config, Gemma2RotaryEmbedding(config))
        return dict.fromkeys(set(config.layer_types), table)
    rotary = Gemma3RotaryEmbedding(config)
    return {kind: rope(config, rotary, kind) for kind in set(config.layer_types)}


def _layer(config: Any, named: Tensors, index: int) -> Layer:
    at = f"layers.{index}"
    attention, mlp = f"{at}.self_attn", f"{at}.mlp"
    has_head_norms = f"{attention}.q_norm.weight" in named
    kind = config.layer_types[index]

    def norm(name: str) -> Norm:
        return named.rms_norm(name, config.rms_norm_eps, offset=1.0)

    return Layer(
        qkv=stacked(*(named.dense(f"{attention}.{part}_proj") for part in "qkv")),
        out=named.dense(f"{attention}.o_proj"),
        up=stacked(named.dense(f"{mlp}.gate_proj"), named.dense(f"{mlp}.up_proj")),
        down=named.dense(f"{mlp}.down_proj"),
        attn_norm=norm(f"{at}.input_layernorm"),
        post_attn_norm=norm(f"{at}.post_attention_layernorm"),
        mlp_norm=norm(f"{at}.pre_feedforward_layernorm"),
        post_mlp_norm=norm(f"{at}.post_feedforward_layernorm"),
        q_norm=norm(f"{attention}.q_norm") if has_head_norms else None,
        k_norm=norm(f"{attention}.k_norm") if has_head_norms else None,
        window=config.sliding_window if kind == "sliding_attention" else None,
        rope=kind,
    )


FAMILY = Family(spec, weights)
