"""The contract between a model and what computes it: one door to hardware.

A backend is told a decoder's layers by their parts, the cache's pages and a packed batch of tokens. It answers with
states after some layers, with what the head says of them, and with the rule that keeps a row's sums alone. Nobody
above asks which hardware there is: what callers may depend on stands in `Traits`. The torch backend is the
reference that every other is compared with.

Shapes: N tokens, R rows of outputs, d hidden, V vocabulary, F rows with all logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayskip.model.backends import memory
from rayskip.model.backends.clock import Stopwatch
from rayskip.model.backends.machine import machine
from rayskip.model.backends.transfer import to_device
from rayskip.model.cache.kv_cache import KVCache, Layout
from rayskip.model.spec import Dense, Layer, Norm, Spec, Weights
from rayskip.model.token_batch import TokenBatch


@dataclass(frozen=True)
class Traits:
    """How a kind of hardware wants to be used.

    plans_ahead: it computes by itself, so the next step is planned and sent off while one runs. Where it does not,
    the planning takes time from the step that runs (on a CPU 0.90 to 0.98 times as fast). worker_threads: its
    threads serve workers of their own, each with rows of its own; else one worker has all.
    step_tokens: tokens in a forward past which a prefill is no faster per token. timed_tokens: tokens in a forward
    past which its time is a straight line. rerun_tokens: as many tokens take little longer than one, so that a
    draft's last ones run again in the verification rather than by themselves. most_rows: a batch of more is not
    faster. memory_fraction: of the memory that is free after the load, for keys and values; a GPU's is for nobody
    else.
    """

    plans_ahead: bool
    worker_threads: bool
    step_tokens: int
    timed_tokens: int
    rerun_tokens: int
    most_rows: int
    memory_fraction: float


HOST = Traits(
    plans_ahead=False,
    worker_threads=True,
    step_tokens=1024,
    timed_tokens=128,
    rerun_tokens=16,
    most_rows=256,
    memory_fraction=0.4,
)
DEVICE = Traits(
    plans_ahead=True,
    worker_threads=False,
    step_tokens=8192,
    timed_tokens=4096,
    rerun_tokens=0,
    most_rows=1024,
    memory_fraction=0.85,
)


@dataclass(frozen=True)
class RowRule:
    """How rows are handed to a product so that a row's result does not depend on the others.

    least: fewer rows are padded to so many. tile: rows run in tiles of exactly so many; None, all at once.
    """

    least: int = 1
    tile: int | None = None

    def padding(self, rows: int) -> int:
        """Rows computed in vain beside `rows`."""
        return -rows % self.tile if self.tile else max(0, self.least - rows)


@dataclass(frozen=True)
class HeadOutput:
    """best, argmax [R]: the highest logit of each row (not a number where one is none) and the first token that has
    it. logits [F, V]: of the rows `full`."""

    best: Tensor
    argmax: Tensor
    logits: Tensor
    full: Sequence[int]

    def of(self, rows: Sequence[int]) -> Tensor:
        """Logits of some of the rows `full`, [len(rows), V]."""
        if rows == list(self.full):
            return self.logits
        at = {row: index for index, row in enumerate(self.full)}
        return self.logits[to_device([at[row] for row in rows], torch.long, self.logits.device)]


class Linear(ABC):
    """y = x @ weight.T + bias over rows x [N, in], N any."""

    in_features: int
    out_features: int

    @property
    def size(self) -> int:
        """Weights."""
        return self.in_features * self.out_features

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""


class Stack(ABC):
    """Layers ready to run. Their keys and values are successive layers of the cache.

    linears: their products, in the order in which they run.
    """

    linears: Sequence[Linear]

    @abstractmethod
    def run(self, x: Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int) -> Tensor:
        """The tokens' states [N, d] after layers [first, last), in place. Stores keys and values in the cache.

        A token passes a layer that it skips unchanged (SkipDecode, arXiv 2307.02628, section 3).
        """


class Head(ABC):
    """The output layer, with the norm before it."""

    linear: Linear

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits [R, V] of states x [R, d]."""

    @abstractmethod
    def output(self, x: Tensor, full: Sequence[int]) -> HeadOutput:
        """The highest logit of each of states x [R, d], and all logits of the rows `full` at least."""

    @abstractmethod
    def top_k(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` likeliest tokens of states x [R, d], and their probabilities, both [R, count], descending."""


class DraftStep:
    """A step of a draft by the model's own first layers (Kangaroo, arXiv 2404.18911, section 3): these, an adapter
    after them, and a head for drafts."""

    def __init__(self, layers: Stack, exit_layer: int, adapter: Stack, head: Head) -> None:
        """exit_layer: how many of `layers` run. adapter: one layer."""
        self.layers, self.exit_layer, self.adapter, self.head = layers, exit_layer, adapter, head

    def run(
        self, x: Tensor, batch: TokenBatch, cache: KVCache, after: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """Run states x [N, d], in place, to those after the exit layer; the adapter's keys and values are stored.

        Returns what `Head.top_k` says after the tokens `after`, by index: [len(after), count] each.
        """
        self.layers.run(x, batch, cache, 0, self.exit_layer)
        adapted = self.adapter.run(x.clone(), batch, cache, 0, 1)
        return self.head.top_k(adapted[to_device(after, torch.long, x.device)], count)


class Backend(ABC):
    """Computes one model. Shared by threads: but for what `load` sets, it has no state.

    layout: how the cache's pages are laid out. warnings: what is slower here than it could be, and why, in words
    for whoever chose model and machine. row_rule: of the products of the model that was loaded.
    """

    name: str
    layout: Layout = Layout()

    def __init__(
        self, spec: Spec, dtype: torch.dtype, device: torch.device, warnings: Sequence[str] = ()
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.traits = HOST if device.type == "cpu" else DEVICE
        self.warnings = list(warnings)
        self.row_rule = RowRule()

    @property
    def machine(self) -> str:
        """All that decides what it computes and how fast, but the model: hardware, libraries, types."""
        return f"{self.name}, {self.dtype} on {self.device}, {machine(self.device)}"

    @abstractmethod
    def load(self, weights: Weights) -> tuple[Stack, Head]:
        """Make the model's layers and head ready, and find the row rule of their products. Called first, once."""

    @abstractmethod
    def embed(self, batch: TokenBatch) -> Tensor:
        """The tokens' states before the first layer, [N, d]."""

    @abstractmethod
    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        """Layers beside the model's own. stored_at: the cache's layer for the first of them."""

    @abstractmethod
    def head(self, dense: Dense, norm: Norm | None, exact: bool = True) -> Head:
        """A head beside the model's own. norm: before it, if any. exact: else weights may be rounded, which serves
        drafts."""

    @abstractmethod
    def linear(self, dense: Dense) -> Linear:
        """A product beside the model's own."""

    @abstractmethod
    def normalise(self, x: Tensor, norm: Norm) -> Tensor:
        """x [N, d] normalised."""

    def draft_step(self, layers: Stack, exit_layer: int, adapter: Stack, head: Head) -> DraftStep:
        return DraftStep(layers, exit_layer, adapter, head)

    def use_threads(self, count: int) -> None:
        """What the calling thread computes takes so many threads."""
        torch.set_num_threads(count)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """`use_threads`, for a while, on a thread that has not called it."""
        before = torch.get_num_threads()
        self.use_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def tensor(self, values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """A list of numbers, or of equally long lists, where the model is."""
        return to_device(values, dtype, self.device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where the model is, for a cache."""
        return memory.zeros(shape, dtype, self.device)

    def free_bytes(self) -> int:
        """Memory that can still be taken where the model is."""
        return memory.free_bytes(self.device)

    def release_memory(self) -> None:
        """Give back what is free in pieces, after memory ran out."""
        memory.release(self.device)

    def stopwatch(self) -> Stopwatch:
        """Laps of what the calling thread has the hardware do."""
        return Stopwatch(self.device)
