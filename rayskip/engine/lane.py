"""A lane: one thread's share of the engine. Its own rows and cache; the decoder is shared.

On CPU a replica runs one lane per core, each on one thread: the many small operations of a step then need no
barrier between threads, which costs more than they do. On a GPU there is one lane.

Does not know requests, text or how rows are handed out.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, choose
from rayskip.engine.scheduler import Chunk, Scheduler, StepPlan
from rayskip.engine.sequence import Sequence
from rayskip.engine.sizes import Sizes
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import KVCache, key_blocks
from rayskip.model.ops import Group, TokenBatch
from rayskip.skip import SkipPolicy
from rayskip.stats import Stats


@dataclass(frozen=True)
class StepResult:
    """What a step chose, for every row whose newest token ran, and what it cost."""

    choices: list[tuple[Sequence, Choice]]
    stats: Stats


class Lane:
    """Schedules and runs steps. `plan` and `retire` are bookkeeping, for the engine's thread; `run` is the
    tensor work, for the lane's own."""

    def __init__(self, decoder: Decoder, sizes: Sizes, policy: SkipPolicy, waiting: deque[Sequence]) -> None:
        self._decoder = decoder
        self._policy = policy
        self._sizes = sizes
        self._cache = decoder.new_cache()
        self._layer_kv_bytes = KVCache.bytes_per_position(decoder.spec, 1, decoder.dtype)
        self.scheduler = Scheduler(
            sizes.batch_rows, sizes.batch_tokens, sizes.cache_positions, sizes.cohort, waiting
        )

    def run(self, plan: StepPlan) -> StepResult:
        """One forward over the plan's tokens; chooses the next token of every row whose newest token ran."""
        start = time.perf_counter()
        if plan.resize is not None:
            self._cache.resize(plan.resize.slots, plan.resize.length, plan.resize.kept)
        for copy in plan.copies:
            self._cache.copy(copy.source, copy.target, copy.length)
        chunks = sorted(plan.chunks, key=group_key)
        batch = token_batch(chunks, self._policy, self._decoder.device)
        logits = self._decoder.forward(batch, self._cache)
        middle = time.perf_counter()
        last = [chunk.sequence for chunk in chunks if chunk.last]
        choices = choose(logits, [_draw(row) for row in last]) if last else []
        for row, choice in zip(last, choices, strict=True):
            if choice.token_id is None:
                self._cache.clear(row.slot)
        stats = self._count(plan, batch)
        stats.seconds["prefill" if plan.prefills else "decode"] = middle - start
        stats.seconds["sample"] = time.perf_counter() - middle
        return StepResult(list(zip(last, choices, strict=True)), stats)

    def _count(self, plan: StepPlan, batch: TokenBatch) -> Stats:
        layers, rule = len(self._decoder.layers), self._decoder.row_rule
        active = batch.active or [len(batch.token_ids)] * layers
        decoding = [chunk for chunk in plan.chunks if chunk.generated]
        depths = [self._policy.depth(chunk.sequence.skip_position(chunk.start)) for chunk in decoding]
        generated = sum(depths)
        return Stats(
            steps=1,
            step_rows=len(plan.chunks),
            step_slots=self._sizes.batch_rows,
            prefix_tokens=plan.reused,
            decode_tokens=len(decoding),
            steady_tokens=0 if plan.prefills else len(decoding),
            decode_layer_tokens=generated,
            prompt_layer_tokens=sum(active) - generated,
            padding_layer_tokens=sum(rule.padding(count) for count in active if count),
            cohort_tokens=max(Counter(depths).values(), default=0),
            kv_bytes_saved=(layers * len(decoding) - generated) * self._layer_kv_bytes,
        )


def token_batch(chunks: list[Chunk], policy: SkipPolicy, device: torch.device) -> TokenBatch:
    """Chunks as packed tensors. Those of one depth and width that read equally many key blocks attend as one group.

    chunks: in the order of their groups, see `group_key`.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    groups: list[Group] = []
    skip_positions: list[int] = []
    for (skip_position, width, keys), members in groupby(chunks, group_key):
        start = len(ids)
        for chunk in members:
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            slots += [chunk.sequence.slot] * width
            skip_positions += [skip_position] * width
            if chunk.last:
                outputs.append(len(ids) - 1)
        groups.append(Group(start, width, torch.tensor(slots[start::width], device=device), keys))
    packed = torch.tensor([ids, positions, slots], device=device)
    logits_of = torch.tensor(outputs, dtype=torch.long, device=device)
    active = None if policy.is_full else np.searchsorted(skip_positions, policy.until).tolist()
    return TokenBatch(packed[0], packed[1], packed[2], groups, logits_of, active)


def group_key(chunk: Chunk) -> tuple[int, int, int]:
    """(generated position, tokens, key positions read): depends on nothing but the row itself.

    A chunk is either prompt or one generated token, so its tokens share a depth. Sorted, the deepest come first.
    """
    skip_position = chunk.sequence.skip_position(chunk.start)
    return skip_position, chunk.stop - chunk.start, key_blocks(chunk.stop)


def _draw(row: Sequence) -> Draw:
    seen = row.tokens(0, row.length) if row.params.repetition_penalty != 1 else ()
    chance = uniform(row.prompt.key, row.sample, len(row.generated)) if row.params.temperature else 0.0
    return Draw(row.params, chance, seen)
