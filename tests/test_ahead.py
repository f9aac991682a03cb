"""Steps planned ahead, as on a GPU: outcomes are those of one step after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rayskip.engine.engine as module
from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.data.records import Generation
from rayskip.engine import Engine
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import TokenBatch

CPU = torch.device("cpu")
ENDS = tuple(range(150, 165))
PROMPTS = [[3 + row % 5, 4, *range(5, 6 + 7 * row % 40)] for row in range(24)]


class _Watched(Decoder):
    """Counts forwards, those after one that memory did not suffice for too; at one of them a row's numbers are not
    finite, and, if `ends_badly`, nowhere those of an end token."""

    forwards, poisoned, most_rows, ends_badly, failed, after_failure = 0, -1, 1 << 30, False, False, 0

    def run_layers(
        self, x: torch.Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        self.forwards += 1
        self.after_failure += self.failed
        if len(batch.table_rows.unique()) > self.most_rows and self.forwards > 6:
            self.failed = True
            raise torch.OutOfMemoryError("no memory for so many rows")
        x = super().run_layers(x, batch, cache, first, last)
        if self.forwards == self.poisoned:
            x[0] = torch.nan
            cache.keys[
                cache.table[:, batch.table_rows[0], batch.positions[0] // cache.layout.page].long()
            ] = torch.nan
        if self.ends_badly:
            ends = torch.isin(batch.token_ids, torch.tensor(ENDS))
            size = cache.layout.page
            pages = cache.table[:, batch.table_rows[ends], batch.positions[ends] // size].long()
            cache.keys[pages, :, batch.positions[ends] % size] = torch.nan
        return x


@pytest.fixture
def make(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine of 6 rows and 40 tokens a forward, for (plans ahead, decode config)."""
    choose_sizes = module.choose_sizes

    def make(ahead: bool, decode: dict[str, Any] | None = None, **facts: Any) -> Engine:
        def sizes(*args: Any) -> Any:
            return dataclasses.replace(choose_sizes(*args), plans_ahead=ahead)

        monkeypatch.setattr(module, "choose_sizes", sizes)
        folder = tiny_llama("ahead", 0, vocab_size=200, initializer_range=0.3)
        spec, weights = load(folder, torch.float32, CPU)
        decoder = _Watched(
            spec, weights, TorchBackend(spec, weights.embed.dtype, weights.embed.device)
        )  # which reads masked keys, as a GPU's attention may
        decoder.spec = dataclasses.replace(decoder.spec, eos_token_ids=ENDS)
        decode_config = DecodeConfig.model_validate(decode or {})
        engine = Engine(decoder, None, EngineConfig(max_batch_rows=6, max_batch_tokens=40), decode_config)
        vars(decoder).update(facts, forwards=0)
        return engine

    return make


def _outcomes(generations: list[list[Generation]]) -> list[list[tuple[Any, ...]]]:
    return [
        [(g.token_ids, g.finish_reason, g.logprobs, g.error_type) for g in samples] for samples in generations
    ]


def _mixed() -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {},
        {"ignore_eos": True},
        {"temperature": 0.9, "top_p": 0.9, "n": 2},
        {"temperature": 1.1, "top_k": 5, "logprobs": 3},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "stop_token_ids": (3, 50, 99), "logprobs": 0},
    ]
    return [SamplingParams(max_tokens=4 + row % 13, **kinds[row % 6]) for row in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "decode",
    [{}, {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": 8}}, {"draft": {"kind": "lookup"}}],
)
def test_outcomes_are_those_of_one_step_after_another(
    make: Callable[..., Engine], decode: dict[str, Any]
) -> None:
    one, ahead = make(False, decode), make(True, decode)
    expected = _outcomes(one.generate(PROMPTS, _mixed()))
    in_flight = []
    start = ahead._start_steps

    def counted() -> None:
        start()
        in_flight.append(len(ahead._steps))

    ahead._start_steps = counted  # type: ignore[method-assign]
    found = _outcomes(ahead.generate(PROMPTS, _mixed()))
    assert found == expected
    assert not ahead._steps
    assert {outcome[1] for samples in found for outcome in samples} == {"stop", "length"}
    assert max(in_flight) == (1 if "draft" in decode else 2)
    stats, plain = ahead.take_stats(), one.take_stats()
    assert stats.completion_tokens == plain.completion_tokens
    assert stats.cohort_fill <= 1
    assert (stats.decode_tokens, stats.decode_layer_tokens) == (
        plain.decode_tokens,
        plain.decode_layer_tokens,
    )


def test_a_row_that_ends_leaves_nothing_behind(make: Callable[..., Engine]) -> None:
    engine = make(True, poisoned=9)
    failed = engine.generate(PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True))
    broken = [row for row, samples in enumerate(failed) if samples[0].finish_reason == "error"]
    assert len(broken) == 1
    expected = make(False).generate(PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True))
    kept = [row for row in range(len(PROMPTS)) if row not in broken]
    assert _outcomes([failed[row] for row in kept]) == _outcomes([expected[row] for row in kept])


def test_what_ran_of_a_row_after_its_end_harms_no_other(make: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=30)
    found = make(True, ends_badly=True).generate(PROMPTS, params)
    assert sum(samples[0].finish_reason == "stop" for samples in found) > len(PROMPTS) / 2
    assert _outcomes(found) == _outcomes(make(False).generate(PROMPTS, params))


def test_rows_begin_anew_where_memory_does_not_suffice(make: Callable[..., Engine]) -> None:
    engine = make(True, most_rows=4)
    params = SamplingParams(max_tokens=9, temperature=0.8)
    halve = engine._workers[0].halve

    def halved() -> Any:
        assert engine.decoder.after_failure == 0  # what was sent off already has not run
        engine.decoder.failed = False
        return halve()

    engine._workers[0].halve = halved  # type: ignore[method-assign]
    found = engine.generate(PROMPTS, params)
    assert _outcomes(found) == _outcomes(make(False).generate(PROMPTS, params))
    assert engine.take_stats().completion_tokens == sum(samples[0].completion_tokens for samples in found)


def test_given_up_rows_make_room(make: Callable[..., Engine]) -> None:
    engine = make(True)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    added = [engine.add(prompt, params) for prompt in PROMPTS[:14]]
    for _ in range(9):
        assert not engine.step()
    engine.abort(added[:12])
    found = {done.request_id: done.generations for done in engine.run()}
    assert list(found) == added[12:]
    assert _outcomes([*found.values()]) == _outcomes(make(False).generate(PROMPTS[12:14], params))
    assert engine.take_stats().completion_tokens < 8 * 60


def test_no_step_more_is_taken_where_lengths_are_known(make: Callable[..., Engine]) -> None:
    one, ahead = make(False), make(True)
    for engine in (one, ahead):
        engine.generate(PROMPTS[:6], SamplingParams(max_tokens=20, ignore_eos=True))
        assert not engine._steps
    assert isinstance(ahead.decoder, _Watched)
    assert isinstance(one.decoder, _Watched)
    assert ahead.decoder.forwards == one.decoder.forwards
