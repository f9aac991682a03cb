"""GPT-J: one LayerNorm for both branches, which are parallel, partial rotary by neighbours, a bias on logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.errors import ModelError, shown
from rayskip.model.families.parts import Tensors, activation, head_dim, in_halves, plain_spec, rope_table
from rayskip.model.spec import MLP, Attention, Family, Layer, Spec, Weights, stacked

if TYPE_CHECKING:
    from rayskip.model.config import Config

BASE = 10000


def spec(config: Config) -> Spec:
    dim, turned = head_dim(config), config.rotary_dim
    if type(turned) is not int or not 0 < turned <= dim or turned % 2:
        raise ModelError(
            f"config.json: rotary_dim is {shown(turned)}; an even number up to a head's {dim} dimensions is wanted"
        )
    return plain_spec(config)


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed, turned = named["wte.weight"], config.rotary_dim
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings, bias=True),
        layers=[_layer(config, spec, named, f"h.{index}") for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("ln_f", config.layer_norm_epsilon),
        ropes={
            "default": rope_table([BASE ** (-at / turned) for at in range(0, turned, 2)], spec.max_positions)
        },
    )


def _layer(config: Config, spec: Spec, named: Tensors, at: str) -> Layer:
    norm = named.layer_norm(f"{at}.ln_1", config.layer_norm_epsilon)
    qkv = stacked(*(named.dense(f"{at}.attn.{part}_proj", bias=False) for part in "qkv"))
    return Layer(
        Attention(
            qkv=in_halves(qkv, spec, config.rotary_dim), out=named.dense(f"{at}.attn.out_proj", bias=False)
        ),
        norm,
        MLP(
            up=named.dense(f"{at}.mlp.fc_in", bias=True),
            down=named.dense(f"{at}.mlp.fc_out", bias=True),
            activation=activation(config.activation_function),
            gated=False,
        ),
        norm,
        parallel=True,
    )


FAMILY = Family(spec, weights, prefixes=("transformer.",), rotary=lambda model_type: None)
