"""OPT: learned positions, LayerNorm, ReLU, biases everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.errors import ModelError
from rayskip.model.families.parts import Tensors, activation, plain_spec
from rayskip.model.spec import MLP, Attention, Family, Layer, Spec, Weights, stacked

if TYPE_CHECKING:
    from rayskip.model.config import Config

POSITION_OFFSET = 2
"""Rows at the head of the position table that stand for padding."""

EPS = 1e-5


def spec(config: Config) -> Spec:
    if config.word_embed_proj_dim != config.hidden_size:
        raise ModelError("opt with projected embeddings (word_embed_proj_dim, as opt-350m) is not supported")
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise ModelError("opt with norms after the branches or without a final norm is not supported")
    if not config.layer_norm_elementwise_affine:
        raise ModelError("opt without weights in its norms (layer_norm_elementwise_affine) is not supported")
    return plain_spec(config)


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["embed_tokens.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings),
        layers=[_layer(config, named, index) for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("final_layer_norm", EPS),
        ropes={},
        positions=named["embed_positions.weight"][POSITION_OFFSET:],
    )


def _layer(config: Config, named: Tensors, index: int) -> Layer:
    at, bias = f"layers.{index}", config.enable_bias
    return Layer(
        Attention(
            qkv=stacked(*(named.dense(f"{at}.self_attn.{part}_proj", bias) for part in "qkv")),
            out=named.dense(f"{at}.self_attn.out_proj", bias),
            rope=None,
        ),
        named.layer_norm(f"{at}.self_attn_layer_norm", EPS),
        MLP(
            up=named.dense(f"{at}.fc1", bias),
            down=named.dense(f"{at}.fc2", bias),
            activation=activation(config.activation_function),
            gated=False,
        ),
        named.layer_norm(f"{at}.final_layer_norm", EPS),
    )


FAMILY = Family(spec, weights, prefixes=("model.decoder.", "decoder."), rotary=lambda model_type: None)
