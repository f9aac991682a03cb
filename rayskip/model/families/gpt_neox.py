"""GPT-NeoX (Pythia): LayerNorm, parallel branches, rotary on part of each head, query-key-value fused per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from rayskip.errors import ModelError
from rayskip.model.families.parts import Tensors, end_tokens, rope
from rayskip.model.spec import Activation, Dense, Family, Layer, Spec, Weights

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}


def spec(config: Any) -> Spec:
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(f"gpt_neox with hidden_act {config.hidden_act!r} is not supported; known: {sorted(ACTIVATIONS)}")
    dim = config.hidden_size // config.num_attention_heads
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=dim,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        activation=ACTIVATIONS[config.hidden_act],
        gated=False,
        scale=dim**-0.5,
        parallel=config.use_parallel_residual,
        eos_token_ids=end_tokens(config),
    )


def weights(config: Any, spec: Spec, tensors: Mapping[str, Tensor]) -> Weights:
    named = Tensors(tensors, "gpt_neox.")
    embed = named["embed_in.weight"]
    return Weights(
        embed=embed,
        head=Dense(embed) if config.tie_word_embeddings else Dense(named["embed_out.weight"]),
        layers=[_layer(config, spec, named, index) for index in range(config.num_hidden_layers)],
        final_norm=named.layer_norm("final_layer_norm", config.layer_norm_eps),
        ropes={"default": rope(GPTNeoXRotaryEmbedding(config), spec.max_positions)},
    )


def _layer(config: Any, spec: Spec, named: Tensors, index: int) -> Layer:
    at, eps = f"layers.{index}", config.layer_norm_eps
    fused = named.dense(f"{at}.attention.query_key_value")
    return Layer(
        qkv=Dense(_by_kind(fused.weight, spec), None if fused.bias is None else _by_kind(fused.bias, spec)),
        out=named.dense(f"{at}.attention.dense"),
        up=named.dense(f"{at}.mlp.dense_h_to_4h"),
        down=named.dense(f"{at}.mlp.dense_4h_to_h"),
        attn_norm=named.layer_norm(f"{at}.input_layernorm", eps),
        mlp_norm=named.layer_norm(f"{at}.post_attention_layernorm", eps),
    )


def _by_kind(fused: Tensor, spec: Spec) -> Tensor:
    """[(head, q|k|v, D), …] as stored -> [(q|k|v, head, D), …]."""
    by_head = fused.view(spec.heads, 3, spec.head_dim, *fused.shape[1:])
    return by_head.transpose(0, 1).reshape(fused.shape)


FAMILY = Family(spec, weights)
