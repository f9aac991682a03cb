"""A worker: one thread's share of the engine. Its own rows and block table; the decoder and the pages are shared.

On CPU a replica runs one worker per core, each on one thread: the many small operations of a step then need no
barrier between threads, which costs more than they do. A step that runs alone takes all threads: while a prefix is
computed that every row waits for, and when the last rows end. On a GPU there is one worker.

On a GPU, without a drafter, a step is planned and sent off while the one before still runs: which rows go on is
known, but for those that end early, and the token that each goes on from is where the device puts it.

Does not know requests, text or how rows are handed out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch

from rayskip.decode.batch import Chunk, HostBatch, host_batch, span_key, with_drafts
from rayskip.decode.draft import Draft
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.sampling import Choice, Chosen, Draw, sample
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict, draw, scored, verify
from rayskip.engine.scheduler import Scheduler, Shared, StepPlan, layer_order
from rayskip.engine.sizes import Sizes
from rayskip.model.backends.base import HeadOutput
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import TokenBatch
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
class Packed:
    """A step's tokens for the forward, as their rows stand when it is made: later changes to those don't matter.

    chunks: of the batch, in its order. places: (row, node of its draft, or NEWEST) of each of R outputs. draws [R]:
    what their tokens depend on besides logits. unknown: tokens of the batch that are PENDING -> which output of the
    worker's step before gives them.
    """

    chunks: list[Chunk]
    batch: HostBatch
    places: list[tuple[Sequence, int]]
    draws: list[Draw]
    unknown: dict[int, int]


@dataclass(frozen=True)
class Step:
    """What a worker is to run. packed: None where drafts come first. follows: whether the next one may be planned
    before this one's tokens are known. threads: that it takes."""

    plan: StepPlan
    packed: Packed | None
    follows: bool
    threads: int


@dataclass(frozen=True)
class StepResult:
    """choices: what follows every row whose newest token ran, once the device is done. active: tokens that each
    layer ran. seconds: of drafts and forward, and of choosing, once the device is done; masking: of the former, of
    finding what constraints allow."""

    choices: Callable[[], dict[Sequence, list[Choice]]]
    decoded: list[Decoded]
    active: list[int]
    seconds: Callable[[], list[float]]
    masking: float


