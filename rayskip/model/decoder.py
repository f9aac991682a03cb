"""The one forward: a packed list of tokens through a decoder, over the KV cache.

Prefill, decode and verification are the same call; they differ in how many query tokens a row brings.
Knows neither sampling nor scheduling, nor what hardware computes it (backends/).

Shapes: N tokens, R of them outputs, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayskip.errors import ModelError
from rayskip.model.backends.base import Backend, HeadOutput
from rayskip.model.backends.choose import choose_backend
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.spec import Spec, Weights
from rayskip.model.token_batch import TokenBatch

if TYPE_CHECKING:
    from rayskip.model.hosted.modules import Modules


class Decoder:
    """A model that runs. Holds no state between calls; the caller owns the cache.

    depth: its layers. backend: what computes it; by default the fastest that serves it where its weights are.
    folder: where the weights came from, for parts that were trained for them.
    """

    def __init__(
        self,
        spec: Spec,
        weights: Weights | Modules,
        backend: TorchBackend | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises ModelError where transformers' modules run it, and not to the logits of its own forward."""
        self.spec, self.held, self.folder = spec, weights, folder
        self.depth = len(weights.layers)
        own = backend or choose_backend(spec, weights.embed.dtype, weights.embed.device)
        self.backend: Backend
        if isinstance(weights, Weights):
            self.backend = own
            self.layers, self.head = own.load(weights)
        else:
            from rayskip.model.backends.transformers import TransformersBackend  # brings transformers along

            self.backend = hosting = TransformersBackend(spec, own)
            self.layers, self.head = hosting.load(weights)

    @property
    def weights(self) -> Weights:
        """By parts. Raises ModelError where transformers' modules hold them."""
        if not isinstance(self.held, Weights):
            raise ModelError(f"{self.spec.road}: no part of it is known")
        return self.held

    def first_layers(self, count: int) -> Decoder:
        """The same model, tensors shared, cut off after `count` layers."""
        shallow = copy(self)
        shallow.depth = count
        return shallow

    def new_cache(self, extra_layers: int = 0) -> KVCache:
        """An empty cache; extra_layers: more layers than the model has, for what a drafter keeps."""
        return KVCache(self.spec, self.depth + extra_layers, self.backend)

    @torch.inference_mode()
    def hidden(self, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Run every layer on its active tokens and write their keys and values into `cache`; the outputs' states
        after the last layer, [R, d]."""
        return self.run_layers(self.embed(batch), batch, cache, 0, self.depth)[batch.outputs]

    def embed(self, batch: TokenBatch) -> Tensor:
        """The tokens' states before the first layer, [N, d]."""
        return self.backend.embed(batch)

    def run_layers(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        """The tokens' states [N, d] after layers [first, last), in place: see `Stack.run`."""
        return self.layers.run(x, batch, cache, first, last)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits [R, V] of states [R, d] after the last layer."""
        return self.head.logits(x)

    @torch.inference_mode()
    def head_output(self, x: Tensor, full: Seq[int]) -> HeadOutput:
        """The highest logit of states [R, d] after the last layer, and all logits of the rows `full` at least."""
        return self.head.output(x, full)
