"""GPT-2: learned positions, LayerNorm, products stored by input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families.parts import Tensors, activation, plain_spec, refuse_set
from rayskip.model.spec import MLP, Attention, Dense, Family, Layer, Spec, Weights

if TYPE_CHECKING:
    from rayskip.model.config import Config


def spec(config: Config) -> Spec:
    refuse_set(config, "add_cross_attention", "scale_attn_by_inverse_layer_idx")
    return plain_spec(config) if config.scale_attn_weights else plain_spec(config, scale=1.0)


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["wte.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings),
        layers=[_layer(config, named, f"h.{index}") for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("ln_f", config.layer_norm_epsilon),
        ropes={},
        positions=named["wpe.weight"],
    )


def _layer(config: Config, named: Tensors, at: str) -> Layer:
    return Layer(
        Attention(
            qkv=_turned(named.dense(f"{at}.attn.c_attn", bias=True)),
            out=_turned(named.dense(f"{at}.attn.c_proj", bias=True)),
            rope=None,
        ),
        named.layer_norm(f"{at}.ln_1", config.layer_norm_epsilon),
        MLP(
            up=_turned(named.dense(f"{at}.mlp.c_fc", bias=True)),
            down=_turned(named.dense(f"{at}.mlp.c_proj", bias=True)),
            activation=activation(config.activation_function),
            gated=False,
        ),
        named.layer_norm(f"{at}.ln_2", config.layer_norm_epsilon),
    )


def _turned(stored: Dense) -> Dense:
    """Of a weight stored as [in, out]."""
    return Dense(stored.weight.T.contiguous(), stored.bias)


FAMILY = Family(spec, weights, prefixes=("transformer.",), rotary=lambda model_type: None)
