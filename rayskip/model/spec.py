"""What differs between decoder families, as data: the one forward reads it and asks no family anything.

Knows neither checkpoints nor how tokens are batched. Importing this loads no torch.

Shapes: d hidden, Hq query heads, Hkv key-value heads, D head dim, f feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayskip.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from rayskip.model.config import Config, RotaryModule

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm (bias None, mean not subtracted) or LayerNorm over the last axis."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [d]; for Gemma the stored weight plus one
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Dense:
    """y = x @ weight.T + bias; weight [out, in]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding table of one layer kind: cos, sin [max positions, rotary dims] in float32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Attention:
    """Causal attention of one layer.

    qkv: query, key and value stacked on the out axis (Hq*D + 2*Hkv*D). q_norm, k_norm: per head, over D (Qwen3,
    Gemma 3). window: it sees the last so many positions, the token's own included; None: all. rope: key into
    Weights.ropes; None where positions are learned (OPT).
    """

    qkv: Dense
    out: Dense
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    rope: str | None = "default"


@dataclass(frozen=True)
class MLP:
    """A dense feed-forward: down(act(gate) * up), or down(act(up)) where it is not `gated`.

    up: gate and up stacked on the out axis (2f) where it is gated, else up alone (f).
    """

    up: Dense
    down: Dense
    activation: Activation
    gated: bool


@dataclass(frozen=True)
class Layer:
    """One decoder layer, by its parts. mlp, mlp_norm: None in a layer of attention alone (Kangaroo's adapter).

    attn_norm, mlp_norm: on the input of attention and of the MLP. post_attn_norm, post_mlp_norm: on their output,
    before it is added (Gemma). parallel: attention and MLP both read the layer's input (GPT-NeoX).
    """

    attention: Attention
    attn_norm: Norm
    mlp: MLP | None = None
    mlp_norm: Norm | None = None
    post_attn_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    parallel: bool = False

    @property
    def products(self) -> list[Dense]:
        """In the order in which they run."""
        mlp = [] if self.mlp is None else [self.mlp.up, self.mlp.down]
        return [self.attention.qkv, self.attention.out, *mlp]

    @property
    def size(self) -> int:
        """Weights of its products."""
        return sum(dense.weight.numel() for dense in self.products)


@dataclass(frozen=True)
class Spec:
    """A decoder's sizes and switches.

    scale: multiplies q.k. embed_scale: multiplies token embeddings (Gemma: sqrt d).
    attn_softcap, logit_softcap: x -> c * tanh(x / c) (Gemma 2).
    eos_token_ids: generation ends at any of them. hosted: it runs through transformers' modules, which do all but
    attention's sums.
    """

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    scale: float
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    hosted: bool = False

    @property
    def road(self) -> str:
        """What it is, and what runs it."""
        return f"{self.model_type}, through transformers" if self.hosted else self.model_type


@dataclass(frozen=True)
class Weights:
    """All tensors of a decoder, on one device.

    embed, head: [V, d]; the same tensor where they are tied. positions: learned position table
    [max positions, d], offset already removed, or None.
    """

    embed: Tensor
    head: Dense
    layers: list[Layer]
    final_norm: Norm
    ropes: dict[str, Rope]
    positions: Tensor | None = None

    @property
    def varied(self) -> int:
        """So many first layers have every kind of layer."""
        return 1

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees."""
        return [layer.attention.window for layer in self.layers]

    @property
    def size(self) -> int:
        """Weights of all layers' products."""
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True)
class Family:
    """One model_type: how its config becomes a Spec and its checkpoint Weights.

    spec(config): needs no torch.
    weights(config, spec, tensors): tensors, a `families.parts.Tensors`, maps names without their prefix to
    tensors in the compute dtype and on the device; each is read when it is asked for.
    prefixes: what such names begin with in a checkpoint; the first that fits is dropped.
    rotary(model_type): transformers' rotary module, imported when asked for; None where positions are learned.
    """

    spec: Callable[[Config], Spec]
    weights: Callable[[Config, Spec, Any], Weights]
    prefixes: tuple[str, ...]
    rotary: Callable[[str], RotaryModule | None]


def stacked(*parts: Dense) -> Dense:
    """Several products over the same input as one; biases must be all there or all missing."""
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, len(parts)):
        raise ModelError(f"the checkpoint has a bias for {len(biases)} of {len(parts)} products of one input")
    import torch

    return Dense(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)