class Worker:
    """Schedules and runs steps. `next` and what `scheduler` has are bookkeeping, for the engine's thread; `run` is
    the tensor work, for the worker's own."""

    def __init__(
        self,
        decoder: Decoder,
        sizes: Sizes,
        policy: SkipPolicy,
        drafter: Drafter,
        cache: KVCache,
        shared: Shared,
    ) -> None:
        self._decoder = decoder
        self._policy = policy
        self._sizes = sizes
        self._drafter = drafter
        self._cache = cache
        self._ahead = sizes.plans_ahead and not drafter.reads_tokens
        self._outputs: dict[Sequence, int] = {}
        """Of the newest step that was packed ahead: row -> index in what it chooses."""
        self._chosen: torch.Tensor | None = None
        """What the newest step that ran chose, on the device."""
        self._failed = False
        self._masking = 0.0
        """Seconds, of the step that is made."""
        self._thread = ThreadPoolExecutor(1, "worker")
        self._threads = 0
        """That the worker's own has been told to use."""
        self._position_bytes = KVCache.bytes_per_position(decoder.spec, 1, decoder.backend.dtype)
        self._page_bytes = cache.layout.page * self._position_bytes
        layers = layer_order(policy, cache.layers - decoder.depth)
        self.scheduler = Scheduler(
            sizes.batch_rows, sizes.batch_tokens, shared, layers, policy, sizes.cohort, drafter.most_tokens
        )

    @torch.inference_mode()
    def next(self, share: int) -> Step | None:
        """The next step, if there is something to run. Where steps are planned ahead its rows count as if it had
        run; else they do from `settle` on.

        share: rows past which none is taken from the queue.
        """
        plan = self.scheduler.schedule(share)
        if not plan.chunks:
            return None
        packed, follows = None, False
        if self._ahead:
            self._constrain(plan)
            packed = self._pack(with_drafts(plan.chunks))
            self._outputs = {
                row: index for index, (row, _) in enumerate(packed.places) if not row.prompt.candidates
            }
            for row in self._outputs:
                row.expect()
            follows = not any(row.params.reads_tokens or row.matcher for row in self._outputs)
            self.scheduler.settle(plan)
        return Step(plan, packed, follows, self._sizes.threads_per_worker)

    def settle(self, step: Step) -> None:
        """The step has run."""
        if not self._ahead:
            self.scheduler.settle(step.plan)

    def start(self, step: Step) -> Future[StepResult]:
        """Run a step, on the worker's own thread, after those before it, if none of those failed."""
        return self._thread.submit(self._run_unless_failed, step)

    def _run_unless_failed(self, step: Step) -> StepResult:
        if self._failed:
            raise RuntimeError("a step before this one failed, and left nothing to go on from")
        self._failed = True  # unless it comes back, whatever it raises
        result = self.run(step)
        self._failed = False
        return result

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Drafts, then one forward over the plan's tokens and the drafts; chooses the tokens that follow each row
        whose newest token ran."""
        if self._threads != step.threads:
            self._decoder.backend.use_threads(step.threads)
            self._threads = step.threads
        watch, plan, packed, states = self._decoder.backend.stopwatch(), step.plan, step.packed, None
        self._cache.allocate(plan.pages)
        self._cache.clear(plan.clears)
        self._cache.assign(plan.assignments)
        for copy in plan.copies:
            self._cache.copy(copy.pages, copy.count)
        if packed is None:
            states = self._draft(plan)
            packed = self._pack(with_drafts(plan.chunks))
        batch, places = packed.batch.to(self._decoder.backend), packed.places
        if packed.unknown:
            if self._chosen is None:
                raise RuntimeError("tokens are pending that no step has chosen")
            known = self._decoder.backend.tensor([[*packed.unknown], [*packed.unknown.values()]])
            batch.token_ids[known[0]] = self._chosen[known[1]]
        hidden = self._hidden(packed.chunks, batch, states)
        output = self._head_output(hidden, packed.draws)
        watch.lap()
        chosen = sample(output, packed.draws)
        self._chosen = chosen.tokens
        if step.packed is not None:
            decoded = [
                Decoded(chunk.sequence, chunk.start, Draft(), []) for chunk in plan.chunks if chunk.generated
            ]
            choices = partial(_each, places, chosen)
        else:
            said = chosen.choices()
            verdicts = self._verified(places, said, hidden)
            decoded = [Decoded(row, row.length - 1, row.draft, verdicts[row].path) for row in _decoding(plan)]
            for row in _decoding(plan):
                row.draft = Draft()
            found = {row: verdict.choices for row, verdict in verdicts.items()}
            choices = partial(dict, found | _scored(said, places))
        watch.lap()
        active = batch.active or [len(batch.token_ids)] * self._decoder.depth
        masking, self._masking = self._masking, 0.0
        return StepResult(choices, decoded, active, watch.seconds, masking)

    def _draft(self, plan: StepPlan) -> States | None:
        """Give the plan's rows their drafts; what verification need not compute again."""
        decoding = _decoding(plan)
        room = self.scheduler.max_tokens - sum(chunk.stop - chunk.start for chunk in plan.chunks)
        self._constrain(plan)
        states = self._drafter.draft(plan.chunks, decoding if room else [], self._cache)
        began = time.perf_counter()
        for row in decoding:
            if row.matcher is not None:
                row.matcher.prune(row.draft)
        self._masking += time.perf_counter() - began
        self._fit(decoding, room)
        return states

    def _constrain(self, plan: StepPlan) -> None:
        """Find what may follow in rows with a grammar; what must, where they decode, is their draft's beginning."""
        began = time.perf_counter()
        for chunk in plan.chunks:
            row = chunk.sequence
            if row.matcher is not None and chunk.last:
                drafts = chunk.generated and not self._ahead
                depth, tokens = (row.draft_room, row.draft_places) if drafts else (0, 0)
                row.matcher.follow(row.generated, row.draft, depth, tokens)
        self._masking += time.perf_counter() - began

    def _pack(self, chunks: Seq[Chunk]) -> Packed:
        ordered = sorted(chunks, key=span_key)
        places = [(chunk.sequence, chunk.stop - 1 - chunk.sequence.length) for chunk in ordered if chunk.last]
        draws = [draw(row, node) for row, node in places]
        ends = accumulate(chunk.stop - chunk.start for chunk in ordered)
        pending = {
            end - 1: self._outputs[chunk.sequence]
            for end, chunk in zip(ends, ordered, strict=True)
            if chunk.last and chunk.sequence.pending
        }
        return Packed(ordered, host_batch(ordered, self._policy), places, draws, pending)

    def _verified(
        self, places: Seq[tuple[Sequence, int]], choices: Seq[Choice], hidden: torch.Tensor
    ) -> dict[Sequence, Verdict]:
        """What became of the drafts; the cache keeps those that hold."""
        verdicts = verify(choices, places)
        if poisoned := [
            row for row, verdict in verdicts.items() if row.draft and verdict.choices[-1].token_id is None
        ]:
            hidden = self._run_without_drafts(poisoned, verdicts, hidden)
        # of those that end, pages will be cleared
        going = {row: own for row, own in verdicts.items() if own.choices[-1].token_id is not None}
        self._cache.move(
            [
                (row.table_row, row.length + node, row.length + at)
                for row, verdict in going.items()
                for at, node in enumerate(verdict.path)
                if at != node
            ]
        )
        for row, verdict in going.items():
            if None in verdict.guesses:
                self._cache.clear_row(row.table_row, row.length + verdict.accepted, row.places)
        self._drafter.observe(verdicts, hidden)
        return verdicts

    def halve(self) -> None:
        """After a step that memory did not suffice for, while nothing runs: see Scheduler.halve."""
        self.scheduler.halve()
        self._failed, self._chosen, self._outputs = False, None, {}
        self._drafter.release()
        self._cache.allocate(0)
        self._decoder.backend.release_memory()

    def _run_without_drafts(
        self, rows: Seq[Sequence], verdicts: dict[Sequence, Verdict], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Run the rows' newest tokens again, alone: masked keys are read too, and 0 times the NaN of a draft that
        the model would never choose is NaN. New verdicts replace theirs; returns `hidden` with the new states."""
        for row in rows:
            row.draft = Draft()
            row.draft_cached = min(row.draft_cached, row.length - 1)
            self._cache.clear_row(row.table_row, row.length - 1, row.places)
        packed = self._pack([Chunk(row, row.length - 1, row.length) for row in rows])
        again = self._hidden(packed.chunks, packed.batch.to(self._decoder.backend), None)
        chosen = sample(self._head_output(again, packed.draws), packed.draws)
        found = verify(chosen.choices(), packed.places)
        for row, verdict in found.items():
            verdicts[row] = replace(verdict, place=len(hidden) + verdict.place)
        return torch.cat([hidden, again])

    def _head_output(self, hidden: torch.Tensor, draws: Seq[Draw]) -> HeadOutput:
        """What the model says of states [R, d], for the draws of their tokens."""
        full = [index for index, own in enumerate(draws) if own.needs_logits]
        return self._decoder.head_output(hidden, full)

    def _hidden(self, chunks: Seq[Chunk], batch: TokenBatch, states: States | None) -> torch.Tensor:
        """States [R, d] after the last layer of the batch's outputs; `states` is where a drafter already is."""
        decoder = self._decoder
        if states is None:
            return decoder.hidden(batch, self._cache)
        at = decoder.backend.tensor(
            [
                states.rows[chunk.sequence, place]
                for chunk in chunks
                for place in range(chunk.start, chunk.stop)
            ]
        )
        x = decoder.run_layers(states.x[at], batch, self._cache, states.layer, decoder.depth)
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
                self._cache.clear_row(row.table_row, row.length + most, row.places)

    def count(self, step: Step, result: StepResult, gained: Mapping[Sequence, int]) -> Stats:
        """What a step ran and what came of it. gained: tokens that each row got: where one ended inside its draft,
        fewer than verification allowed; none where it had ended before."""
        plan, rule = step.plan, self._decoder.backend.row_rule
        got = {ran.row: gained[ran.row] for ran in result.decoded}
        newest: Counter[int] = Counter()
        drafted_by: Counter[str] = Counter()
        accepted_by: Counter[str] = Counter()
        every = [self._policy.depth(ran.row.skip_position(ran.position)) for ran in result.decoded]
        newest.update(depth for depth, count in zip(every, got.values(), strict=True) if count)
        useful = sum(depth * rows for depth, rows in newest.items())
        in_vain = sum(every) - useful
        for ran in result.decoded:
            if not ran.draft:
                continue
            depths = [
                self._policy.depth(ran.row.skip_position(ran.position + offset))
                for offset in ran.draft.depths
            ]
            held = ran.path[: max(got[ran.row] - 1, 0)]
            good = sum(depths[node] for node in held)
            useful += good
            in_vain += sum(depths) - good
            drafted_by.update(ran.draft.drafters)
            accepted_by.update(ran.draft.drafters[node] for node in held)
        tokens = sum(got.values())
        steady, seconds = not plan.prefills, result.seconds()
        phases = {"decode" if steady else "prefill": seconds[0] - result.masking, "sample": seconds[1]}
        if result.masking:
            phases["constrain"] = result.masking
        return Stats(
            steps=1,
            step_rows=len(plan.chunks),
            step_slots=self.scheduler.max_rows,
            prefix_tokens=plan.reused,
            verify_rows=sum(map(bool, got.values())),
            drafted=drafted_by.total(),
            drafted_by=drafted_by,
            accepted_by=accepted_by,
            accepted_lengths=Counter(str(count - 1) for count in got.values() if count),
            decode_tokens=tokens,
            steady_tokens=tokens if steady else 0,
            steady_seconds=sum(seconds) * step.threads / self._sizes.threads_per_worker if steady else 0.0,
            decode_layer_tokens=useful,
            prompt_layer_tokens=sum(result.active) - useful - in_vain,
            draft_layer_tokens=in_vain,
            padding_layer_tokens=sum(rule.padding(count) for count in result.active if count),
            cohort_rows=max(newest.values(), default=0),
            kv_bytes_saved=plan.spared * self._page_bytes,
            kv_bytes_held=round(plan.held * self._page_bytes),
            kv_bytes_filled=round(plan.held * self._page_bytes - plan.unfilled * self._position_bytes),
            seconds=phases,
        )


def _decoding(plan: StepPlan) -> list[Sequence]:
    return [chunk.sequence for chunk in plan.chunks if chunk.generated]


def _each(places: Seq[tuple[Sequence, int]], chosen: Chosen) -> dict[Sequence, list[Choice]]:
    choices = chosen.choices()
    found = {row: [choice] for (row, _), choice in zip(places, choices, strict=True)}
    return found | _scored(choices, places)


def _scored(choices: Seq[Choice], places: Seq[tuple[Sequence, int]]) -> dict[Sequence, list[Choice]]:
    return {row: [choice] for row, choice in scored(choices, places).items()}
