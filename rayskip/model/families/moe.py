"""Llama's attention with a mixture of experts: Mixtral, Qwen 2 and 3, OLMoE, Granite and GLM 4.

Some have dense layers in between, or experts that every token runs (Qwen 2, GLM 4). Their attention stands in
kinds.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.model.families import llama
from rayskip.model.families.parts import Tensors, activation, router
from rayskip.model.spec import MLP, Dense, Experts, Family, Router, Spec, Weights

if TYPE_CHECKING:
    from rayskip.model.config import Config

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of the number of experts; a config has one of them."""


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    if getattr(config, "num_nextn_predict_layers", None):  # a layer that drafts tokens, in GLM 4
        named.leave_out(f"layers.{config.num_hidden_layers}.")
    return llama.read(config, spec, named, _Layers)


class _Layers(llama.Layers):
    def mlp(self, index: int) -> MLP | Experts:
        if not _has_experts(self.config, index):
            return super().mlp(index)
        return _experts(self, f"layers.{index}")


def _has_experts(config: Config, index: int) -> bool:
    match config.model_type:
        case "qwen2_moe" | "qwen3_moe":
            sparse = (index + 1) % config.decoder_sparse_step == 0
            return _count(config) > 0 and sparse and index not in config.mlp_only_layers
        case "glm4_moe":
            return bool(index >= config.first_k_dense_replace)
        case _:
            return True


def _experts(layers: _Layers, layer: str) -> Experts:
    config, named = layers.config, layers.named
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
        shared = layers.dense_mlp(f"{at}.shared_expert")
        shared_gate = named[f"{at}.shared_expert_gate.weight"]
    elif config.model_type == "glm4_moe":
        shared = layers.dense_mlp(f"{at}.shared_experts")
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


FAMILY = Family(llama.spec, weights, prefixes=("model.",), rotary=llama.rotary)
