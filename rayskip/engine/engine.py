"""The engine: one replica's model, cache and scheduler behind add, step and run.

Does not know files, shards or Ray. Not thread-safe: one thread adds and steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams
from rayskip.data.records import FinishReason, Generation, Prompt
from rayskip.data.tokenizer import load_tokenizer
from rayskip.decode.randomness import uniform
from rayskip.decode.sampling import Choice, Draw, choose
from rayskip.decode.stopping import Stopper
from rayskip.engine.scheduler import Chunk, Scheduler, StepPlan
from rayskip.engine.sequence import Sequence
from rayskip.engine.sizes import Sizes, choose_sizes
from rayskip.errors import RowError
from rayskip.model.checkpoint import load, resolve
from rayskip.model.attention import is_batch_invariant
from rayskip.model.forward import Decoder, Group, TokenBatch
from rayskip.model.kv_cache import key_blocks
from rayskip.stats import Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """All samples of one request, in sample order."""

    request_id: int
    generations: list[Generation]


@dataclass
class _Request:
    prompt: Prompt
    samples: dict[int, Generation] = field(default_factory=dict)


class Engine:
    """Generates for many prompts at once, by continuous batching.

    Use `generate` for a list of prompts, or `add` and `step` (or `run`) to feed rows while others generate.
    A row's tokens do not depend on what else runs: see `info["batch_invariant"]`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        engine: EngineConfig = EngineConfig(),
        decode: DecodeConfig = DecodeConfig(),
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.decode_config = decode
        longest = decoder.spec.max_positions
        self.max_model_len = min(engine.max_model_len or longest, longest)
        self.sizes: Sizes = choose_sizes(decoder, engine)
        self._scheduler = Scheduler(self.sizes.batch_rows, self.sizes.batch_tokens, self.sizes.cache_positions)
        self._cache = decoder.new_cache()
        self._stopper = Stopper(tokenizer, decoder.spec.eos_token_ids)
        self._requests: dict[int, _Request] = {}
        self._next_id = 0
        self._stats = Stats()

    @classmethod
    def load(
        cls,
        model: ModelConfig | str,
        engine: EngineConfig = EngineConfig(),
        decode: DecodeConfig = DecodeConfig(),
        device: str | None = None,
    ) -> Engine:
        """Load a checkpoint (embedded default, local folder or hub id) onto `device` (CUDA when there is one).

        Raises ModelError when the checkpoint is missing, unsafe or of an unknown family.
        """
        model = ModelConfig(path=model) if isinstance(model, str) else model
        folder = resolve(model.path, model.revision)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        decoder = Decoder(*load(folder, getattr(torch, model.dtype), place))
        return cls(decoder, _tokenizer(folder), engine, decode)

    @property
    def info(self) -> dict[str, Any]:
        """Facts of the running engine, for reports: device, dtype, sizes, what batch invariance rests on."""
        return {
            "device": str(self.decoder.device),
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "max_model_len": self.max_model_len,
            **dataclasses.asdict(self.sizes),
            "row_tile": self.decoder.tile,
            "batch_invariant": is_batch_invariant(self.decoder.spec, self.decoder.dtype, self.decoder.device),
        }

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def take_stats(self) -> Stats:
        """Counters since the last call."""
        stats, self._stats = self._stats, Stats()
        return stats

    def add(self, prompt: Prompt) -> int:
        """Queue a row; returns its request id. Raises RowError when it has no token or no room to generate."""
        size = len(prompt.token_ids)
        if size == 0:
            raise RowError("empty_prompt", "the prompt has no tokens")
        if size >= self.max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {size} tokens; with one to generate the context holds {self.max_model_len - 1}",
            )
        if max(prompt.token_ids) >= self.decoder.spec.vocab or min(prompt.token_ids) < 0:
            raise RowError("bad_token_id", f"token ids must be in [0, {self.decoder.spec.vocab})")
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._requests[request_id] = _Request(prompt)
        reserved = key_blocks(min(size + prompt.params.max_tokens, self.max_model_len))
        for sample in range(prompt.params.n):
            self._scheduler.waiting.append(Sequence(request_id, prompt, sample, reserved))
        return request_id

    def step(self) -> list[Completion]:
        """Run one forward: one token for every decoding row, and prefill. Returns the requests that finished."""
        plan = self._scheduler.schedule()
        choices = self._forward(plan)
        with self._stats.timed("sample"):
            finished = [row for chunk, choice in choices if (row := self._advance(chunk, choice))]
            self._scheduler.retire({row.slot for row in finished})
            return [done for row in finished if (done := self._complete(row))]

    def run(self) -> Iterator[Completion]:
        """Step until nothing is left."""
        while self.has_work:
            yield from self.step()

    def generate(
        self,
        prompts: Seq[str | Seq[int] | Seq[dict[str, str]]],
        params: SamplingParams | Seq[SamplingParams] = SamplingParams(),
    ) -> list[list[Generation]]:
        """Generations of each prompt (text, token ids or chat messages), one per sample, in prompt order.

        A prompt that cannot run yields one generation with finish_reason "error".
        """
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        results: dict[int, list[Generation]] = {}
        places = {}
        for index, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
            key = int.from_bytes(hashlib.blake2b(f"{own.seed}:{index}".encode(), digest_size=8).digest())
            try:
                places[self.add(Prompt(index, self._token_ids(prompt), own, key))] = index
            except RowError as error:
                results[index] = [Generation(index, 0, "error", error_type=error.kind, error_message=str(error))]
        for done in self.run():
            results[places[done.request_id]] = done.generations
        return [results[index] for index in range(len(prompts))]

    def _token_ids(self, prompt: str | Seq[int] | Seq[dict[str, str]]) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return [int(token) for token in prompt]  # type: ignore[call-overload]
        if self.tokenizer is None:
            raise RowError("no_tokenizer", "the model's folder has no tokenizer; give token ids")
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        ids = self.tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in ids]

    def _forward(self, plan: StepPlan) -> list[tuple[Chunk, Choice]]:
        """Run the plan's tokens and choose the next token of every row whose newest token ran."""
        phase = "decode" if plan.decoding == len(plan.chunks) else "prefill"
        start = time.perf_counter()
        self._reserve()
        for copy in plan.copies:
            self._cache.copy(copy.source, copy.target, copy.length)
        batch = token_batch(plan, self.decoder.device)
        logits = self.decoder.forward(batch, self._cache)
        last = [chunk for chunk in plan.chunks if chunk.last]
        middle = time.perf_counter()
        choices = choose(logits, [_draw(chunk.sequence) for chunk in last]) if last else []
        end = time.perf_counter()
        self._count(plan, len(batch.token_ids), phase, middle - start, end - middle)
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.stop
        return list(zip(last, choices, strict=True))

    def _reserve(self) -> None:
        """Room for a full batch of rows as long as the longest in flight, so that the cache seldom grows."""
        length = max(row.reserved for row in self._scheduler.running)
        fitting = max(self.sizes.cache_positions // length, 1)
        self._cache.reserve(max(len(self._scheduler.running), min(self.sizes.batch_rows, fitting)), length)

    def _count(self, plan: StepPlan, tokens: int, phase: str, forward_s: float, sample_s: float) -> None:
        stats = self._stats
        stats.steps += 1
        stats.step_rows += len(plan.chunks)
        stats.step_slots += self.sizes.batch_rows
        stats.layer_tokens += tokens * len(self.decoder.layers)
        if self.decoder.tile:
            stats.padding_tokens += -tokens % self.decoder.tile
        stats.prefix_tokens += plan.reused
        stats.completion_tokens += sum(chunk.last for chunk in plan.chunks)
        stats.seconds[phase] += forward_s
        stats.seconds["sample"] += sample_s

    def _advance(self, chunk: Chunk, choice: Choice) -> Sequence | None:
        """Append the chosen token; the sequence itself when it has ended."""
        row = chunk.sequence
        if choice.token_id is None:
            self._finish(row, "error", ("non_finite_logits", "the model's logits are not finite"))
            return row
        row.generated.append(choice.token_id)
        if choice.logprob is not None:
            row.logprobs.append(choice.logprob)
        reason = self._stopper.reason(row.generated, row.params, self.max_model_len - row.length)
        if reason is None:
            return None
        self._finish(row, reason)
        return row

    def _finish(self, row: Sequence, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        self._requests[row.request_id].samples[row.sample] = Generation(
            row_index=row.prompt.row_index,
            sample_index=row.sample,
            finish_reason=reason,
            text=None if error else self._stopper.text(row.generated, row.params),
            token_ids=row.generated,
            prompt_tokens=len(row.prompt.token_ids),
            completion_tokens=len(row.generated),
            logprobs=row.logprobs if row.params.logprobs is not None else None,
            error_type=error[0] if error else None,
            error_message=error[1] if error else None,
        )

    def _complete(self, row: Sequence) -> Completion | None:
        """The request's completion once its last sample has ended."""
        request = self._requests[row.request_id]
        if len(request.samples) < request.prompt.params.n:
            return None
        del self._requests[row.request_id]
        return Completion(row.request_id, [request.samples[sample] for sample in sorted(request.samples)])


def token_batch(plan: StepPlan, device: torch.device) -> TokenBatch:
    """A plan's chunks as packed tensors: the decoding rows are one group, every prefilling row its own."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    groups: list[Group] = []
    if plan.decoding:
        longest = max(chunk.stop for chunk in plan.chunks[: plan.decoding])
        groups.append(Group(0, plan.decoding, 1, 0, key_blocks(longest)))
    for number, chunk in enumerate(plan.chunks):
        if number >= plan.decoding:
            width = chunk.stop - chunk.start
            groups.append(Group(len(ids), 1, width, chunk.sequence.slot, key_blocks(chunk.stop)))
        ids += chunk.sequence.tokens(chunk.start, chunk.stop)
        positions += range(chunk.start, chunk.stop)
        slots += [chunk.sequence.slot] * (chunk.stop - chunk.start)
        if chunk.last:
            outputs.append(len(ids) - 1)
    packed = torch.tensor([ids, positions, slots], device=device)
    return TokenBatch(packed[0], packed[1], packed[2], groups, torch.tensor(outputs, dtype=torch.long, device=device))


def _draw(row: Sequence) -> Draw:
    seen = row.tokens(0, row.length) if row.params.repetition_penalty != 1 else ()
    chance = uniform(row.prompt.key, row.sample, len(row.generated)) if row.params.temperature else 0.0
    return Draw(row.params, chance, seen)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer; None where it has none (token ids in, token ids out)."""
    has_one = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    return load_tokenizer(folder) if has_one else None
