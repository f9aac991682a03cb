"""Llama's attention with a mixture of experts: Mixtral, Qwen 2 and 3, OLMoE, Granite and GLM 4.

Some have dense layers in between, experts that every token runs (Qwen 2, GLM 4), or multipliers (Granite), which
go into the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rayskip.model.families import llama
from rayskip.model.families.parts import Tensors, activation, refuse_set, rope, router, windows
from rayskip.model.spec import Dense, Experts, Family, Layer, Norm, Router, Spec, Weights

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of the number of experts; a config has one of them."""


def spec(config: Config) -> Spec:
    made = llama.spec(config)
    match config.model_type:
        case "olmoe":
            refuse_set(config, "clip_qkv", "sliding_window")
        case "granitemoe":
            refuse_set(config, "sliding_window")
            made = replace(
                made, scale=config.attention_multiplier, embed_scale=float(config.embedding_multiplier)
            )
    return made


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    embed = named["embed_tokens.weight"]
    if getattr(config, "num_nextn_predict_layers", None):  # a layer that drafts tokens, in GLM 4
        named.leave_out(f"layers.{config.num_hidden_layers}.")
    return Weights(
        embed=embed,
        head=named.head(embed, config.tie_word_embeddings),
        layers=[_layer(config, named, index, window) for index, window in enumerate(_windows(config))],
        final_norm=_final_norm(config, named),
        ropes={"default": rope(config, spec)},
    )


def _layer(config: Config, named: Tensors, index: int, window: int | None) -> Layer:
    at, eps = f"layers.{index}", config.rms_norm_eps
    qkv_bias, out_bias = _biases(config)
    has_norms = config.model_type in ("qwen3_moe", "olmoe") or getattr(config, "use_qk_norm", False)
    attention = llama.attention(
        named, f"{at}.self_attn", qkv_bias, out_bias, window, norm_eps=eps if has_norms else None
    )
    mlp = (
        _experts(config, named, at)
        if _has_experts(config, index)
        else llama.mlp(named, f"{at}.mlp", bias=False, hidden_act=config.hidden_act)
    )
    return Layer(
        replace(attention, out=_scaled(attention.out, getattr(config, "residual_multiplier", 1.0))),
        named.rms_norm(f"{at}.input_layernorm", eps),
        mlp,
        named.rms_norm(f"{at}.post_attention_layernorm", eps),
    )


def _has_experts(config: Config, index: int) -> bool:
    match config.model_type:
        case "qwen2_moe" | "qwen3_moe":
            sparse = (index + 1) % config.decoder_sparse_step == 0
            return _count(config) > 0 and sparse and index not in config.mlp_only_layers
        case "glm4_moe":
            return bool(index >= config.first_k_dense_replace)
        case _:
            return True


def _experts(config: Config, named: Tensors, layer: str) -> Experts:
    act = activation(config.hidden_act)
    match config.model_type:
        case "granitemoe":
            at = f"{layer}.block_sparse_moe"
            own = router(
                config, named.dense(f"{at}.router.layer", bias=False), scale=config.residual_multiplier
            )
            up, down = (Dense(named[f"{at}.{part}_linear.weight"]) for part in ("input", "output"))
            return Experts(own, up, down, act)
        case "mixtral" if f"{layer}.mlp.gate.weight" not in named:
            at = f"{layer}.block_sparse_moe"
            own = router(config, named.dense(f"{at}.gate", bias=False))
            return Experts(own, *_products(named, at, _count(config), ("w1", "w3", "w2")), act)
    at = f"{layer}.mlp"
    products = _products(named, at, _count(config), ("gate_proj", "up_proj", "down_proj"))
    shared, shared_gate = None, None
    if config.model_type == "qwen2_moe":
        shared = llama.mlp(named, f"{at}.shared_expert", bias=False, hidden_act=config.hidden_act)
        shared_gate = named[f"{at}.shared_expert_gate.weight"]
    elif config.model_type == "glm4_moe":
        shared = llama.mlp(named, f"{at}.shared_experts", bias=False, hidden_act=config.hidden_act)
    return Experts(_router(config, named, f"{at}.gate"), *products, act, shared, shared_gate)


def _router(config: Config, named: Tensors, at: str) -> Router:
    dense = named.dense(at, bias=False)
    if config.model_type != "glm4_moe":
        return router(config, dense, normalised=getattr(config, "norm_topk_prob", True))
    return router(
        config,
        dense,
        scores="sigmoid",
        normalised=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        correction=named.as_stored(f"{at}.e_score_correction_bias").float(),
        groups=config.n_group,
        top_groups=config.topk_group,
    )


def _products(named: Tensors, at: str, count: int, parts: tuple[str, str, str]) -> tuple[Dense, Dense]:
    """(up, down) of `count` experts: each has a gate's, an up and a down product of its own in the checkpoint, or
    all share two tensors, as in transformers' memory."""
    import torch

    if f"{at}.experts.gate_up_proj" in named:
        return Dense(named[f"{at}.experts.gate_up_proj"]), Dense(named[f"{at}.experts.down_proj"])

    def one(index: int, part: str) -> torch.Tensor:
        return named[f"{at}.experts.{index}.{part}.weight"]

    gate, up, down = parts
    ups = [torch.cat([one(index, gate), one(index, up)]) for index in range(count)]
    return Dense(torch.stack(ups)), Dense(torch.stack([one(index, down) for index in range(count)]))


def _count(config: Config) -> int:
    return int(next(found for key in COUNTS if (found := getattr(config, key, None)) is not None))


def _biases(config: Config) -> tuple[bool, bool]:
    """Whether query, key and value, and the attention's output, have biases."""
    match config.model_type:
        case "qwen2_moe":
            return config.qkv_bias, False
        case "glm4_moe":
            return config.attention_bias, False
        case "mixtral":
            return False, False
        case _:
            return config.attention_bias, config.attention_bias


def _windows(config: Config) -> list[int | None]:
    if config.model_type == "qwen2_moe":
        return windows(config)
    window = config.sliding_window if config.model_type in ("mixtral", "qwen3_moe") else None
    return [window] * config.num_hidden_layers


def _final_norm(config: Config, named: Tensors) -> Norm:
    norm = named.rms_norm("norm", config.rms_norm_eps)
    divisor = getattr(config, "logits_scaling", 1.0)
    return norm if divisor == 1 else replace(norm, weight=norm.weight.float() / divisor)


def _scaled(dense: Dense, factor: float) -> Dense:
    if factor == 1:
        return dense
    return Dense(dense.weight * factor, None if dense.bias is None else dense.bias * factor)


def rotary(model_type: str) -> RotaryModule:
    if model_type == "glm4_moe":
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

        return Glm4MoeRotaryEmbedding
    return llama.rotary(model_type)


FAMILY = Family(spec, weights, prefixes=("model.",), rotary=rotary)
