"""The GPU's backend on a CPU: torch's varlen_attn over a slow function in FlashAttention's place, which refuses
what libtorch_cuda refuses, and CUDA graphs with calls that are made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rayskip.model.backends.base import Head, Stack
from rayskip.model.backends.cuda.backend import CudaBackend, GraphedStack
from rayskip.model.backends.cuda.graphs import GraphedLayers, Record
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.spec import Layer, Spec, Weights

CPU = torch.device("cpu")


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """What libtorch_cuda has below varlen_attn, and what it refuses, but for number formats: row by row.
    Queries [Tq, Hq, D]; keys [Tk, Hkv, D], or in pages [pages, positions, Hkv, D]."""
    assert cum_seq_q is not None
    assert cum_seq_k is not None, "must be both set or both not set"
    indices = [cum_seq_q, cum_seq_k, *(one for one in (seqused_k, block_table) if one is not None)]
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in indices)
    rows = len(cum_seq_q) - 1
    assert cum_seq_k.shape == (rows + 1,)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[1] % key.shape[-2] == 0
    assert not dropout_p
    if block_table is not None:
        assert block_table.shape[0] == rows
        assert key.dim() == 4
        assert key.shape[1] % 256 == 0
        assert num_splits == 1, "or a row's sums depend on the batch"
    else:
        assert key.dim() == 3
    shared = query.shape[1] // key.shape[-2]
    out = torch.empty_like(query)
    starts, lasts = cum_seq_k.tolist(), cum_seq_k[1:].tolist()
    for row, (start, stop) in enumerate(zip(cum_seq_q.tolist(), cum_seq_q[1:].tolist(), strict=False)):
        used = lasts[row] - starts[row] if seqused_k is None else int(seqused_k[row])
        assert 0 < stop - start <= max_q
        assert used <= max_k
        if block_table is None:
            keys, values = (stored[starts[row] : starts[row] + used] for stored in (key, value))
        else:
            keys, values = (stored[block_table[row].long()].flatten(0, 1)[:used] for stored in (key, value))
        last = (
            torch.arange(used - (stop - start), used).unsqueeze(1) + window_size_right
        )  # that each query sees
        at = torch.arange(used)
        hidden = (at > last) | ((at < last - window_size_left) if window_size_left >= 0 else False)
        keys, values = (part.repeat_interleave(shared, dim=1).float() for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop].float(), keys) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values)
    nothing = query.new_empty(0)
    return out, nothing, nothing, nothing, nothing


@contextmanager
def flash_attention_on_cpu() -> Iterator[None]:
    """FlashAttention on CPU, below torch's own varlen_attn."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_attention, "CPU")
        yield


class CudaOnCpu(CudaBackend):
    """With or without graphs; nothing is compiled."""

    def __init__(self, spec: Spec, dtype: torch.dtype, record: Record | None) -> None:
        super().__init__(spec, dtype, CPU)
        self._record = record

    def load(self, weights: Weights) -> tuple[Stack, Head]:
        return TorchBackend.load(self, weights)

    def stack(self, layers: Sequence[Layer], stored_at: int = 0) -> Stack:
        if self._record is None:
            return TorchBackend.stack(self, layers, stored_at)
        return GraphedStack(self, layers, stored_at, GraphedLayers(self._record))


def recorded_again(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    out = work()

    def again() -> None:
        out.copy_(work())

    return out, again
