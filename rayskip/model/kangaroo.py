"""Kangaroo's draft model (arXiv 2404.18911, section 3): the decoder's own first layers, one attention layer trained
on top of them, and the decoder's own head.

The adapter is RMSNorm, causal attention of the model's own shape, residual, RMSNorm; no feed-forward. Its keys and
values are one more layer of the KV cache. Its head scores the tokens on a list alone (FR-Spec, arXiv 2502.14856).

Shapes: N tokens, d hidden, Hq query heads, D head dim, V' listed tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayskip.errors import ModelError
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import KVCache
from rayskip.model.linear import Linear
from rayskip.model.ops import TokenBatch, normalise
from rayskip.model.spec import Dense, Norm

WEIGHTS, LABEL = "kangaroo.safetensors", "kangaroo.json"
SHIPPED = Path(__file__).parent / "shipped"
"""Adapters that come with the package, one folder each."""


@dataclass(frozen=True)
class KangarooLabel:
    """What stands beside the weights. base_tensors: fingerprint of the model it was trained on.

    exit_layer: layers before the adapter. steps: of training. agreement: share of held-out tokens where both choose
    the same.
    """

    base: str
    base_tensors: str
    exit_layer: int
    tokens: int
    steps: int
    agreement: float


class Kangaroo:
    """The adapter on a decoder, for drafting. Shared by lanes: it holds no state between calls."""

    def __init__(self, decoder: Decoder, exit_layer: int, tensors: dict[str, Tensor]) -> None:
        self.exit_layer = exit_layer
        self._decoder = decoder
        self._cache_layer = len(decoder.layers)
        own = {name: tensor.to(decoder.device) for name, tensor in tensors.items()}
        self.token_ids = own["token_ids"].long()
        like = decoder.layers[exit_layer].own
        eps, dtype = like.attn_norm.eps, decoder.dtype
        self._attn_norm = Norm("rms", own["attn_norm"].to(dtype), None, eps)
        self._final_norm = Norm("rms", own["final_norm"].to(dtype), None, eps)
        self._qkv = Linear(Dense(own["qkv"].to(dtype)))
        self._out = Linear(Dense(own["out"].to(dtype)))
        self._head = Linear(Dense(decoder.weights.head.weight[self.token_ids]))
        self._rope = like.rope

    def attend(self, x: Tensor, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Store the keys and values of tokens at states x [N, d] after the first layers; [N, Hq * D]."""
        spec = self._decoder.spec
        heads = self._qkv(normalise(x, self._attn_norm)).view(len(x), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        rope = self._decoder.rope(self._rope)
        return self._decoder.ops.attention(q, k, v, rope, self._cache_layer, None, batch, cache)

    def propose(self, x: Tensor, attended: Tensor) -> tuple[list[int], list[float]]:
        """The likeliest next token after each of N, and its probability among the listed ones.

        x [N, d], attended [N, Hq * D]: as given to and returned by `attend`.
        """
        hidden = normalise(x + self._out(attended), self._final_norm)
        best = torch.softmax(self._head(hidden).float(), dim=-1).max(dim=-1)
        return self.token_ids[best.indices].tolist(), best.values.tolist()


def adapter_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors for a model, without its token list."""
    spec = decoder.spec
    inner = spec.heads * spec.head_dim
    return {
        "attn_norm": (spec.hidden,),
        "final_norm": (spec.hidden,),
        "qkv": (inner + 2 * spec.kv_heads * spec.head_dim, spec.hidden),
        "out": (spec.hidden, inner),
    }


def load_kangaroo(decoder: Decoder, folder: Path | None) -> Kangaroo:
    """Read an adapter; without a folder, the one that ships for this model.

    Raises ModelError when there is none, or when it was made for another model.
    """
    from safetensors.torch import load_file

    fingerprint = tensors_fingerprint(decoder.folder) if decoder.folder else None
    folder = folder or _shipped(fingerprint)
    if folder is None:
        raise ModelError(
            "decode.draft.path: no Kangaroo adapter ships for this model; train one and name its folder"
        )
    if missing := [name for name in (LABEL, WEIGHTS) if not (folder / name).is_file()]:
        raise ModelError(
            f"decode.draft.path: {folder} has no {missing[0]}; `rayskip train kangaroo` makes one"
        )
    label = KangarooLabel(**json.loads((folder / LABEL).read_text()))
    if fingerprint is not None and fingerprint != label.base_tensors:
        raise ModelError(
            f"decode.draft.path: {folder} was trained on {label.base}, {decoder.folder} is another model"
        )
    tensors = load_file(folder / WEIGHTS)
    for name, shape in {**adapter_shapes(decoder), "token_ids": (label.tokens,)}.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise ModelError(f"decode.draft.path: {folder} has no tensor {name} of shape {list(shape)}")
    return Kangaroo(decoder, label.exit_layer, tensors)


def save_kangaroo(folder: Path, label: KangarooLabel, tensors: dict[str, Tensor]) -> None:
    """Write an adapter that `load_kangaroo` reads; weights in bfloat16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ready = {
        name: tensor.to(torch.int32 if name == "token_ids" else torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(ready, folder / WEIGHTS)
    (folder / LABEL).write_text(json.dumps(asdict(label), indent=2) + "\n")


def has_shipped(decoder: Decoder) -> bool:
    """Whether an adapter for the model comes with the package."""
    return decoder.folder is not None and _shipped(tensors_fingerprint(decoder.folder)) is not None


def _shipped(fingerprint: str | None) -> Path | None:
    for label in sorted(SHIPPED.glob(f"*/{LABEL}")):
        if json.loads(label.read_text())["base_tensors"] == fingerprint:
            return label.parent
    return None
