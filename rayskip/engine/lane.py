"""A lane: one thread's share of the engine. Its own rows and cache; the decoder is shared.

On CPU a replica runs one lane per core, each on one thread: the many small operations of a step then need no
barrier between threads, which costs more than they do. On a GPU there is one lane.

Does not know requests, text or how rows are handed out.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import groupby

import torch

from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, choose
from rayskip.engine.scheduler import Chunk, Scheduler, StepPlan
from rayskip.engine.sequence import Sequence
from rayskip.engine.sizes import Sizes
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import key_blocks
from rayskip.model.ops import Group, TokenBatch
from rayskip.stats import Stats


@dataclass(frozen=True)
class StepResult:
    """What a step chose, for every row whose newest token ran, and what it cost."""

    choices: list[tuple[Sequence, Choice]]
    stats: Stats


class Lane:
    """Schedules and runs steps. `plan` and `retire` are bookkeeping, for the engine's thread; `run` is the
    tensor work, for the lane's own."""

    def __init__(self, decoder: Decoder, sizes: Sizes, waiting: deque[Sequence]) -> None:
        self._decoder = decoder
        self._sizes = sizes
        self._cache = decoder.new_cache()
        self.scheduler = Scheduler(sizes.batch_rows, sizes.batch_tokens, sizes.cache_positions, waiting)

    def run(self, plan: StepPlan) -> StepResult:
        """One forward over the plan's tokens; chooses the next token of every row whose newest token ran."""
        start = time.perf_counter()
        self._reserve()
        for copy in plan.copies:
            self._cache.copy(copy.source, copy.target, copy.length)
        chunks = sorted(plan.chunks, key=attention_shape)
        batch = token_batch(chunks, self._decoder.device)
        logits = self._decoder.forward(batch, self._cache)
        middle = time.perf_counter()
        last = [chunk.sequence for chunk in chunks if chunk.last]
        choices = choose(logits, [_draw(row) for row in last]) if last else []
        stats = self._count(plan, len(batch.token_ids))
        stats.seconds["prefill" if plan.prefills else "decode"] = middle - start
        stats.seconds["sample"] = time.perf_counter() - middle
        return StepResult(list(zip(last, choices, strict=True)), stats)

    def _reserve(self) -> None:
        """Room for a full batch of rows as long as the longest in flight, so that the cache seldom grows."""
        running = self.scheduler.running
        length = max(row.reserved for row in running)
        fitting = max(self._sizes.cache_positions // length, 1)
        self._cache.reserve(
            max(max(row.slot for row in running) + 1, min(self._sizes.batch_rows, fitting)), length
        )

    def _count(self, plan: StepPlan, tokens: int) -> Stats:
        return Stats(
            steps=1,
            step_rows=len(plan.chunks),
            step_slots=self._sizes.batch_rows,
            prefix_tokens=plan.reused,
            layer_tokens=tokens * len(self._decoder.layers),
            padding_tokens=self._decoder.row_rule.padding(tokens),
        )


def token_batch(chunks: list[Chunk], device: torch.device) -> TokenBatch:
    """Chunks as packed tensors. Those of one width that read equally many key blocks attend as one group.

    chunks: in the order of their groups, see `attention_shape`.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    groups: list[Group] = []
    for (width, keys), members in groupby(chunks, attention_shape):
        start = len(ids)
        for chunk in members:
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            slots += [chunk.sequence.slot] * width
            if chunk.last:
                outputs.append(len(ids) - 1)
        groups.append(Group(start, width, torch.tensor(slots[start::width], device=device), keys))
    packed = torch.tensor([ids, positions, slots], device=device)
    logits_of = torch.tensor(outputs, dtype=torch.long, device=device)
    return TokenBatch(packed[0], packed[1], packed[2], groups, logits_of)


def attention_shape(chunk: Chunk) -> tuple[int, int]:
    """(tokens, key positions read): depends on nothing but the row itself."""
    return chunk.stop - chunk.start, key_blocks(chunk.stop)


def _draw(row: Sequence) -> Draw:
    seen = row.tokens(0, row.length) if row.params.repetition_penalty != 1 else ()
    chance = uniform(row.prompt.key, row.sample, len(row.generated)) if row.params.temperature else 0.0
    return Draw(row.params, chance, seen)
