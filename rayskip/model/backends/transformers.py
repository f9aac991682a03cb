"""The backend of decoders that run through transformers' own modules (vLLM and SGLang call it their transformers
backend).

What is exchanged in them is ours: attention over the cache's pages, and matrix products under the row rule, both by
the backend that the device has for models of our own families.

Shapes: N tokens, d hidden, Hq query heads, Hkv key-value heads, D head dim of the pages, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayskip.errors import ModelError, first_line
from rayskip.model.backends.base import Backend, Head, HeadOutput, Linear, Stack
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.cache.kv_cache import KVCache, key_blocks
from rayskip.model.hosted.modules import Asked, Inputs, Modules
from rayskip.model.spec import Attention, Dense, Layer, Norm, Spec
from rayskip.model.token_batch import Span, TokenBatch

NONE = Dense(torch.empty(0))
"""Products of attention, which are the modules' own."""
PROBED, TOGETHER = 14, 9
"""Tokens of a text by which ours is compared with transformers' own forward, and how many of them run at once."""
APART = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
"""How far half of the tokens' logits may lie from transformers' own, in standard deviations of those: rounding may
send a token to another expert, a mistake shows everywhere."""


class TransformersBackend(Backend):
    """own: the device's, for models of our own families."""

    modules: Modules

    def __init__(self, spec: Spec, own: TorchBackend) -> None:
        super().__init__(spec, own.dtype, own.device, own.warnings)
        self.name = f"transformers, {own.name}"
        self.layout = own.layout
        self.traits = replace(own.traits, worker_threads=False)  # its modules are not said to be thread-safe
        self.own = own

    @property
    def machine(self) -> str:
        return f"transformers {version('transformers')}, {self.own.machine}"

    def load(self, weights: Modules) -> tuple[Stack, Head]:  # type: ignore[override]  # of no family's parts
        """Raises ModelError where transformers' own forward gives other logits."""
        self.modules = weights
        token_ids = self.tensor([(5 + 37 * index) % self.spec.vocab for index in range(PROBED)])
        with torch.inference_mode(), self._told():
            expected = weights.reference_logits(token_ids)
            products = weights.exchange_products(self._product)
            self.own.set_row_rule(list(products.values()))
            self.row_rule = self.own.row_rule
            stack, head = ModulesStack(self, products), ModulesHead(self, products)
            self._compare(self._logits(stack, head, token_ids), expected)
        return stack, head

    @contextmanager
    def _told(self) -> Iterator[None]:
        """An error of transformers' modules on the first tokens is one of the model."""
        try:
            yield
        except (ModelError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"{self.spec.road}, fails ({type(error).__name__}: {first_line(error)})"
            ) from error

    def embed(self, batch: TokenBatch) -> Tensor:
        return self.inputs(batch, len(batch.token_ids)).x.clone()  # layers may be told of it too

    def inputs(self, batch: TokenBatch, count: int) -> Inputs:
        """Of the batch's first `count` tokens."""
        ids, positions = batch.token_ids[:count], batch.positions[:count]
        return batch.once(("inputs", count), lambda: self.modules.inputs(ids, positions))

    def attention(self, layer: int, batch: TokenBatch, cache: KVCache, asked: Asked) -> Tensor:
        """Store keys and values, and attend: [N, Hq, Dv]. N: the layer's active tokens."""
        spec, size = self.spec, asked.v.shape[2]
        q = asked.q if asked.scale == spec.scale else asked.q * (asked.scale / spec.scale)
        k, v = (part.repeat_interleave(spec.kv_heads // part.shape[1], dim=1) for part in (asked.k, asked.v))
        q, k, v = (F.pad(part, (0, spec.head_dim - part.shape[2])).contiguous() for part in (q, k, v))
        own = Attention(NONE, NONE, window=self.modules.windows[layer], rope=None)
        out = self.own.attention(q, k, v, own, layer, batch, cache)
        return out.view(len(q), spec.heads, spec.head_dim)[:, :, :size]

    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        return self.own.stack(layers, stored_at)

    def head(self, dense: Dense, norm: Norm | None, exact: bool = True) -> Head:
        return self.own.head(dense, norm, exact)

    def linear(self, dense: Dense) -> Linear:
        return self.own.linear(dense)

    def normalise(self, x: Tensor, norm: Norm) -> Tensor:
        return self.own.normalise(x, norm)

    def _product(self, weight: Tensor, bias: Tensor | None) -> Linear | None:
        return self.own.linear(Dense(weight, bias)) if weight.dtype == self.dtype else None

    def _logits(self, stack: Stack, head: Head, token_ids: Tensor) -> Tensor:
        """Logits [T, V] of a text [T] beside another, over pages: its first tokens at once, then one by one."""
        cache = KVCache(self.spec, len(self.modules.layers), self)
        cache.fill(2, len(token_ids))
        rows = self.tensor([0, 1])
        texts = torch.stack([token_ids, token_ids.flip(0)])
        found = []
        for start, stop in [(0, TOGETHER), *((at, at + 1) for at in range(TOGETHER, len(token_ids)))]:
            width = stop - start
            batch = TokenBatch(
                texts[:, start:stop].flatten(),
                torch.arange(start, stop, device=self.device).repeat(2),
                rows.repeat_interleave(width),
                [Span(0, width, rows, key_blocks(stop))],
                rows,
            )
            x = stack.run(self.embed(batch), batch, cache, 0, len(self.modules.layers))
            found.append(head.logits(x[:width]))
        return torch.cat(found)

    def _compare(self, found: Tensor, expected: Tensor) -> None:
        found, expected = found.float(), expected.float()
        apart = ((found - expected).square().mean(-1).sqrt() / expected.std(-1)).median().item()
        if not apart <= APART[self.dtype]:
            raise ModelError(
                f"a {self.spec.model_type} does not run through transformers' modules: its logits are {apart:.2g} "
                "standard deviations from those of transformers' own forward"
            )


class ModulesStack(Stack):
    """Each layer by its module."""

    def __init__(self, backend: TransformersBackend, products: Mapping[nn.Module, Linear]) -> None:
        self._backend = backend
        inside = [module for layer in backend.modules.layers for module in layer.modules()]
        self.linears = [products[module] for module in inside if module in products]

    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        backend, modules = self._backend, self._backend.modules
        for index in range(first, last):
            count = len(x) if batch.active is None else batch.active[index]
            if count:
                call = backend.inputs(batch, count).calls[index]
                attend = partial(backend.attention, index, batch, cache)
                x[:count] = modules.run_layer(index, x[:count], call, attend)
        return x


class ModulesHead(Head):
    """What the model's forward does after its layers."""

    def __init__(self, backend: TransformersBackend, products: Mapping[nn.Module, Linear]) -> None:
        self._backend = backend
        if (output := backend.modules.model.get_output_embeddings()) not in products:
            raise ModelError(f"{backend.spec.road}: its head is no plain product")
        self.linear = products[output]

    def logits(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self._backend.spec.vocab)
        return self._backend.modules.logits(x).to(x.dtype)

    def output(self, x: Tensor, full: Sequence[int]) -> HeadOutput:
        logits = self.logits(x)
        return HeadOutput(*self._backend.own.argmax(logits), logits, range(len(logits)))

    def top_k(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._backend.own.top_k(self.logits(x), count)
