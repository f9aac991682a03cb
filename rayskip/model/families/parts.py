"""What several families share when reading a config and a checkpoint: names, norms, rotary tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError, shown
from rayskip.model.files import short_name
from rayskip.model.refusals import MOST_POSITIONS
from rayskip.model.spec import Activation, Dense, Norm, Rope, Router, Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rayskip.model.config import Config

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

BUFFERS = (
    "rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias",
)  # fmt: skip
"""Ends of names of what older checkpoints hold though it follows from the config."""

LIST = re.compile(r"\w+\.(?=\d+\.)")
"""How names of layers' tensors begin."""

FULL, SLIDING = "full_attention", "sliding_attention"


class Tensors:
    """A checkpoint's tensors, in `dtype`, under their short names: the first of `prefixes` that fits is dropped, so
    that a base model's checkpoint and a causal LM's read alike. A missing name is a ModelError."""

    def __init__(self, stored: Mapping[str, Tensor], prefixes: tuple[str, ...], dtype: torch.dtype) -> None:
        self._stored, self.dtype = stored, dtype
        self._names: dict[str, str] = {}
        self._read: set[str] = set()
        for name in stored:
            if (other := self._names.setdefault(short_name(name, prefixes), name)) != name:
                raise ModelError(f"the checkpoint has one tensor under two names, {other} and {name}")

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.as_stored(name)
        if not tensor.is_floating_point():
            raise ModelError(f"{name} has the type {tensor.dtype}, which is no weight's")
        return tensor.to(self.dtype)

    def as_stored(self, name: str) -> Tensor:
        """In the type that it is stored in."""
        if name not in self._names:
            some = ", ".join(sorted(self._names)[:6])
            raise ModelError(f"the checkpoint has no tensor {name!r}; it has {some}, …")
        self._read.add(name)
        return self._stored[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def leave_out(self, start: str) -> None:
        """The tensors whose names begin so belong to no part of the model that generates."""
        self._read.update(name for name in self._names if name.startswith(start))

    def check_all_read(self) -> None:
        """Raises ModelError for a tensor of a layer, or of a module that was read, which the family does not know:
        a bias, norm, scale or layer too many, without which the model would be another one."""
        modules = {name.rpartition(".")[0] for name in self._read}
        lists = {match[0] for name in self._read if (match := LIST.match(name))}
        for name in self._names.keys() - self._read:
            match = LIST.match(name)
            within = (match and match[0] in lists) or name.rpartition(".")[0] in modules
            if within and not name.endswith(BUFFERS):
                raise ModelError(
                    f"the checkpoint has {self._names[name]}, for which there is no place in a model "
                    "as config.json describes it"
                )

    def dense(self, name: str, bias: bool) -> Dense:
        """The linear layer `name`. bias: whether the config gives it one."""
        return Dense(self[f"{name}.weight"], self[f"{name}.bias"] if bias else None)

    def head(self, embed: Tensor, tied: bool, name: str = "lm_head", bias: bool = False) -> Dense:
        """The output layer. tied: the config says that it is the embedding, which holds unless the checkpoint has
        another one, as transformers has it. bias: whether the model_type has one."""
        own = f"{name}.weight"
        added = self[f"{name}.bias"] if bias else None
        if own in self:
            import torch

            head = self[own]
            same = tied and not head.is_meta and torch.equal(head, embed)
            return Dense(embed if same else head, added)
        if tied:
            return Dense(embed, added)
        raise ModelError(
            f"the checkpoint has no {own}, and config.json does not tie it to the embedding (tie_word_embeddings): "
            "a base model without its output layer generates no text"
        )

    def rms_norm(self, name: str, eps: float, offset: float = 0.0) -> Norm:
        """RMSNorm; Gemma stores its weight less one and multiplies in float32 (offset 1)."""
        weight = self[f"{name}.weight"]
        return Norm("rms", weight.float() + offset if offset else weight, None, eps)

    def layer_norm(self, name: str, eps: float) -> Norm:
        return Norm("layer", self[f"{name}.weight"], self[f"{name}.bias"], eps)


def rope_tables(config: Config, spec: Spec) -> dict[str, Rope]:
    """The tables of all layers: "default" where they share one, else by layer type."""
    types = {"default"} if "default" in config.ropes else set(config.layer_types)
    return {each: rope(config, spec, each) for each in types}


def rope(config: Config, spec: Spec, layer_type: str = "default") -> Rope:
    """The table of the layers of one type, bit by bit that of transformers' rotary module.

    Raises ModelError for parameters that transformers cannot read, and for a kind whose angles change with the
    length of the text: cached keys, and rows of other lengths, would have been turned by other angles.
    """
    missing = f"rope_parameters say nothing of {layer_type}"
    own = config.ropes.get(layer_type) or config.ropes.get("default") or missing
    if isinstance(own, str):
        raise ModelError(f"config.json: {own}")
    table = rope_table(own["inverse"], spec.max_positions, own["scaling"])
    if not (table.cos[-1].isfinite().all() and table.sin[-1].isfinite().all()):
        raise ModelError(
            f"config.json: transformers makes no rope of {shown(config.rope_parameters)}: its angles are not finite"
        )
    parameters = config.rope_parameters.get(layer_type, config.rope_parameters)
    turned = int(spec.head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if table.cos.shape[-1] != turned:
        raise ModelError(
            f"config.json: partial_rotary_factor asks for {turned} turned dimensions of a head, and transformers "
            f"turns {table.cos.shape[-1]} in a {config.model_type}; it is not supported"
        )
    return table


def rope_table(inverse: Sequence[float], positions: int, scaling: float = 1.0) -> Rope:
    """inverse: of each pair of turned dimensions, radians a position. scaling: of cosines and sines."""
    import torch

    with torch.device("cpu"):
        each = torch.arange(positions)[:, None].float() * torch.tensor(inverse)
    angles = torch.cat((each, each), dim=-1)
    return Rope(angles.cos() * scaling, angles.sin() * scaling)


def by_kind(fused: Dense, spec: Spec) -> Dense:
    """Queries of a key-value head, its key and its value, one head after the other -> queries, keys, values."""
    import torch

    groups = spec.heads // spec.kv_heads

    def sort(tensor: Tensor) -> Tensor:
        by_head = tensor.view(spec.kv_heads, groups + 2, spec.head_dim, *tensor.shape[1:])
        kinds = torch.split(by_head, [groups, 1, 1], dim=1)
        return torch.cat([own.flatten(0, 2) for own in kinds])

    return Dense(sort(fused.weight), None if fused.bias is None else sort(fused.bias))


def in_halves(qkv: Dense, spec: Spec, turned: int) -> Dense:
    """Queries and keys whose neighbouring dims rope turns, put in the order in which it turns dims half of `turned`
    apart: products of queries and keys are the same."""
    import torch

    dim = spec.head_dim
    order = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, dim)]

    def sort(stacked: Tensor) -> Tensor:
        heads = stacked.view(-1, dim, *stacked.shape[1:])  # [Hq + 2 Hkv, D, ...]
        values = heads[-spec.kv_heads :]
        return torch.cat((heads[: -spec.kv_heads, order], values)).flatten(0, 1)

    return Dense(sort(qkv.weight), None if qkv.bias is None else sort(qkv.bias))


