"""Falcon: LayerNorm, query-key-value fused by groups of heads, branches parallel or not, with one norm or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families.parts import (
    Tensors,
    activation,
    by_kind,
    max_positions,
    plain_spec,
    refuse_set,
    rope_tables,
)
from rayskip.model.spec import MLP, Attention, Family, Layer, Norm, Spec, Weights

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule


def spec(config: Config) -> Spec:
    refuse_set(config, "alibi")
    one = config.multi_query and not config.new_decoder_architecture
    kv_heads = 1 if one else config.num_kv_heads
    return plain_spec(config, kv_heads=kv_heads, max_positions=max_positions(config))


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["word_embeddings.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings),
        layers=[_layer(config, spec, named, f"h.{index}") for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("ln_f", config.layer_norm_epsilon),
        ropes=rope_tables(config, spec),
    )


def _layer(config: Config, spec: Spec, named: Tensors, at: str) -> Layer:
    attn_norm, mlp_norm = _norms(config, named, at)
    return Layer(
        Attention(
            qkv=by_kind(named.dense(f"{at}.self_attention.query_key_value", config.bias), spec),
            out=named.dense(f"{at}.self_attention.dense", config.bias),
        ),
        attn_norm,
        MLP(
            up=named.dense(f"{at}.mlp.dense_h_to_4h", config.bias),
            down=named.dense(f"{at}.mlp.dense_4h_to_h", config.bias),
            activation=activation(config.activation),
            gated=False,
        ),
        mlp_norm,
        parallel=config.new_decoder_architecture or config.parallel_attn,
    )


def _norms(config: Config, named: Tensors, at: str) -> tuple[Norm, Norm]:
    """Before attention, and before the MLP."""
    eps, new = config.layer_norm_epsilon, config.new_decoder_architecture
    if new and config.num_ln_in_parallel_attn in (None, 2):
        return named.layer_norm(f"{at}.ln_attn", eps), named.layer_norm(f"{at}.ln_mlp", eps)
    first = named.layer_norm(f"{at}.input_layernorm", eps)
    if new or config.parallel_attn:
        return first, first
    return first, named.layer_norm(f"{at}.post_attention_layernorm", eps)


def rotary(model_type: str) -> RotaryModule:
    from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

    return FalconRotaryEmbedding


FAMILY = Family(spec, weights, prefixes=("transformer.",), rotary=rotary)
