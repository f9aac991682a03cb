"""GPT-NeoX (Pythia): LayerNorm, parallel branches, partial rotary, query-key-value fused per head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families.parts import Tensors, activation, by_kind, max_positions, plain_spec, rope
from rayskip.model.spec import MLP, Attention, Family, Layer, Spec, Weights

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule


def spec(config: Config) -> Spec:
    return plain_spec(config, max_positions=max_positions(config))


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["embed_in.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings, "embed_out"),
        layers=[_layer(config, spec, named, index) for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("final_layer_norm", config.layer_norm_eps),
        ropes={"default": rope(config, spec)},
    )


def _layer(config: Config, spec: Spec, named: Tensors, index: int) -> Layer:
    at, eps = f"layers.{index}", config.layer_norm_eps
    bias = config.attention_bias
    return Layer(
        Attention(
            qkv=by_kind(named.dense(f"{at}.attention.query_key_value", bias), spec),
            out=named.dense(f"{at}.attention.dense", bias),
        ),
        named.layer_norm(f"{at}.input_layernorm", eps),
        MLP(
            up=named.dense(f"{at}.mlp.dense_h_to_4h", bias=True),
            down=named.dense(f"{at}.mlp.dense_4h_to_h", bias=True),
            activation=activation(config.hidden_act),
            gated=False,
        ),
        named.layer_norm(f"{at}.post_attention_layernorm", eps),
        parallel=config.use_parallel_residual,
    )


def rotary(model_type: str) -> RotaryModule:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    return GPTNeoXRotaryEmbedding


FAMILY = Family(spec, weights, prefixes=("gpt_neox.",), rotary=rotary)
