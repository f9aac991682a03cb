"""Llama and what shares its shape: attention and an MLP in every layer, and norms around them. What each model_type
has of its own stands in kinds.py. Of a model that also sees images only the language model is read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rayskip.errors import ModelError, shown
from rayskip.model.families.kinds import KINDS, WRAPPED
from rayskip.model.families.parts import (
    FULL,
    Tensors,
    activation,
    head_dim,
    in_halves,
    refuse_set,
    rope_tables,
    scaled,
)
from rayskip.model.spec import MLP, Attention, Dense, Experts, Family, Layer, Norm, Spec, Weights, stacked

if TYPE_CHECKING:
    from rayskip.model.config import Config, RotaryModule


def spec(config: Config) -> Spec:
    known = WRAPPED.get(config.model_type, (config.model_type,))
    config = config.get_text_config()
    if config.model_type not in known:
        raise ModelError(
            f"config.json: text_config has model_type {shown(config.model_type)}; known: {', '.join(known)}"
        )
    kind = KINDS[config.model_type]
    refuse_set(config, *kind.refused)
    if config.model_type == "llama":  # transformers' has neither key, and sees everything whatever they say
        refuse_set(config, "sliding_window")
        if set(getattr(config, "layer_types", None) or [FULL]) != {FULL}:
            refuse_set(config, "layer_types")
    dim = head_dim(config)
    return Spec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=dim,
        vocab=config.vocab_size,
        max_positions=kind.positions(config),
        scale=kind.scale(config) if kind.scale else dim**-0.5,
        embed_scale=kind.embed_scale(config) if kind.embed_scale else 1.0,
        logit_scale=kind.logit_scale(config) if kind.logit_scale else 1.0,
    )


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    return read(config, spec, named, Layers)


def read(config: Config, spec: Spec, named: Tensors, layers: type[Layers]) -> Weights:
    """layers: what reads them."""
    tied = (
        config.tie_word_embeddings
    )  # of a model that also sees images, its own word and not its text model's
    config = config.get_text_config()
    kind = KINDS[config.model_type]
    embed = named["embed_tokens.weight"]
    ropes = rope_tables(config, spec)
    reader = layers(config, spec, named, next(iter(ropes.values())).cos.shape[1])
    windows, turned = kind.windows(config), kind.turned(config)
    types = config.layer_types if "default" not in ropes else ["default"] * len(windows)
    return Weights(
        embed=embed,
        head=named.head(embed, tied, bias=kind.head_bias),
        layers=[
            reader.layer(index, window, rope if has_rope else None)
            for index, (window, rope, has_rope) in enumerate(zip(windows, types, turned, strict=True))
        ],
        final_norm=kind.norm(named, config, kind.final_norm),
        ropes=ropes,
    )


class Layers:
    """Reads a model's layers."""

    def __init__(self, config: Config, spec: Spec, named: Tensors, turned: int) -> None:
        """turned: dims of a head that rope turns."""
        self.config, self.named, self._spec, self._turned = config, named, spec, turned
        self._kind = KINDS[config.model_type]
        self._residual = self._kind.residual(config) if self._kind.residual else 1.0

    def layer(self, index: int, window: int | None, rope: str | None) -> Layer:
        at, kind, parallel = f"layers.{index}", self._kind, self._says(self._kind.parallel)
        names = kind.norms[:2] if parallel else kind.norms
        norms = [
            None if name is None else kind.norm(self.named, self.config, f"{at}.{name}") for name in names
        ]
        attn_norm, post_attn_norm, mlp_norm, post_mlp_norm = [*norms, norms[0], None] if parallel else norms
        return Layer(
            self.attention(index, window, rope),
            attn_norm,
            self.mlp(index),
            mlp_norm,
            post_attn_norm,
            post_mlp_norm,
            parallel,
        )

    def attention(self, index: int, window: int | None, rope: str | None) -> Attention:
        at = f"layers.{index}.self_attn"
        kind, bias = self._kind, self._says(self._kind.qkv_bias)
        q_norm, k_norm = self._head_norms(at)
        qkv = stacked(*(self.named.dense(f"{at}.{name}", bias) for name in kind.qkv))
        return Attention(
            in_halves(qkv, self._spec, self._turned) if kind.interleaved else qkv,
            self._added(f"{at}.{kind.out}", kind.out_bias),
            q_norm,
            k_norm,
            kind.norms_turned,
            window,
            rope,
        )

    def _head_norms(self, at: str) -> tuple[Norm | None, Norm | None]:
        kind = self._kind
        if kind.head_norms is None or not self._says(kind.has_head_norms):
            return None, None
        queries, keys = kind.head_norms
        return (
            kind.norm(self.named, self.config, f"{at}.{queries}"),
            kind.norm(self.named, self.config, f"{at}.{keys}"),
        )

    def mlp(self, index: int) -> MLP | Experts:
        return self.dense_mlp(f"layers.{index}.mlp")

    def dense_mlp(self, at: str) -> MLP:
        kind, bias = self._kind, self._says(self._kind.mlp_bias)
        return MLP(
            up=stacked(*(self.named.dense(f"{at}.{name}", bias) for name in kind.up)),
            down=self._added(f"{at}.{kind.down}", kind.mlp_bias),
            activation=activation(self.config.hidden_act),
            gated=kind.gated,
        )

    def _added(self, name: str, bias: bool | str) -> Dense:
        """A product whose result is added to the states: what multiplies that (Granite) is folded into the weights,
        which rounds them once more where they are not float32."""
        return scaled(self.named.dense(name, self._says(bias)), self._residual)

    def _says(self, answer: bool | str) -> bool:
        """A Kind's answer, or the config's by its key."""
        return bool(getattr(self.config, answer)) if isinstance(answer, str) else answer


def rotary(model_type: str) -> RotaryModule:
    folder, name = KINDS[model_type].rotary
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    found: RotaryModule = getattr(module, f"{name}RotaryEmbedding")
    return found


FAMILY = Family(
    spec,
    weights,
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
    rotary=rotary,
)
