"""The engine: one replica's decoder and workers behind add, step and run.

Does not know files, shards or Ray. Not thread-safe: one thread adds and steps; workers have their own.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams
from rayskip.config.file import as_section
from rayskip.data.records import Generation, Prompt, failed_row
from rayskip.data.tokenizer import Encoder, Tokenizer, load_tokenizer
from rayskip.decode.constraints import Grammars, Matcher
from rayskip.decode.drafters import load_drafters
from rayskip.decode.sequence import Sequence
from rayskip.decode.stopping import Stopper
from rayskip.engine.prompts import ParamsLike, PromptLike, Prompts, list_prompts, read_params
from rayskip.engine.requests import Completion, Requests
from rayskip.engine.scheduler import Shared
from rayskip.engine.sizes import choose_sizes
from rayskip.engine.worker import Step, StepResult, Worker
from rayskip.errors import ModelError, RowError
from rayskip.model.backends.choose import open_device, prepare_backend
from rayskip.model.backends.memory import free_bytes
from rayskip.model.cache.blocks import BlockPool
from rayskip.model.checkpoint import dequantised, load, resolve, trained_policy, weight_bytes
from rayskip.model.decoder import Decoder
from rayskip.model.invariance import is_batch_invariant
from rayskip.skip import skip_policy
from rayskip.stats import Stats

_log = logging.getLogger(__name__)


class Engine:
    """Generates for many prompts at once, by continuous batching.

    Use `generate` for a list of prompts, or `add` and `step` (or `run`) to feed rows while others generate, and
    `abort` to give some up.
    A row's tokens do not depend on what else runs, where `info["batch_invariant"]` says so.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        engine: EngineConfig | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        engine = engine or EngineConfig()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.decode = decode or DecodeConfig()
        longest = decoder.spec.max_positions
        self.max_model_len = min(engine.max_model_len or longest, longest)
        encoder = Encoder(tokenizer, self.max_model_len) if tokenizer is not None else None
        self._prompts = Prompts(encoder, decoder.spec.vocab, self.max_model_len)
        self._waiting: deque[Sequence] = deque()
        self.policy = skip_policy(self.decode.skip, decoder.depth)
        drafters = load_drafters(self.decode.draft, decoder, self.policy)
        self.sizes = choose_sizes(
            decoder, engine, self.policy, self.max_model_len, drafters.cache_layers, drafters.own_layers
        )
        cache = decoder.new_cache(drafters.cache_layers)
        self._shared = Shared(BlockPool(self.sizes.pages, cache.layout.page), self._waiting)
        self._workers = [
            Worker(
                decoder,
                self.sizes,
                self.policy,
                drafters.make(self.sizes.threads_per_worker, self.sizes.batch_rows),
                cache.with_own_table(),
                self._shared,
            )
            for _ in range(self.sizes.workers)
        ]
        self._steps: dict[Future[StepResult], tuple[Worker, Step]] = {}
        """In flight, each worker's in the order in which they run."""
        self._grammars = Grammars(tokenizer, decoder.spec.vocab, decoder.spec.eos_token_ids)
        stopper = Stopper(tokenizer, decoder.spec.eos_token_ids)
        self._requests = Requests(stopper, self.policy, decoder.depth, self.max_model_len)
        self._kept: list[Completion] = []
        """Of other callers' requests, that ended during a `generate`."""
        self._stats = Stats()
        self._warnings = list(decoder.backend.warnings)

    @classmethod
    def load(
        cls,
        model: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
        engine: EngineConfig | Mapping[str, Any] | None = None,
        decode: DecodeConfig | Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> Engine:
        """Load a checkpoint onto `device`, "cpu" or "cuda" (by default CUDA when there is one).

        model: "smollm2-135m-instruct", a local folder or a hub id; or, as engine and decode, a section of a job, as
        a dict or as its class: {"path": "my-model", "dtype": "float32"}, {"max_batch_rows": 64},
        {"draft": {"kind": "auto"}}.
        Raises ConfigError for a section with a fault, ModelError when the checkpoint is missing, unsafe, of an
        unknown family or too large for the GPU.
        """
        given = {"path": model} if isinstance(model, str | os.PathLike) else model
        model = as_section(ModelConfig, given, "model")
        engine = as_section(EngineConfig, engine or {}, "engine")
        decode = as_section(DecodeConfig, decode or {}, "decode")
        folder = resolve(model.path, model.revision)
        place = open_device(device)
        _check_room(folder, model.dtype, place)
        dtype = getattr(torch, model.dtype)
        with ThreadPoolExecutor() as aside:
            prepared = aside.submit(prepare_backend, dtype, place)
            weights = load(folder, dtype, place, model.adapter_folder)
            tokenizer = aside.submit(load_tokenizer, folder)  # not before: both may import transformers
            prepared.result()
            decoder = Decoder(*weights, folder=folder)
            loaded = cls(decoder, tokenizer.result(), engine, decode)
        if said := dequantised(folder, model.dtype):
            loaded._warnings.append(f"{model.path} is {said}")
        if (trained := trained_policy(model.adapter_folder or folder)) not in (None, loaded.policy.name):
            loaded._warnings.append(
                f"{model.adapter or model.path} was trained under the skip policy {trained} "
                f"and runs under {loaded.policy.name}; expect worse output"
            )
        for warning in loaded._warnings:
            _log.warning("%s", warning)
        return loaded

    @property
    def info(self) -> dict[str, Any]:
        """Facts of the running engine, for reports: the model and what runs it, device, dtype, sizes, what batch
        invariance rests on; warnings: what is slower or worse than it could be, and why."""
        backend = self.decoder.backend
        return {
            "model": self.decoder.spec.road,
            "device": str(backend.device),
            "dtype": str(backend.dtype).removeprefix("torch."),
            "ops": backend.name,
            "max_model_len": self.max_model_len,
            **dataclasses.asdict(self.sizes),
            "row_rule": dataclasses.asdict(backend.row_rule),
            "batch_invariant": self._batch_invariant,
            "skip": self.policy.name,
            "draft": self.decode.draft.kind,
            "warnings": list(self._warnings),
        }

    @cached_property
    def _batch_invariant(self) -> bool:
        return is_batch_invariant(self.decoder)

    @property
    def has_work(self) -> bool:
        return bool(self._kept or self._waiting or self._steps or self._shared.running)

    def take_stats(self) -> Stats:
        """Counters since the last call."""
        stats, self._stats = self._stats, Stats()
        return stats

    def add(
        self, prompt: Prompt | PromptLike, params: ParamsLike | None = None, full_depth: bool = False
    ) -> int:
        """Queue a row; returns its request id. Raises RowError when it has no token, no room to generate or a
        constraint that cannot be compiled.

        prompt: text, token ids or chat messages, sampled by `params`; or a job's `Prompt`, which has its own.
        full_depth: run every layer for it, whatever the engine's skip policy.
        """
        if not isinstance(prompt, Prompt):
            own = as_section(SamplingParams, params or {}, "params")
            prompt = self._prompts.make(self._requests.next_id, prompt, own)
        self._prompts.check(prompt)
        matchers = [self._matcher(prompt) for _ in range(prompt.samples)]
        request_id = self._requests.add(prompt)
        limit = min(len(prompt.token_ids) + prompt.params.max_tokens, self.max_model_len)
        eos = () if prompt.params.ignore_eos else self.decoder.spec.eos_token_ids
        ends = (*eos, *prompt.params.stop_token_ids)
        for sample, matcher in enumerate(matchers):
            self._waiting.append(
                Sequence(request_id, prompt, sample, limit, full_depth or self.policy.is_full, matcher, ends)
            )
        return request_id

    def _matcher(self, prompt: Prompt) -> Matcher | None:
        constraint = prompt.params.constraint
        return None if constraint is None or prompt.candidates else self._grammars.matcher(constraint)

    def abort(self, request_ids: Collection[int]) -> None:
        """Give requests up: they yield no completion. Rows that run leave the batch at their next token."""
        self._requests.give_up(request_ids)
        kept = [row for row in self._waiting if row.request_id in self._requests]
        self._waiting.clear()
        self._waiting.extend(kept)

    def step(self) -> list[Completion]:
        """Keep every worker stepping and wait for one to finish its forward; returns the requests that ended.

        Where memory does not suffice, every worker goes on with half its rows.
        """
        if self._kept:
            done, self._kept = self._kept, []
            return done
        self._start_steps()
        done = self._finished_steps()
        return done if self._requests else done + self.drain()  # what was sent off before the last row ended

    def drain(self) -> list[Completion]:
        """Wait for what runs, and start nothing; returns the requests that ended."""
        done = []
        while self._steps:
            done += self._finished_steps()
        return done

    def _finished_steps(self) -> list[Completion]:
        """Wait for a step, and collect those that have finished."""
        wait(self._steps, return_when=FIRST_COMPLETED)
        done: list[Completion] = []
        for future in [future for future in self._steps if future.done()]:
            if future not in self._steps:
                continue  # it came after one that failed
            worker, step = self._steps.pop(future)
            try:
                result = future.result()
                done += self._collect(worker, step, result)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._drop_steps()
                if all(worker.scheduler.smallest for worker in self._workers):
                    raise
                self._halve()
                rows = sum(worker.scheduler.max_rows for worker in self._workers)
                _log.warning("no memory for so many rows; on with %d (%s)", rows, error)
        return done

    def _halve(self) -> None:
        """Go on with half as many rows, tokens and pages: what runs begins anew, in an empty cache."""
        pool, given_up = self._shared.pool, self._shared.running
        pages = max(min(pool.pages, pool.held or pool.pages) // 2, self.sizes.least_pages)
        pool.reset(min(pages, pool.pages))
        for worker in self._workers:
            worker.halve()
        self._waiting.extendleft(row.anew() for row in reversed(given_up))
        self._take_back(given_up)
        self._shared.running = []

    def run(self) -> Iterator[Completion]:
        """Step until nothing is left."""
        while self.has_work:
            yield from self.step()

    def generate(
        self,
        prompts: Iterable[PromptLike],
        params: ParamsLike | Iterable[ParamsLike] | None = None,
        row_file: str = "",
        progress: bool = False,
    ) -> list[list[Generation]]:
        """Generate for many prompts at once: a list per prompt, in their order, of its `params.n` samples.

        prompts: each a text, token ids (a list, or a one-dimensional array of numpy or torch) or chat messages (a
        list of {role, content}, whose content may be a list of text parts). A text is encoded as it stands,
        messages by the model's chat template.
        params: for all, or a list with one for each; SamplingParams or a dict such as {"max_tokens": 64}.
        row_file: the file that the prompts are the first rows of, as a job's output names it. With temperature, a
        row's random numbers come from seed, file, place and sample, so these are then the job's.
        progress: show a bar, in a notebook too.

        A prompt that cannot run (empty, too long, a token id that the model lacks, messages that its template
        refuses) costs the others nothing: as in a job, its samples have finish_reason "error", error_type and
        error_message, and a warning is logged. What is wrong with the call is raised before anything runs:
        TypeError for an object that is no prompt, which names its place; ConfigError for params with a fault;
        ValueError for too many or too few of them; ModelError for messages where the model has no chat
        template.

        Requests that were added before run beside these; what ends of those, the next `step` returns.
        """
        listed = list_prompts(prompts)
        every = read_params(params, len(listed))

        def make(index: int) -> Prompt:
            return self._prompts.make(index, listed[index], every[index], row_file, f"prompt {index}")

        return self._answer(make, [own.n for own in every], progress)

    def score(
        self, prompts: Iterable[PromptLike], candidates: Seq[PromptLike], progress: bool = False
    ) -> list[Generation]:
        """How likely each of some candidates is to follow each of many prompts; nothing is generated.

        prompts: as in `generate`. candidates: texts or token ids, all different; a text stands as it is, so one
        that goes on a line begins with a space. All run in one forward, as a token tree behind the prompt's end.

        Returns a Generation for each prompt, in their order, whose `scores` has the log-probability of each
        candidate, summed over its tokens (in the model's own distribution). A prompt that cannot run has
        finish_reason "error", as in `generate`; what is wrong with the call is raised.
        """
        listed, params = list_prompts(prompts), SamplingParams()
        tokens = self._prompts.candidates(candidates)

        def make(index: int) -> Prompt:
            prompt = self._prompts.make(index, listed[index], params, what=f"prompt {index}")
            return dataclasses.replace(prompt, candidates=tokens)

        return [samples[0] for samples in self._answer(make, [1] * len(listed), progress)]

    def _answer(
        self, make: Callable[[int], Prompt], samples: Seq[int], progress: bool
    ) -> list[list[Generation]]:
        """Of as many prompts as there are `samples`, each with so many, what becomes of them, in their order."""
        prompts = len(samples)
        results: dict[int, list[Generation]] = {}
        places: dict[int, int] = {}
        others = []
        try:
            for index in range(prompts):
                try:
                    places[self.add(make(index))] = index
                except RowError as error:
                    results[index] = failed_row(index, samples[index], error)
            _warn_of_failed(results.values(), prompts)
            with _bar(prompts, len(results), progress) as count:
                while len(results) < prompts:
                    for done in self.step():
                        if (place := places.get(done.request_id)) is None:
                            others.append(done)
                        else:
                            results[place] = done.generations
                            count()
        finally:  # nobody waits for the rest of a call that was interrupted
            self.abort(places)
            self._kept += others
        return [results[index] for index in range(prompts)]

    def _start_steps(self) -> None:
        """Give every idle worker its next step, and those that run one another, where it need not wait for tokens.
        Rows are shared out evenly, so that no worker sits out the tail."""
        share = -(-(len(self._shared.running) + len(self._waiting)) // len(self._workers))
        planned: list[tuple[Worker, Step]] = []
        for worker in self._workers:
            in_flight = [step for owner, step in self._steps.values() if owner is worker]
            while not in_flight or (len(in_flight) == 1 and in_flight[0].follows):
                if (step := worker.next(share)) is None:
                    break
                self._take_back(step.plan.preempted)
                planned.append((worker, step))
                in_flight.append(step)
        if len(planned) == 1 and not self._steps:  # the other workers' threads have nothing to do
            ((worker, step),) = planned
            planned = [(worker, replace(step, threads=step.threads * len(self._workers)))]
        for worker, step in planned:
            self._steps[worker.start(step)] = worker, step

    def _take_back(self, rows: Seq[Sequence]) -> None:
        """Tokens of rows that begin anew do not count."""
        self._stats.completion_tokens -= sum(len(row.generated) - row.pending for row in rows)

    def _drop_steps(self) -> None:
        """Have nothing run any more, after a step that failed: what all rows have of the cache is given up."""
        wait(self._steps)
        self._steps.clear()

    def _collect(self, worker: Worker, step: Step, result: StepResult) -> list[Completion]:
        """Append what a step chose, and take out the rows that ended."""
        found = result.choices()
        worker.settle(step)
        began = time.perf_counter()
        gained: dict[Sequence, int] = {}
        ended: list[Sequence] = []
        for row, choices in found.items():
            if row.ended:  # in the step before, when this one was on its way
                gained[row] = 0
                continue
            gained[row] = self._requests.advance(row, choices)
            if row.ended:
                ended.append(row)
        self._stats += worker.count(step, result, gained)
        self._stats.completion_tokens += sum(gained.values())
        # a step on its way may run their last tokens, for nothing, and find what is not finite
        followed = any(owner is worker for owner, _ in self._steps.values())
        unclean = [row for row in ended if followed or found[row][-1].token_id is None]
        worker.scheduler.retire(ended, unclean)
        completions = self._requests.complete(ended)
        self._stats.seconds["sample"] += time.perf_counter() - began
        return completions


def _check_room(folder: Path, dtype: str, place: torch.device) -> None:
    """Raises ModelError where a GPU has no room for the weights. (A CPU's memory may be more than what is free.)"""
    needed, free = weight_bytes(folder, dtype), free_bytes(place)
    if place.type == "cuda" and needed > free:
        raise ModelError(
            f"model.path: {folder} needs {needed / 1e9:.1f} GB for its weights in {dtype}, and {free / 1e9:.1f} GB "
            f"of the GPU's memory are free; a smaller model is wanted, or a GPU with more memory"
        )


@contextmanager
def _bar(prompts: int, done: int, shown: bool) -> Iterator[Callable[[], object]]:
    """What to call for each prompt that ends; shown as a bar."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=prompts, initial=done, unit="prompt") as bar:
        yield bar.update


def _warn_of_failed(failed: Collection[Seq[Generation]], prompts: int) -> None:
    """failed: the error rows of the prompts that cannot run."""
    if failed:
        first, *_ = next(iter(failed))
        _log.warning(
            "%d of %d prompts cannot run; the first is prompt %d: %s (%s)",
            len(failed),
            prompts,
            first.row_index,
            first.error_message,
            first.error_type,
        )
