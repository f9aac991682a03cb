"""Gemma 2 and 3: norms around both branches, GELU, windows on most layers.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys and turns windowed layers with another base.
Of a Gemma 3 that also sees images (model_type gemma3) only the language model is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families.parts import (
    Tensors,
    activation,
    head_dim,
    max_positions,
    refuse_set,
    rope,
    windows,
)
from rayskip.model.spec import MLP, Attention, Family, Layer, Norm, Rope, Spec, Weights, stacked

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule


def spec(config: Config) -> Spec:
    if config.model_type == "gemma3":  # transformers caps no logits of a model that also sees images
        refuse_set(config.get_text_config(), "final_logit_softcapping")
    config = config.get_text_config()
    refuse_set(config, "use_bidirectional_attention")
    if config.model_type != "gemma2":  # a Gemma 3 in transformers has the key and does nothing by it
        refuse_set(config, "attn_logit_softcapping")
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab=config.vocab_size,
        max_positions=max_positions(config),
        scale=config.query_pre_attn_scalar**-0.5,
        embed_scale=config.hidden_size**0.5,
        attn_softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
    )


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    tied = (
        config.tie_word_embeddings
    )  # of a model that also sees images, its own word and not its text model's
    config = config.get_text_config()
    embed = named["embed_tokens.weight"]
    return Weights(
        embed=embed,
        head=named.head(embed, tied),
        layers=[_layer(config, named, index, window) for index, window in enumerate(windows(config))],
        final_norm=named.rms_norm("norm", config.rms_norm_eps, offset=1.0),
        ropes=_ropes(config, spec),
    )


def _ropes(config: Config, spec: Spec) -> dict[str, Rope]:
    if config.model_type == "gemma2":
        table = rope(config, spec)
        return dict.fromkeys(set(config.layer_types), table)
    return {kind: rope(config, spec, kind) for kind in set(config.layer_types)}


def _layer(config: Config, named: Tensors, index: int, window: int | None) -> Layer:
    at = f"layers.{index}"
    attention, mlp = f"{at}.self_attn", f"{at}.mlp"
    has_head_norms, bias = config.model_type != "gemma2", config.attention_bias

    def norm(name: str) -> Norm:
        return named.rms_norm(name, config.rms_norm_eps, offset=1.0)

    return Layer(
        Attention(
            qkv=stacked(*(named.dense(f"{attention}.{part}_proj", bias) for part in "qkv")),
            out=named.dense(f"{attention}.o_proj", bias),
            q_norm=norm(f"{attention}.q_norm") if has_head_norms else None,
            k_norm=norm(f"{attention}.k_norm") if has_head_norms else None,
            window=window,
            rope=config.layer_types[index],
        ),
        norm(f"{at}.input_layernorm"),
        MLP(
            up=stacked(*(named.dense(f"{mlp}.{part}_proj", bias=False) for part in ("gate", "up"))),
            down=named.dense(f"{mlp}.down_proj", bias=False),
            activation=activation(config.hidden_activation),
            gated=True,
        ),
        norm(f"{at}.pre_feedforward_layernorm"),
        post_attn_norm=norm(f"{at}.post_attention_layernorm"),
        post_mlp_norm=norm(f"{at}.post_feedforward_layernorm"),
    )


def rotary(model_type: str) -> RotaryModule:
    if model_type == "gemma2":
        from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

        return Gemma2RotaryEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    return Gemma3RotaryEmbedding


FAMILY = Family(
    spec,
    weights,
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
    rotary=rotary,
)