def scaled(dense: Dense, by: float) -> Dense:
    """The product times a number, which its weights take, rounded to their type."""
    if by == 1.0:
        return dense

    def times(tensor: Tensor) -> Tensor:
        return (tensor.float() * by).to(tensor.dtype)

    return Dense(times(dense.weight), None if dense.bias is None else times(dense.bias))


def max_positions(config: Config) -> int:
    """How long a text may be: max_position_embeddings, or what YaRN extends its own original length to."""
    longest = int(config.max_position_embeddings)
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    if rope_parameters.get("rope_type") != "yarn":
        return longest
    original, factor = rope_parameters["original_max_position_embeddings"], rope_parameters["factor"]
    if (
        type(original) is not int
        or type(factor) not in (int, float)
        or not 0 < original * factor <= MOST_POSITIONS
    ):
        raise ModelError(
            f"config.json: YaRN by factor {shown(factor)} from {shown(original)} positions is not readable"
        )
    return max(longest, int(original * factor))


def windows(config: Config) -> list[int | None]:
    """What each layer sees by layer_types: the last sliding_window positions, or None for all."""
    kinds = config.layer_types
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= {FULL, SLIDING}:
        raise ModelError(
            f"config.json: layer_types must say {FULL} or {SLIDING} for each of {config.num_hidden_layers} layers; "
            f"it has {len(kinds)}: {', '.join(sorted(map(str, set(kinds))))}"
        )
    if SLIDING in kinds and not config.sliding_window:
        raise ModelError("config.json: layer_types has sliding_attention, and there is no sliding_window")
    return [config.sliding_window if kind == SLIDING else None for kind in kinds]


def plain_spec(config: Config, **own: Any) -> Spec:
    """Of a decoder whose heads all have keys of their own and that has no extras, but for what is `own`."""
    dim = head_dim(config)
    plain: dict[str, Any] = {
        "model_type": config.model_type,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_attention_heads,
        "head_dim": dim,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "scale": dim**-0.5,
    }
    return Spec(**plain | own)


def refuse_set(config: Config, *keys: str) -> None:
    """Raises ModelError where a key is set that this family does not honour."""
    for key in keys:
        if value := getattr(config, key, None):
            raise ModelError(
                f"config.json: {key} ({shown(value)}) is not supported for a {config.model_type}"
            )


def activation(name: str) -> Activation:
    """The feed-forward's activation under transformers' name for it."""
    if name not in ACTIVATIONS:
        raise ModelError(
            f"config.json: activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def head_dim(config: Config) -> int:
    """Raises ModelError when there are more heads than dimensions."""
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if dim < 1:
        raise ModelError(
            f"config.json: hidden_size {config.hidden_size} is less than num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return dim


def router(config: Config, dense: Dense, **options: Any) -> Router:
    """The router of a config's experts, `config.num_experts_per_tok` of which a token goes to. options: of Router.

    Raises ModelError when there are not so many to choose from.
    """
    made = Router(dense, config.num_experts_per_tok, **options)
    parts, uneven = made.count // made.groups, made.count % made.groups
    most = parts * made.top_groups
    grouped = made.groups > 1 and (uneven or parts < 2 or made.top_groups > made.groups)
    if grouped or not 1 <= made.top_k <= most:
        raise ModelError(
            f"config.json: {shown(made.top_k)} of {made.count} experts (num_experts_per_tok) cannot be chosen from "
            f"{made.top_groups} of {made.groups} groups"
        )
    return made
