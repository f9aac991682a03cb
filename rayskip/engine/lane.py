"""A lane: one thread's share of the engine. Its own rows and cache; the decoder is shared.

On CPU a replica runs one lane per core, each on one thread: the many small operations of a step then need no
barrier between threads, which costs more than they do. On a GPU there is one lane.

Does not know requests, text or how rows are handed out.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from rayskip.decode.batch import Chunk, group_key, token_batch, with_drafts
from rayskip.decode.draft import NEWEST, Draft
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.sampling import Choice, needs_logits
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict, verify
from rayskip.engine.scheduler import Scheduler, StepPlan
from rayskip.engine.sizes import Sizes
from rayskip.model.forward import Decoder
from rayskip.model.kv_cache import KVCache
from rayskip.model.ops import TokenBatch
from rayskip.model.scores import Scores
from rayskip.skip import SkipPolicy
from rayskip.stats import Stats


@dataclass(frozen=True)
class Decoded:
    """A decoding row in a step: position of its newest token, the draft that ran behind it, and its nodes that
    hold."""

    row: Sequence
    position: int
    draft: Draft
    path: list[int]


@dataclass(frozen=True)
class StepResult:
    """choices: what follows every row whose newest token ran. active: tokens that each layer ran. seconds: of
    drafts and forward, and of choosing."""

    choices: dict[Sequence, list[Choice]]
    decoded: list[Decoded]
    active: list[int]
    seconds: tuple[float, float]


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
        room = self.scheduler.max_tokens - sum(chunk.stop - chunk.start for chunk in plan.chunks)
        states = self._drafter.draft(plan.chunks, decoding if room else [], self._cache)
        self._fit(decoding, room)
        chunks = sorted(with_drafts(plan.chunks), key=group_key)
        batch = token_batch(chunks, self._policy, self._decoder.device)
        hidden = self._hidden(chunks, batch, states)
        places = [(chunk.sequence, chunk.stop - 1 - chunk.sequence.length) for chunk in chunks if chunk.last]
        scores = self._scores(hidden, places)
        middle = time.perf_counter()
        verdicts = verify(scores, places)
        if poisoned := [
            row for row, verdict in verdicts.items() if row.draft and verdict.choices[-1].token_id is None
        ]:
            hidden = self._run_without_drafts(poisoned, verdicts, hidden)
        for row, verdict in verdicts.items():
            if verdict.choices[-1].token_id is None:
                self._cache.clear(row.slot)
                continue
            if verdict.path != list(range(verdict.accepted)):
                self._cache.move(row.slot, [row.length + node for node in verdict.path], row.length)
            if None in verdict.guesses:
                self._cache.clear(row.slot, row.length + verdict.accepted)
        self._drafter.observe(verdicts, hidden)
        decoded = [Decoded(row, row.length - 1, row.draft, verdicts[row].path) for row in decoding]
        for row in decoding:
            row.draft = Draft()
        return StepResult(
            {row: verdict.choices for row, verdict in verdicts.items()},
            decoded,
            batch.active or [len(batch.token_ids)] * len(self._decoder.layers),
            (middle - start, time.perf_counter() - middle),
        )

    def halve(self) -> list[Sequence] | None:
        """After a step that memory did not suffice for: see Scheduler.halve."""
        given_up = self.scheduler.halve()
        if given_up is not None:
            self._drafter.release()
            self._cache.resize(0, 0)
            if self._decoder.device.type == "cuda":
                torch.cuda.empty_cache()  # what was free in pieces
        return given_up

    def _run_without_drafts(
        self, rows: Seq[Sequence], verdicts: dict[Sequence, Verdict], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Run the rows' newest tokens again, alone: masked keys are read too, and 0 times the NaN of a draft that
        the model would never choose is NaN. New verdicts replace theirs; returns `hidden` with the new states."""
        for row in rows:
            row.draft = Draft()
            row.draft_cached = min(row.draft_cached, row.length - 1)
            self._cache.clear(row.slot, row.length - 1)
        chunks = sorted((Chunk(row, row.length - 1, row.length) for row in rows), key=group_key)
        again = self._hidden(chunks, token_batch(chunks, self._policy, self._decoder.device), None)
        places = [(chunk.sequence, NEWEST) for chunk in chunks]
        found = verify(self._scores(again, places), places)
        for row, verdict in found.items():
            verdicts[row] = replace(verdict, place=len(hidden) + verdict.place)
        return torch.cat([hidden, again])

    def _scores(self, hidden: torch.Tensor, places: Seq[tuple[Sequence, int]]) -> Scores:
        """What the model says of states [R, d], those of `places`."""
        full = [index for index, (row, _) in enumerate(places) if needs_logits(row.params)]
        return self._decoder.scores(hidden, full)

    def _hidden(self, chunks: Seq[Chunk], batch: TokenBatch, states: States | None) -> torch.Tensor:
        """States [R, d] after the last layer of the batch's outputs; `states` is where a drafter already is."""
        decoder = self._decoder
        if states is None:
            return decoder.hidden(batch, self._cache)
        at = [
            states.rows[chunk.sequence, place] for chunk in chunks for place in range(chunk.start, chunk.stop)
        ]
        x = decoder.run_layers(states.x[at], batch, self._cache, states.layer, len(decoder.layers))
        return x[batch.outputs]

    def _fit(self, rows: Seq[Sequence], room: int) -> None:
        """Cut the longest drafts, to the tokens that a forward may hold beside the plan's own."""
        lengths = [len(row.draft) for row in rows]
        most = max(lengths, default=0)
        while sum(min(length, most) for length in lengths) > room:
            most -= 1
        for row in rows:
            if len(row.draft) > most:
                row.draft.cut(most)
                # where the drafter ran what is cut, its keys and values may not be finite
                self._cache.clear(row.slot, row.length + most)

    def count(self, plan: StepPlan, result: StepResult, gained: Mapping[Sequence, int]) -> Stats:
        """What a step ran and what came of it. gained: tokens that each row got; where one ended inside its draft,
        fewer than verification allowed."""
        layers, rule = len(self._decoder.layers), self._decoder.row_rule
        got = {
            ran.row: max(gained[ran.row], 1) for ran in result.decoded
        }  # at least the newest token ran for good
        useful = in_vain = 0
        newest: Counter[int] = Counter()
        drafted_by: Counter[str] = Counter()
        accepted_by: Counter[str] = Counter()
        for ran in result.decoded:
            depths = [
                self._policy.depth(ran.row.skip_position(ran.position + offset))
                for offset in (0, *ran.draft.depths)
            ]
            held = ran.path[: got[ran.row] - 1]
            good = depths[0] + sum(depths[1 + node] for node in held)
            newest[depths[0]] += 1
            useful += good
            in_vain += sum(depths) - good
            drafted_by.update(ran.draft.drafters)
            accepted_by.update(ran.draft.drafters[node] for node in held)
        tokens = sum(got.values())
        steady = not plan.prefills
        return Stats(
            steps=1,
            step_rows=len(plan.chunks),
            step_slots=self.scheduler.max_rows,
            prefix_tokens=plan.reused,
            verify_rows=len(result.decoded),
            drafted=drafted_by.total(),
            drafted_by=drafted_by,
            accepted_by=accepted_by,
            accepted_lengths=Counter(str(count - 1) for count in got.values()),
            decode_tokens=tokens,
            steady_tokens=tokens if steady else 0,
            steady_seconds=sum(result.seconds) if steady else 0.0,
            decode_layer_tokens=useful,
            prompt_layer_tokens=sum(result.active) - useful - in_vain,
            draft_layer_tokens=in_vain,
            padding_layer_tokens=sum(rule.padding(count) for count in result.active if count),
            cohort_rows=max(newest.values(), default=0),
            kv_bytes_saved=(layers * tokens - useful) * self._layer_kv_bytes,
            seconds={"decode" if steady else "prefill": result.seconds[0], "sample": result.seconds[1]},
        )
