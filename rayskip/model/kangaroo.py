"""Kangaroo's draft model (arXiv 2404.18911, section 3): the decoder's own first layers, one attention layer trained
on top of them, and the decoder's own head.

The adapter is RMSNorm, causal attention of the model's own shape, residual, RMSNorm; no MLP. Its keys and
values are one more layer of the KV cache. Its head scores the tokens on a list alone (FR-Spec, arXiv 2502.14856).

Shapes: N tokens, d hidden, Hq query heads, D head dim, V' listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from torch import Tensor

from rayskip.model.backends.transfer import ToHost
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.spec import Attention, Dense, Layer, Norm
from rayskip.model.token_batch import TokenBatch
from rayskip.model.trained import KangarooLabel, check_shapes, load_trained


class Kangaroo:
    """The adapter on a decoder, for drafting. Shared by workers: it holds no state between calls."""

    def __init__(self, decoder: Decoder, label: KangarooLabel, tensors: dict[str, Tensor]) -> None:
        self.exit_layer, self.agreement = label.exit_layer, label.agreement
        self._decoder = decoder
        backend, dtype = decoder.backend, decoder.backend.dtype
        own = {name: tensor.to(backend.device) for name, tensor in tensors.items()}
        self.token_ids = own["token_ids"].long()
        like = decoder.weights.layers[label.exit_layer]
        attn_norm, final_norm = (
            Norm("rms", own[name].to(dtype), None, decoder.weights.final_norm.eps)
            for name in ("attn_norm", "final_norm")
        )
        attention = Attention(
            Dense(own["qkv"].to(dtype)), Dense(own["out"].to(dtype)), rope=like.attention.rope
        )
        adapter = backend.stack([Layer(attention, attn_norm)], stored_at=decoder.depth)
        head = backend.head(Dense(decoder.weights.head.weight[self.token_ids]), final_norm, exact=False)
        self._draft = backend.draft_step(decoder.layers, self.exit_layer, adapter, head)

    def step(
        self, batch: TokenBatch, cache: KVCache, after: Seq[int], count: int
    ) -> tuple[Tensor, list[list[int]], list[list[float]]]:
        """Run N tokens of a draft, and say what may follow some of them: the tokens `after`, by index.

        Stores their keys and values, those of the adapter too. Returns the states after the exit layer, [N, d], and
        of each of `after` the `count` likeliest next tokens, with their probabilities on the list, descending.
        """
        x = self._decoder.embed(batch)
        places, chances = self._draft.run(x, batch, cache, after, count)
        tokens, sure = ToHost(self.token_ids[places]), ToHost(chances)
        return x, tokens.tolist(), sure.tolist()


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
    """Read an adapter; without a folder, the one that ships for this model. Raises ModelError as `load_trained`."""
    label, tensors, found = load_trained(KangarooLabel, decoder.folder, folder)
    check_shapes(tensors, {**adapter_shapes(decoder), "token_ids": (label.tokens,)}, found)
    return Kangaroo(decoder, label, tensors)
