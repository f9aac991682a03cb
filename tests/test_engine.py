"""The engine on the embedded model: parity with transformers, batch invariance, sampling, stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rayskip.engine.engine as module
from rayskip.config import DecodeConfig, EngineConfig, ModelConfig, SamplingParams
from rayskip.config.file import load_config
from rayskip.data.prompts import PromptBuilder, row_key
from rayskip.data.records import Generation, Prompt
from rayskip.data.sources import discover, plan_shards, read_shard
from rayskip.data.tokenizer import load_tokenizer
from rayskip.decode.stopping import Stopper
from rayskip.engine import Engine
from rayskip.engine.sizes import Sizes, choose_sizes
from rayskip.errors import RowError
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder
from rayskip.model.token_batch import TokenBatch

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(max_tokens=24)
SKIP = {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": 8}}
PEER_BATCH, PEER_TOKENS = 16, 12


def _engine(folder: Path, dtype: str, **sizes: int) -> Engine:
    return Engine.load(ModelConfig(path=str(folder), dtype=dtype), EngineConfig(**sizes))


def _tickets(engine: Engine, rows: int) -> list[list[int]]:
    """Token ids of the first rows of the shipped dataset, through its own config."""
    config = load_config(
        ROOT / "configs/quickstart.yaml", [f"input.path={ROOT}/configs/data/quickstart.jsonl"]
    )
    source = discover(config.input)
    builder = PromptBuilder(config.input, config.sampling, engine.tokenizer, engine.max_model_len)
    shard = next(iter(plan_shards(source, rows)))
    table = read_shard(shard, source).to_pylist()
    return [builder.build(row, index, shard.name).token_ids for index, row in enumerate(table)]


def _tokens(generations: Sequence[Sequence[Generation]]) -> list[list[list[int] | None]]:
    return [[sample.token_ids for sample in samples] for samples in generations]


def test_float32_greedy_tokens_equal_transformers_on_64_prompts(smollm2: Path) -> None:
    engine = _engine(smollm2, "float32", max_batch_rows=16)
    prompts = _tickets(engine, 64)
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    ours = engine.generate(prompts, SamplingParams(max_tokens=PEER_TOKENS))

    for start in range(0, len(prompts), PEER_BATCH):
        part = prompts[start : start + PEER_BATCH]
        for theirs, (generation,) in zip(_generate(peer, part), ours[start:], strict=False):
            assert generation.token_ids == theirs


def _generate(peer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy token ids up to the end token, prompts padded on the left."""
    length, end = max(map(len, prompts)), peer.generation_config.eos_token_id
    ids = torch.tensor([[end] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=PEER_TOKENS, do_sample=False)
    new = out[:, length:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in new]


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> tuple[list[list[int]], list[list[list[int] | None]]]:
    """Prompts, and what each generates in bfloat16 with one row at a time and no prefix to share."""
    engine = _engine(smollm2, "bfloat16", max_batch_rows=1)
    prompts = _tickets(engine, 12)
    return prompts, _tokens([engine.generate([prompt], GREEDY)[0] for prompt in prompts])


@pytest.mark.parametrize("sizes", [{"max_batch_rows": 5, "max_batch_tokens": 16}, {"max_batch_rows": 12}])
def test_tokens_do_not_depend_on_the_batch(
    smollm2: Path,
    alone: tuple[list[list[int]], list[list[list[int] | None]]],
    sizes: dict[str, int],
) -> None:
    prompts, expected = alone
    engine = _engine(smollm2, "bfloat16", **sizes)
    if not engine.info["batch_invariant"]:
        pytest.skip("this machine's kernels are not batch-invariant; the report says so")
    assert _tokens(engine.generate(prompts[::-1], GREEDY))[::-1] == expected
    assert engine.take_stats().prefix_tokens > 0


@pytest.mark.parametrize(
    "decode", [{}, {"draft": {"kind": "lookup"}}, SKIP], ids=["none", "lookup", "skipping"]
)
@pytest.mark.parametrize("cramped", [False, True])
def test_workers_compute_a_prefix_once_and_give_the_tokens_of_one(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, decode: dict[str, Any], cramped: bool
) -> None:
    folder = tiny_llama("workers", 0, vocab_size=200, initializer_range=0.3)
    preamble = [3 + place * place % 190 for place in range(300)]
    prompts = [[*preamble, *range(5, 6 + row % 40), 7 + row] for row in range(30)]
    params = SamplingParams(max_tokens=20, temperature=0.5, n=2, ignore_eos=True)
    alone = Engine.load(str(folder), {"max_batch_rows": 1}, decode, "cpu")
    expected = _tokens(alone.generate(prompts, params))

    def sizes(*args: Any) -> Sizes:
        chosen = choose_sizes(*args)
        pages = chosen.least_pages if cramped else chosen.pages
        return replace(chosen, workers=3, batch_rows=4, batch_tokens=70, threads_per_worker=1, pages=pages)

    monkeypatch.setattr(module, "choose_sizes", sizes)
    engine = Engine.load(str(folder), {"max_batch_rows": 1, "max_model_len": 400}, decode, "cpu")
    assert _tokens(engine.generate(prompts, params)) == expected
    stats = engine.take_stats()
    assert stats.completion_tokens == len(prompts) * 2 * 20
    if not cramped:
        page = engine.decoder.backend.layout.page
        assert stats.prefix_tokens >= (2 * len(prompts) - 1) * (len(preamble) // page * page)


def test_samples_depend_on_seed_row_and_sample_alone(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=8)
    ids = _tickets(engine, 6)
    params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, n=3, seed=7)

    def run(order: Sequence[int]) -> dict[int, list[list[int] | None]]:
        for row in order:
            engine.add(Prompt(row, ids[row], params, row_key(7, "rows", row)))
        return {
            done.generations[0].row_index: [sample.token_ids for sample in done.generations]
            for done in engine.run()
        }

    first, again = run(range(6)), run([3, 5, 0, 1, 4, 2])
    assert first == again
    assert all(len(samples) == 3 for samples in first.values())
    assert len({str(sample) for samples in first.values() for sample in samples}) > 12


def test_penalties_and_least_tokens_are_the_same_with_drafts(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama("penalties", 1, vocab_size=64, initializer_range=0.3, eos_token_id=5)
    prompts = [[7 + row, 9, 7 + row, 9] for row in range(8)]
    params = {"max_tokens": 40, "min_tokens": 9, "presence_penalty": 0.3, "frequency_penalty": 0.4}
    params |= {"logit_bias": {"5": 4.0}, "temperature": 0.8, "stop_token_ids": [11]}

    def run(kind: str) -> list[Any]:
        engine = Engine.load(str(folder), {"max_batch_rows": 8}, {"draft": {"kind": kind}})
        return _tokens(engine.generate(prompts, params))

    plain = run("none")
    assert run("lookup") == plain
    for (tokens,) in plain:
        assert len(tokens) >= 10 or len(tokens) == 40
        assert not {5, 11} & set(tokens[:9])


def test_stop_strings_end_the_text_before_them(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=2)
    messages = [{"role": "user", "content": "Write a story about a dog."}]
    ((whole,),) = engine.generate([messages], SamplingParams(max_tokens=40))
    assert whole.text is not None
    word = whole.text.split()[3]
    ((cut,),) = engine.generate([messages], SamplingParams(max_tokens=40, stop=(word,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.completion_tokens < whole.completion_tokens


def test_a_stop_string_may_be_a_special_token(smollm2: Path) -> None:
    """The text does not show it."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    stopper, params = Stopper(tokenizer, eos_token_ids=()), SamplingParams(stop=("never", "<|im_end|>"))
    *text, end = tokenizer.encode("Yes.<|im_end|>")
    assert stopper.reason(text, params, room=9) is None
    assert stopper.reason([*text, end], params, room=9) == "stop"
    assert stopper.reason([*text, end], SamplingParams(), room=9) is None
    assert stopper.text([*text, end], params) == "Yes."


@pytest.mark.parametrize(
    ("stop", "told"), [("<|im_end|>\n", "Yes."), ("es.<|im_end|>", "Y"), ("<|im_end|><|im_start|>", None)]
)
def test_a_stop_string_may_have_special_tokens_in_it(smollm2: Path, stop: str, told: str | None) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    stopper, params = Stopper(tokenizer, eos_token_ids=()), SamplingParams(stop=(stop,))
    ids = tokenizer.encode("Yes.<|im_end|>\nNo", add_special_tokens=False)
    ends = [count for count in range(1, len(ids)) if stopper.reason(ids[:count], params, room=9)]
    if told is None:
        assert not ends
        assert stopper.text(ids, params) == "Yes.\nNo"
        return
    whole = tokenizer.decode(ids[: ends[0]])
    assert whole.endswith(stop)
    assert stopper.text(ids[: ends[0]], params) in (told, "")  # cut where a token ends


def test_end_tokens_lengths_and_logprobs(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=2)
    messages = [{"role": "user", "content": "Say yes."}]
    ((ended,),) = engine.generate([messages], SamplingParams(max_tokens=200, logprobs=2))
    assert ended.finish_reason == "stop"
    assert ended.token_ids is not None
    assert ended.token_ids[-1] in engine.decoder.spec.eos_token_ids
    assert ended.logprobs is not None
    assert [entry.token_id for entry in ended.logprobs] == ended.token_ids
    assert all(entry.logprob == entry.top[0][1] <= 0 for entry in ended.logprobs)
    ((longer,),) = engine.generate(
        [messages], SamplingParams(max_tokens=ended.completion_tokens + 3, ignore_eos=True)
    )
    assert longer.finish_reason == "length"
    assert longer.completion_tokens == ended.completion_tokens + 3


def test_rows_that_cannot_run_are_refused_by_kind(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=1, max_model_len=32)
    for ids, kind in (([], "empty_prompt"), ([5] * 32, "prompt_too_long"), ([50_000], "bad_token_id")):
        with pytest.raises(RowError) as refused:
            engine.add(Prompt(0, ids, GREEDY, 0))
        assert refused.value.kind == kind
    ((full,),) = engine.generate([[5] * 30], SamplingParams(max_tokens=10, ignore_eos=True))
    assert (full.finish_reason, full.completion_tokens) == ("length", 2)


def test_steps_with_prompt_tokens_count_as_prefill(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=2)
    engine.generate([[504, 905, 300]] * 2, SamplingParams(max_tokens=4, ignore_eos=True))
    stats = engine.take_stats()
    assert stats.seconds["prefill"] > 0
    assert (stats.completion_tokens, stats.steady_tokens) == (8, 6)


def test_prompts_can_be_added_one_by_one(smollm2: Path) -> None:
    engine = _engine(smollm2, "bfloat16", max_batch_rows=2)
    prompts = ["The sky is", [{"role": "user", "content": "Name a river."}], [504, 905]]
    expected = _tokens(engine.generate(prompts, GREEDY))
    ids = [engine.add(prompt, GREEDY) for prompt in prompts]
    found = {done.request_id: done.generations for done in engine.run()}
    assert _tokens([found[request] for request in ids]) == expected


class _Cramped(Decoder):
    """Has memory for so many rows, which shows only after some steps."""

    room, after, steps = 0, 0, 0

    def run_layers(
        self, x: torch.Tensor, batch: TokenBatch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        self.steps += 1
        if self.steps > self.after and len(batch.table_rows.unique()) > self.room:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return super().run_layers(x, batch, cache, first, last)


def _cramped(tiny_llama: Callable[..., Path], room: int, after: int, decode: dict[str, Any]) -> Engine:
    decoder = _Cramped(*load(tiny_llama("cramped", 0), torch.bfloat16, torch.device("cpu")))
    engine = Engine(decoder, None, EngineConfig(max_batch_rows=16), DecodeConfig.model_validate(decode))
    decoder.room, decoder.after, decoder.steps = room, after, 0
    return engine


@pytest.mark.parametrize("after", [0, 12])
@pytest.mark.parametrize(
    "decode",
    [
        {},
        {"draft": {"kind": "retrieval"}},
        {"draft": {"kind": "lookup"}, "skip": {"kind": "skipdecode", "speedup": 2, "horizon": 8}},
    ],
)
def test_where_memory_does_not_suffice_fewer_rows_run_and_none_is_lost(
    tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture, decode: dict[str, Any], after: int
) -> None:
    prompts = [[3, 4] * 3 + list(range(3, 4 + length)) for length in range(40)]
    params = SamplingParams(max_tokens=12, temperature=0.3, ignore_eos=True)
    expected = _tokens(_cramped(tiny_llama, 16, after, decode).generate(prompts, params))
    assert not caplog.text
    engine = _cramped(tiny_llama, 3, after, decode)
    assert _tokens(engine.generate(prompts, params)) == expected
    assert engine.take_stats().completion_tokens == 40 * 12
    assert "on with 2" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        _cramped(tiny_llama, 0, after, decode).generate(prompts, params)


def test_generate_leaves_other_requests_alone(tiny_llama: Callable[..., Path]) -> None:
    engine = _engine(tiny_llama("beside", 0), "bfloat16", max_batch_rows=4)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 20)]
    expected = [engine.generate([[5, 6, 7]], own)[0][0].token_ids for own in params]
    added = [engine.add([5, 6, 7], own) for own in params]
    ((beside,),) = engine.generate([[5, 6, 7]], params[0])
    assert beside.token_ids == expected[0]
    found = {done.request_id: done.generations[0].token_ids for done in engine.run()}
    assert [found[request_id] for request_id in added] == expected
    assert not engine.has_work


def test_aborted_requests_end_without_a_completion(tiny_llama: Callable[..., Path]) -> None:
    engine = _engine(tiny_llama("aborted", 0), "bfloat16", max_batch_rows=2)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    added = [engine.add([5, 6, index], params) for index in range(5)]
    for _ in range(10):
        assert not engine.step()
    engine.abort(added[:4])
    (last,) = engine.run()
    assert last.request_id == added[4]
    alone = engine.generate([[5, 6, 4]], params)
    assert _tokens([last.generations]) == _tokens(alone)
    assert engine.take_stats().completion_tokens < 3 * 200


def test_an_interrupted_generate_leaves_nothing_behind(tiny_llama: Callable[..., Path]) -> None:
    engine = _engine(tiny_llama("interrupted", 0), "bfloat16", max_batch_rows=2)
    step, calls = engine.step, 0

    def interrupted() -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5, 6, 7]] * 6, SamplingParams(max_tokens=60, ignore_eos=True))
    assert list(engine.run()) == []
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    assert len(engine.generate([[8, 9]], params)[0][0].token_ids or []) == 3
