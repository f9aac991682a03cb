"""What differs between decoder families, as data: the one forward reads it and asks no family anything.

Knows neither checkpoints nor how tokens are batched. Importing this loads no torch.

Shapes: d hidden, Hq query heads, Hkv key-value heads, D head dim, f feed-forward, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayskip.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from rayskip.model.config import Config, RotaryModule


@dataclass(frozen=True)
class ClampedSwiGLU:
    """GPT-OSS's gate: (up + 1) * gate * sigmoid(alpha * gate), after both were clamped to at most `limit`, and up
    to at least -limit. Only of what is gated."""

    alpha: float
    limit: float


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Gate = Activation | ClampedSwiGLU


@dataclass(frozen=True)
class Norm:
    """RMSNorm (bias None, mean not subtracted) or LayerNorm over the last axis."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [d]; for Gemma the stored weight plus one
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Dense:
    """y = x @ weight.T + bias; weight [out, in], bias [out]; of experts one after the other, [E, out, in] and
    [E, out]."""

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

    qkv: query, key and value stacked on the out axis (Hq*D + 2*Hkv*D). q_norm, k_norm: as wide as their weights,
    over each head's D (Qwen3, Gemma 3) or over all heads' together (OLMo 2); they come before the turn by rope, or
    after it (`norms_turned`, Hunyuan). window: it sees the last so many positions, the token's own included; None:
    all. rope: key into Weights.ropes; None where positions are learned (OPT) or not told at all (SmolLM3). sinks
    [Hq], in float32: a score of each head to which no value belongs, beside those of the keys (GPT-OSS).
    """

    qkv: Dense
    out: Dense
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_turned: bool = False
    window: int | None = None
    rope: str | None = "default"
    sinks: Tensor | None = None


@dataclass(frozen=True)
class MLP:
    """A dense feed-forward: down(act(gate) * up), or down(act(up)) where it is not `gated`.

    up: gate and up stacked on the out axis (2f) where it is gated, else up alone (f).
    """

    up: Dense
    down: Dense
    activation: Gate
    gated: bool


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to, and with what weights; all of it in float32.

    Its scores are the softmax, or the sigmoid, of what `dense` [E, d] makes of the token. The `top_k` highest are
    chosen, `correction` [E] in float32 added for the choice alone; of `groups` equal parts of the experts, only
    from the `top_groups` whose two highest sum up to the most. A chosen expert's weight is its score, divided by
    the sum of the chosen ones' where they are `normalised` (a softmax over all is one over these then), times
    `scale`.
    """

    dense: Dense
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    correction: Tensor | None = None
    groups: int = 1
    top_groups: int = 1

    @property
    def count(self) -> int:
        """Experts to choose from."""
        return len(self.dense.weight)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: the weighted sum of what the router's choice of gated MLPs say of a token.

    up [E, 2f, d], down [E, d, f]: as MLP's, of all experts. shared: an MLP that every token runs, added to the sum.
    shared_gate [1, d]: the sigmoid of what it makes of the token multiplies that; None: nothing does.
    """

    router: Router
    up: Dense
    down: Dense
    activation: Gate
    shared: MLP | None = None
    shared_gate: Tensor | None = None

    @property
    def scores(self) -> Dense:
        """The router's product, [E, d], and the shared expert's gate as one output more, where there is one."""
        own = self.router.dense
        if self.shared_gate is None:
            return own
        return stacked(own, Dense(self.shared_gate, None if own.bias is None else own.bias.new_zeros(1)))

    @property
    def each(self) -> list[MLP]:
        """The experts one by one; their tensors are parts of `up` and `down`."""

        def one(dense: Dense, index: int) -> Dense:
            return Dense(dense.weight[index], None if dense.bias is None else dense.bias[index])

        return [
            MLP(one(self.up, index), one(self.down, index), self.activation, gated=True)
            for index in range(self.router.count)
        ]


@dataclass(frozen=True)
class Layer:
    """One decoder layer, by its parts. mlp: None in a layer of attention alone (Kangaroo's adapter).

    attn_norm, mlp_norm: on the input of attention and of the MLP. post_attn_norm, post_mlp_norm: on their output,
    before it is added. A layer may have both (Gemma 2) or the latter alone (OLMo 2). parallel: attention and MLP
    both read the layer's input, through a norm each (GPT-NeoX) or one for both (Cohere).
    """

    attention: Attention
    attn_norm: Norm | None = None
    mlp: MLP | Experts | None = None
    mlp_norm: Norm | None = None
    post_attn_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    parallel: bool = False

    @property
    def size(self) -> int:
        """Weights of its products, those of all experts."""
        return self._weights(of_all=True)

    @property
    def active_size(self) -> int:
        """Weights of the products that one token runs."""
        return self._weights(of_all=False)

    def _weights(self, of_all: bool) -> int:
        products, experts = [self.attention.qkv, self.attention.out], 0
        if isinstance(self.mlp, Experts):
            each = self.mlp.up.weight[0].numel() + self.mlp.down.weight[0].numel()
            experts = each * (self.mlp.router.count if of_all else self.mlp.router.top_k)
            products.append(self.mlp.scores)
        dense = self.mlp.shared if isinstance(self.mlp, Experts) else self.mlp
        if dense is not None:
            products += [dense.up, dense.down]
        return experts + sum(product.weight.numel() for product in products)


@dataclass(frozen=True)
class Spec:
    """A decoder's sizes and switches.

    scale: multiplies q.k. embed_scale: multiplies token embeddings (Gemma: sqrt d). logit_scale: multiplies logits
    (Granite, Cohere). attn_softcap, logit_softcap: x -> c * tanh(x / c) (Gemma 2). attn_sinks: whether layers have
    Attention.sinks. eos_token_ids: generation ends at any of them. hosted: it runs through transformers' modules,
    which do all but attention's sums.
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
    logit_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    attn_sinks: bool = False
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
        """So many first layers have every kind of layer: dense ones may come before the first with experts."""
        return next((at for at, layer in enumerate(self.layers) if isinstance(layer.mlp, Experts)), 0) + 1

    @property
    def windows(self) -> list[int | None]:
        """Positions that each layer sees."""
        return [layer.attention.window for layer in self.layers]

    @property
    def total(self) -> int:
        """Weights of all layers' products."""
        return sum(layer.size for layer in self.layers)

    @property
    def size(self) -> int:
        """Those that a token runs through."""
        return sum(layer.active_size for layer in self.layers)


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
