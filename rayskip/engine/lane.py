"""A lane: one thread's share of the engine. Its own rows and cache; the decoder is shared.

On CPU a replica runs one lane per core, each on one thread: the many small operations of a step then need no
barrier between threads, which costs more than they do. On a GPU there is one lane.

Does not know requests, text or how rows are handed out.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from rayskip.decode.batch import Chunk, draft_chunks, group_key, token_batch
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.sampling import Choice
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import verify
from rayskip.engine.scheduler import Scheduler, StepPlan
from rayskip.engine.sizes import Sizes
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import TokenBatch
from rayskip.skip import SkipPolicy
from rayskip.stats import Stats


@dataclass(frozen=True)
class StepResult:
    """What a step chose, for every row whose newest token ran, and what it cost."""

    choices: dict[Sequence, list[Choice]]
    stats: Stats


class Lane:
    """Schedules and runs steps. `plan` and `retire` are bookkeeping, for the engine's thread; `run` is the
    tensor work, for the lane's own."""

    def __init__(
        self,
        decoder: Decoder,
        sizes: Sizes,
        policy: SkipPolicy,
        drafter: Drafter,
        cache: KVCache,
        waiting: deque[Sequence],
    ) -> None:
        self._decoder = decoder
        self._policy = policy
        self._sizes = sizes
        self._drafter = drafter
        self._cache = cache
        self._layer_kv_bytes = KVCache.bytes_per_position(decoder.spec, 1, decoder.dtype)
        self.scheduler = Scheduler(
            sizes.batch_rows, sizes.batch_tokens, sizes.cache_positions, sizes.cohort, waiting
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Drafts, then one forward over the plan's tokens and the drafts; chooses the tokens that follow each row
        whose newest token ran."""
        start = time.perf_counter()
        if plan.resize is not None:
            self._cache.resize(plan.resize.slots, plan.resize.length, plan.resize.kept)
        for copy in plan.copies:
            self._cache.copy(copy.source, copy.target, copy.length)
        decoding = [chunk.sequence for chunk in plan.chunks if chunk.generated]
        states = self._drafter.draft(plan.chunks, decoding, self._cache)
        drafts = [chunk for row in decoding for chunk in draft_chunks(row)]
        chunks = sorted([*plan.chunks, *drafts], key=group_key)
        batch = token_batch(chunks, self._policy, self._decoder.device)
        hidden = self._hidden(chunks, batch, states)
        logits = self._decoder.logits(hidden)
        middle = time.perf_counter()
        places = [(chunk.sequence, chunk.stop - chunk.sequence.length) for chunk in chunks if chunk.last]
        verdicts = verify(logits, places)
        for row, verdict in verdicts.items():
            if verdict.choices[-1].token_id is None:
                self._cache.clear(row.slot)
        stats = self._count(plan, batch, {row: len(verdicts[row].choices) for row in decoding})
        self._drafter.observe(verdicts, hidden)
        for row in decoding:
            row.draft = []
        stats.seconds["prefill" if plan.prefills else "decode"] = middle - start
        stats.seconds["sample"] = time.perf_counter() - middle
        return StepResult({row: verdict.choices for row, verdict in verdicts.items()}, stats)

    def _hidden(self, chunks: Seq[Chunk], batch: TokenBatch, states: States | None) -> torch.Tensor:
        """States [R, d] after the last layer of the batch's outputs; `states` is where a drafter already is."""
        decoder, first = self._decoder, 0
        if states is None:
            x = decoder.embed(batch)
        else:
            at = [
                states.rows[chunk.sequence, at] for chunk in chunks for at in range(chunk.start, chunk.stop)
            ]
            x, first = states.x[at], states.layer
        return decoder.run_layers(x, batch, self._cache, first, len(decoder.layers))[batch.outputs]

    def _count(self, plan: StepPlan, batch: TokenBatch, gained: dict[Sequence, int]) -> Stats:
        """gained: tokens that each decoding row got; so many of its tokens ran for good, from its newest on."""
        layers, rule = len(self._decoder.layers), self._decoder.row_rule
        active = batch.active or [len(batch.token_ids)] * layers
        newest = [self._policy.depth(row.skip_position(row.length - 1)) for row in gained]
        useful = sum(
            self._policy.depth(row.skip_position(row.length - 1 + offset))
            for row, count in gained.items()
            for offset in range(count)
        )
        in_vain = sum(
            self._policy.depth(row.skip_position(row.length - 1 + offset))
            for row, count in gained.items()
            for offset in range(count, len(row.draft) + 1)
        )
        tokens = sum(gained.values())
        return Stats(
            steps=1,
            step_rows=len(plan.chunks),
            step_slots=self._sizes.batch_rows,
            prefix_tokens=plan.reused,
            verify_rows=len(gained),
            drafted=sum(len(row.draft) for row in gained),
            drafted_by=_sum_by_drafter(gained, lambda row: len(row.draft)),
            accepted_by=_sum_by_drafter(gained, lambda row: gained[row] - 1),
            accepted_lengths=Counter(str(count - 1) for count in gained.values()),
            decode_tokens=tokens,
            steady_tokens=0 if plan.prefills else tokens,
            decode_layer_tokens=useful,
            prompt_layer_tokens=sum(active) - useful - in_vain,
            draft_layer_tokens=in_vain,
            padding_layer_tokens=sum(rule.padding(count) for count in active if count),
            cohort_rows=max(Counter(newest).values(), default=0),
            kv_bytes_saved=(layers * tokens - useful) * self._layer_kv_bytes,
        )


def _sum_by_drafter(rows: Iterable[Sequence], count: Callable[[Sequence], int]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for row in rows:
        if row.draft:
            sums[row.drafter] += count(row)
    return sums
