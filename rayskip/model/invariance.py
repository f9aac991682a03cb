"""Whether a row's logits, and what is said of them, are the same bits whatever runs beside it, measured on this
machine.

Architecture invariant 3 rests on the kernels that libraries pick by shape, so it is tried out, on the model's
first layers, as many as have each kind of layer, and head; the answer goes into the job's report.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayskip.model.cache.kv_cache import key_blocks
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.config import reader
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import Span, TokenBatch
from rayskip.user_cache import recall

LENGTH = 131
POSITIONS = (0, 5, 31, 32, 77, 130)
"""Positions whose logits are compared."""
VARIANTS = ((1, 33, 0), (3, 1, 1), (3, LENGTH, LENGTH), (8, 7, 7), (4, 1, 60))
"""(rows, tokens of the row in one forward, tokens of each other row), each against one row, token by token."""
MATES_EVERY = 8
"""Forwards, of those whose logits are not compared, of which one has the other rows beside."""
ASKING = 36
"""Times that states ask for their likeliest token where others run beside: of more rows than `bounded_rows` the
kernels find it another way."""


def is_batch_invariant(decoder: Decoder) -> bool:
    """True when a row's logits are bit-equal alone, in a batch and in a prefill chunk of any width, and so is the
    likeliest token. A machine tries it out once for a model that lies in a folder."""
    if decoder.folder is None:
        return _is_batch_invariant(decoder)
    threads = torch.get_num_threads()
    of = [
        *reader(),
        decoder.backend.machine,
        str(threads),
        str(decoder.backend.row_rule),
        tensors_fingerprint(decoder.folder),
    ]
    return bool(recall("invariance", lambda: of, lambda: _is_batch_invariant(decoder)))


def _is_batch_invariant(decoder: Decoder) -> bool:
    shallow = decoder.first_layers(decoder.held.varied)
    length = min(LENGTH, decoder.spec.max_positions)
    generator = torch.Generator().manual_seed(0)
    rows = max(rows for rows, *_ in VARIANTS)
    tokens = torch.randint(decoder.spec.vocab, (rows, length), generator=generator).to(decoder.backend.device)
    alone = _head_outputs(shallow, tokens[:1], 1, 0)
    return all(
        torch.equal(found, own)
        for rows, width, others in VARIANTS
        for found, own in zip(_head_outputs(shallow, tokens[:rows], width, others), alone, strict=True)
    )


def _head_outputs(decoder: Decoder, tokens: Tensor, width: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of row 0 at POSITIONS, the highest of them and their places, when it runs in chunks of `width` tokens,
    beside the first `others` tokens of each other row, now and then; tokens [R, T]. A row has pages for `others`
    positions more."""
    rows, length = tokens.shape
    device = tokens.device
    cache = decoder.new_cache()
    cache.fill(rows, length + others)
    table_rows = torch.arange(rows, device=device)
    beside = torch.arange(min(others, length), device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, length, width):
        positions = torch.arange(start, min(start + width, length), device=device)
        size = len(positions)
        wanted = [position - start for position in POSITIONS if start <= position < start + size]
        mates = rows - 1 if wanted or start // width % MATES_EVERY == 0 else 0
        spans = [Span(0, size, table_rows[:1], key_blocks(start + size))]
        if mates:
            spans.append(Span(size, len(beside), table_rows[1:], key_blocks(len(beside))))
        batch = TokenBatch(
            token_ids=torch.cat([tokens[0, positions], tokens[1 : 1 + mates, : len(beside)].flatten()]),
            positions=torch.cat([positions, beside.repeat(mates)]),
            table_rows=torch.cat(
                [table_rows[:1].repeat(size), table_rows[1 : 1 + mates].repeat_interleave(len(beside))]
            ),
            spans=spans,
            outputs=torch.tensor(wanted, dtype=torch.long, device=device),
        )
        hidden = decoder.hidden(batch, cache)
        greedy = decoder.head_output(hidden.repeat(ASKING if mates else 1, 1), [])
        found.append((decoder.logits(hidden), greedy.best[: len(hidden)], greedy.argmax[: len(hidden)]))
    logits, best, at = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, best, at
