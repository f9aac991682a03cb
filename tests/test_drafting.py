"""Drafters propose, the model decides: tokens are those of the engine without one, whatever the drafter says."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from rayskip.config import AutoDraft, DecodeConfig, EngineConfig, KangarooDraft, ModelConfig, SamplingParams
from rayskip.config.file import load_config
from rayskip.data.records import Generation, Prompt
from rayskip.decode.batch import Chunk
from rayskip.decode.draft import NEWEST, Draft
from rayskip.decode.draft_files import check_files
from rayskip.decode.drafters import kangaroo
from rayskip.decode.drafters.auto import AutoDrafter
from rayskip.decode.drafters.costs import StepCosts
from rayskip.decode.drafters.drafter import Drafter, States
from rayskip.decode.drafters.lookup import Continuation, Index
from rayskip.decode.drafters.none import NoDrafter
from rayskip.decode.drafters.retrieval import Store
from rayskip.decode.drafters.rounds import Beliefs
from rayskip.decode.drafters.value import Ratio
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import Verdict
from rayskip.driver.identity import differences
from rayskip.driver.plan import make_plan
from rayskip.driver.records import JobRecord
from rayskip.engine import Engine
from rayskip.errors import ConfigError, ModelError
from rayskip.model.backends import base
from rayskip.model.backends.base import DraftStep
from rayskip.model.backends.cpu.draft import CpuDraftStep
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import load, resolve, tensors_fingerprint
from rayskip.model.decoder import Decoder
from rayskip.model.kangaroo import load_kangaroo
from rayskip.model.token_batch import Span, TokenBatch
from rayskip.model.trained import KangarooLabel, MedusaLabel, save_trained
from rayskip.skip import full_depth, skip_policy

ROOT = Path(__file__).parent.parent
LISTED = 48
"""Tokens that drafters choose from: whole vectors of the kernels."""

LAYERS, VOCAB, EXIT = 4, 61, 2
DRAFTERS = (
    "lookup",
    "retrieval",
    "lookahead",
    "kangaroo",
    "kangaroo tree of 3",
    "medusa",
    "medusa tree of 4",
    "draft_model",
    "auto",
)
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"kind": "none"},
    "skip": {"kind": "skipdecode", "max_layers": 4, "min_layers": 3, "horizon": 5, "warmup": EXIT},
}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    """A tiny random model; in `adapter` a Kangaroo adapter that reads the exit layer as if it were the last, in
    `heads` Medusa heads that say what the model's own head does, and in `small` its first layers as a model."""
    config = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "eos_token_id": 2,
    }
    root = tiny_llama("drafting", 3, num_hidden_layers=LAYERS, **config)
    _save_adapter(root, root / "adapter", tensors_fingerprint(root))
    label = MedusaLabel("tiny", tensors_fingerprint(root), LISTED, 0, 0.0, heads=3)
    heads = {"weights": torch.zeros(3, 64, 64), "biases": torch.zeros(3, 64)}
    save_trained(root / "heads", label, {**heads, "token_ids": torch.arange(LISTED)})
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    model.config.layer_types = None
    model.save_pretrained(root / "small")
    return root


def _save_adapter(model: Path, target: Path, fingerprint: str) -> None:
    _, weights = load(model, torch.bfloat16, torch.device("cpu"))
    layer = weights.layers[EXIT]
    tensors = {
        "attn_norm": layer.attn_norm.weight,
        "final_norm": weights.final_norm.weight,
        "qkv": layer.attention.qkv.weight,
        "out": layer.attention.out.weight,
        "token_ids": torch.arange(LISTED),
    }
    save_trained(target, KangarooLabel("tiny", fingerprint, LISTED, 0, 0.5, exit_layer=EXIT), tensors)


def _draft(kind: str, folder: Path) -> dict[str, Any]:
    name, _, branches = kind.partition(" tree of ")
    tree = {"branches": int(branches)} if branches else {}
    match name:
        case "kangaroo" | "auto":
            return {"kind": name, "path": str(folder / "adapter"), "gamma": 4, "eta": 0.02, **tree}
        case "medusa":
            return {"kind": name, "path": str(folder / "heads"), **tree}
        case "draft_model":
            return {"kind": name, "model": {"path": str(folder / "small")}}
    return {"kind": name}


def _engine(folder: Path, draft: dict[str, Any], policy: str = "full", rows: int = 5) -> Engine:
    decode = DecodeConfig.model_validate({"draft": draft, "skip": POLICIES[policy]})
    return Engine.load(ModelConfig(path=str(folder)), EngineConfig(max_batch_rows=rows), decode)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 17, 9, 40, 1, 5, 70, 12)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [*prompts, [*prompts[3], 7, 8], prompts[2] * 3]


def _outcomes(generations: list[list[Generation]]) -> list[tuple[Any, ...]]:
    return [
        (own.token_ids, own.finish_reason, own.logprobs, own.mean_layers)
        for samples in generations
        for own in samples
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_tokens_are_those_without_a_drafter(folder: Path, kind: str, policy: str) -> None:
    params = [
        SamplingParams(max_tokens=25),
        SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=21, temperature=0.8, seed=3, n=2),
        SamplingParams(max_tokens=18, temperature=1.2, top_p=0.9, repetition_penalty=1.3),
        SamplingParams(max_tokens=30, stop_token_ids=[11, 17]),
        SamplingParams(max_tokens=18, repetition_penalty=1.3),
    ]
    prompts = _prompts()
    every = [params[index % len(params)] for index in range(len(prompts))]
    plain = _engine(folder, {"kind": "none"}, policy)
    expected = _outcomes(plain.generate(prompts, every))
    assert plain.take_stats().mean_accepted == 1
    for rows in (1, 5):
        engine = _engine(folder, _draft(kind, folder), policy, rows)
        assert _outcomes(engine.generate(prompts, every)) == expected
        stats = engine.take_stats()
        assert stats.drafted > 0
        assert stats.drafted == sum(stats.drafted_by.values())
        assert stats.accepted == sum(stats.accepted_by.values())
        assert stats.accepted == sum(int(length) * count for length, count in stats.accepted_lengths.items())
        assert sum(len(tokens) for tokens, *_ in expected) == stats.completion_tokens
        assert stats.decode_tokens == stats.completion_tokens - len(
            expected
        )  # a row's first token needs no step


@pytest.mark.parametrize("kind", ["kangaroo tree of 3", "medusa tree of 4"])
def test_torchs_operations_follow_branches_too(folder: Path, kind: str) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = []
    for draft in ({"kind": "none"}, _draft(kind, folder)):
        spec, weights = load(folder, torch.bfloat16, torch.device("cpu"))
        decoder = Decoder(
            spec, weights, TorchBackend(spec, weights.embed.dtype, weights.embed.device), folder
        )
        decode = DecodeConfig.model_validate({"draft": draft})
        engine = Engine(decoder, None, EngineConfig(max_batch_rows=5), decode)
        found.append(_outcomes(engine.generate(_prompts(), params)))
    assert found[0] == found[1]
    assert engine.take_stats().accepted > 0


@pytest.mark.parametrize("native", [True, False])
def test_branches_inside_a_window(native: bool, tmp_path: Path) -> None:
    """A window ends at a token's position, not at its place in the cache."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(
        **sizes, vocab_size=VOCAB, num_hidden_layers=LAYERS, sliding_window=7, initializer_range=0.15
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    _save_adapter(tmp_path, tmp_path / "adapter", tensors_fingerprint(tmp_path))
    params, found = SamplingParams(max_tokens=40, ignore_eos=True), []
    for draft in ({"kind": "none"}, _draft("kangaroo tree of 3", tmp_path)):
        spec, weights = load(tmp_path, torch.bfloat16, torch.device("cpu"))
        decoder = Decoder(
            spec,
            weights,
            None if native else TorchBackend(spec, weights.embed.dtype, weights.embed.device),
            tmp_path,
        )
        decode = DecodeConfig.model_validate({"draft": draft})
        engine = Engine(decoder, None, EngineConfig(max_batch_rows=5), decode)
        found.append(_outcomes(engine.generate(_prompts(), params)))
    assert found[0] == found[1]
    assert engine.take_stats().accepted > 0


@pytest.mark.parametrize("native", [True, False])
def test_a_draft_that_is_not_finite_harms_no_row(folder: Path, native: bool) -> None:
    """A token that the model never chooses has no finite states; a drafter proposes it all the same."""
    prompts, params = _prompts(), SamplingParams(max_tokens=20, ignore_eos=True)
    spec, weights = load(folder, torch.bfloat16, torch.device("cpu"))
    ops = None if native else TorchBackend(spec, weights.embed.dtype, weights.embed.device)
    plain = Decoder(spec, weights, ops, folder)
    expected = Engine(plain, None, EngineConfig(max_batch_rows=5)).generate(prompts, params)
    used = {token for prompt in prompts for token in prompt}
    used |= {token for (own,) in expected for token in own.token_ids or []}
    never = next(token for token in range(VOCAB) if token not in used)
    embed = weights.embed.clone()
    embed[never] = float("nan")
    poisoned = Decoder(spec, replace(weights, embed=embed), ops, folder)

    class Poison(NoDrafter):
        def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
            for row in rows:
                if row.draft_room > 0 and row.length % 2:
                    row.draft.add_chain([never], "poison")

    engine = Engine(poisoned, None, EngineConfig(max_batch_rows=5))
    for worker in engine._workers:
        worker._drafter = Poison()
    assert _outcomes(engine.generate(prompts, params)) == _outcomes(expected)
    assert engine.take_stats().completion_tokens == 20 * len(prompts)


@pytest.mark.parametrize("kind", ["lookup", "lookahead", "kangaroo", "draft_model"])
def test_good_drafts_save_steps(folder: Path, kind: str) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine = _engine(folder, _draft(kind, folder))
    engine.generate(_prompts(), params)
    stats = engine.take_stats()
    assert stats.accepted > 20
    assert stats.mean_accepted is not None
    assert stats.mean_accepted > 1.05


@pytest.mark.parametrize("kind", DRAFTERS)
def test_rows_at_full_depth_and_at_the_contexts_end_and_on_two_workers(folder: Path, kind: str) -> None:
    def outcome(draft: dict[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
        decode = DecodeConfig.model_validate({"draft": draft, "skip": POLICIES["skip"]})
        engine = Engine.load(
            ModelConfig(path=str(folder)), EngineConfig(max_batch_rows=64, max_model_len=64), decode
        )
        params = SamplingParams(max_tokens=62, ignore_eos=True)
        for index, prompt in enumerate(prompt for prompt in _prompts() * 2 if len(prompt) < 64):
            engine.add(prompt, params, full_depth=index % 3 == 0)
        return {done.request_id: _outcomes([done.generations]) for done in engine.run()}

    plain = outcome({"kind": "none"})
    assert {reason for ((_, reason, *_),) in plain.values()} == {"length"}
    assert outcome(_draft(kind, folder)) == plain


def test_unlikely_tokens_beside_the_likeliest_are_not_drafted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    drafted = []
    for kind, least in (("kangaroo", 0.0), ("kangaroo tree of 3", 1.0), ("kangaroo tree of 3", 0.0)):
        monkeypatch.setattr(kangaroo, "LEAST_OTHER", least)
        engine = _engine(folder, _draft(kind, folder))
        engine.generate(_prompts(), params)
        drafted.append(engine.take_stats().drafted)
    assert drafted[0] == drafted[1] < drafted[2]


@pytest.mark.parametrize("kind", ["kangaroo", "medusa"])
def test_branches_hold_where_the_chain_does_not(folder: Path, kind: str) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    gained: list[float] = []
    for branches in (1, 6):
        engine = _engine(folder, _draft(f"{kind} tree of {branches}", folder))
        engine.generate(_prompts(), params)
        gained.append(engine.take_stats().mean_accepted or 0.0)
    assert gained[1] > gained[0] + 0.05


def test_a_tree_is_drafted_on_from_several_nodes(folder: Path) -> None:
    """And of those that are not the first after their parent some hold, with what follows."""
    engine = _engine(folder, _draft("kangaroo tree of 3", folder), rows=1)
    (drafter,) = (worker._drafter for worker in engine._workers)
    observe, most, held = drafter.observe, 0, 0

    def look(verdicts: Mapping[Sequence, Verdict], hidden: torch.Tensor) -> None:
        nonlocal most, held
        for row, verdict in verdicts.items():
            parents, depths = row.draft.parents, row.draft.depths
            going_on = Counter(depths[node] for node in set(parents) - {NEWEST})
            most = max(most, *going_on.values(), 0)
            others = [node for node in verdict.path[:-1] if node != parents.index(parents[node])]
            held += len(others)
        observe(verdicts, hidden)

    drafter.observe = look  # type: ignore[method-assign]
    engine.generate(_prompts(), SamplingParams(max_tokens=60, ignore_eos=True))
    assert most > 1
    assert held > 0


@pytest.mark.parametrize("kind", ["kangaroo", "kangaroo tree of 3"])
@pytest.mark.parametrize("rows", [1, 5])
def test_drafts_are_the_same_whether_their_ends_run_first_or_when_verified(
    folder: Path, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a draft ends with enters the adapter's cache later then, and is as if it had always been there."""
    found, states = [], []
    for most in (0, 10_000):
        monkeypatch.setattr(base, "HOST", replace(base.HOST, rerun_tokens=most))
        engine = _engine(folder, _draft(kind, folder), rows=rows)
        (drafter,) = (worker._drafter for worker in engine._workers)
        returned = _noting(drafter)
        outcomes = _outcomes(engine.generate(_prompts(), SamplingParams(max_tokens=40, ignore_eos=True)))
        stats = engine.take_stats()
        found.append((outcomes, stats.drafted, stats.accepted_lengths))
        states.append([one is not None for one in returned])
    assert found[0] == found[1]
    assert found[0][1] > 0
    assert all(states[0])
    assert not all(states[1])


def _noting(drafter: Drafter) -> list[States | None]:
    """What its `draft` will return."""
    draft = drafter.draft
    returned: list[States | None] = []

    def noting(*args: Any) -> States | None:
        returned.append(draft(*args))
        return returned[-1]

    drafter.draft = noting  # type: ignore[method-assign]
    return returned


class _Foresight(NoDrafter):
    """Proposes the five tokens that do come next, past what may end the row."""

    def __init__(self, text: list[int]) -> None:
        self._text = text

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache) -> None:
        for row in rows:
            at = len(row.generated)
            row.draft.add_chain(self._text[at : at + min(5, row.draft_room)], "foresight")


@pytest.mark.parametrize("way", ["stop token", "stop string", "max_tokens"])
def test_a_row_ends_inside_a_draft(way: str) -> None:
    """The first token needs no draft; then come six, and the row ends amid the next six."""
    chat = [{"role": "user", "content": "What is photosynthesis?"}]
    sizes = EngineConfig(max_batch_rows=1)
    plain = Engine.load("smollm2-135m-instruct", sizes)
    ((whole,),) = plain.generate([chat], SamplingParams(max_tokens=20, ignore_eos=True))
    ids, tokenizer = whole.token_ids, plain.tokenizer
    assert ids is not None
    assert tokenizer is not None
    at = next(at for at in range(9, 12) if tokenizer.decode([ids[at]]) not in tokenizer.decode(ids[:at]))
    params = {
        "stop token": SamplingParams(max_tokens=20, stop_token_ids=(ids[at],)),
        "stop string": SamplingParams(max_tokens=20, stop=(str(tokenizer.decode([ids[at]])),)),
        "max_tokens": SamplingParams(max_tokens=at + 1),
    }[way]
    drafting = Engine(plain.decoder, plain.tokenizer, sizes)
    for worker in drafting._workers:
        worker._drafter = _Foresight(ids)
    found = [engine.generate([chat], params)[0][0] for engine in (plain, drafting)]
    assert (found[0].text, found[0].finish_reason) == (found[1].text, found[1].finish_reason)
    assert found[0].token_ids == found[1].token_ids == ids[: at + 1]
    stats = drafting.take_stats()
    assert stats.accepted_lengths == {"5": 1, str(at - 7): 1}
    assert stats.drafted == 5 + (at - 7 if way == "max_tokens" else 5)


def test_a_draft_is_a_tree() -> None:
    draft = Draft()
    draft.add_chain([5, 6, 7], "a")
    assert draft.is_chain
    assert draft.add(0, 6, "b") == 1
    assert draft.add(0, 9, "b") == 3
    assert draft.add(NEWEST, 8, "b") == 4
    assert (draft.depths, draft.drafters) == ([1, 2, 3, 2, 1], ["a", "a", "a", "b", "b"])
    assert not draft.is_chain
    assert (draft.path(3), draft.path(NEWEST)) == ([0, 3], [])
    draft.cut(2)
    assert (draft.tokens, draft.child(0, 9), draft.is_chain) == ([5, 6], None, True)


def test_auto_goes_from_copies_to_kangaroo_to_nothing_and_back(folder: Path) -> None:
    """Every switch leaves the adapter's cache behind; what it missed is caught up, and no token changes."""
    prompts, params = _prompts(), SamplingParams(max_tokens=60, ignore_eos=True)
    expected = _outcomes(_engine(folder, {"kind": "none"}).generate(prompts, params))
    engine = _engine(folder, _draft("auto", folder))
    free, dear = StepCosts((1, 64), (1.0, 1.01)), StepCosts((1, 64), (1.0, 640.0))
    drafters = [worker._drafter for worker in engine._workers]
    for drafter in drafters:
        assert isinstance(drafter, AutoDrafter)
        assert drafter._rounds is not None
    for prompt in prompts:
        engine.add(prompt, params)
    found, step = {}, 0
    while engine.has_work:
        for drafter in drafters:
            drafter._costs = free if step // 4 % 2 else dear
            drafter._rounds._beliefs.clear()
            if step // 8 % 2:  # as if Kangaroo had been tried and found wanting
                slow = {bits: Beliefs(seconds=Ratio(1e9, 9)) for bits in range(8)}
                drafter._rounds._beliefs.update(slow)
        found.update({done.request_id: done.generations for done in engine.step()})
        step += 1
    assert _outcomes([found[index] for index in range(len(prompts))]) == expected
    assert set(engine.take_stats().drafted_by) == {"lookup", "kangaroo"}


def test_drafts_fit_the_forward(folder: Path) -> None:
    decode = DecodeConfig.model_validate({"draft": {"kind": "lookup", "tokens": 50}})
    config = EngineConfig(max_batch_rows=4, max_batch_tokens=16)
    engine = Engine.load(ModelConfig(path=str(folder)), config, decode)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    found = engine.generate([[4, 5] * 6] * 8, params)
    stats = engine.take_stats()
    assert 0 < stats.accepted <= stats.drafted <= 16 * stats.steps
    plain = _engine(folder, {"kind": "none"}).generate([[4, 5] * 6] * 8, params)
    assert _outcomes(found) == _outcomes(plain)


def test_sampling_with_a_drafter_has_the_models_distribution(folder: Path) -> None:
    """Chi-square of the second token over many rows against the distribution that logprobs tell."""
    rows, prompt = 1500, [5, 9, 5, 9, 5]
    engine = _engine(folder, _draft("lookup", folder), rows=64)
    params = SamplingParams(max_tokens=3, temperature=1.0, ignore_eos=True)
    found = engine.generate([prompt] * rows, params)
    assert engine.take_stats().drafted > 0
    first = Counter(samples[0].token_ids[0] for samples in found)  # type: ignore[index]
    token, count = first.most_common(1)[0]
    second = Counter(
        samples[0].token_ids[1]  # type: ignore[index]
        for samples in found
        if samples[0].token_ids and samples[0].token_ids[0] == token
    )
    plain = _engine(folder, {"kind": "none"})
    asked = SamplingParams(max_tokens=1, logprobs=20, ignore_eos=True)
    ((told,),) = plain.generate([[*prompt, token]], asked)
    assert told.logprobs is not None
    likely = {
        one: math.exp(logprob) for one, logprob in told.logprobs[0].top if math.exp(logprob) * count >= 5
    }
    likely_count = sum(second[one] for one in likely)
    statistic = sum((second[one] - count * share) ** 2 / (count * share) for one, share in likely.items())
    rest = count * (1 - sum(likely.values()))
    statistic += (count - likely_count - rest) ** 2 / max(rest, 1)
    assert statistic < len(likely) + 4 * math.sqrt(2 * len(likely))  # four deviations


def test_a_broken_label_and_too_many_branches_are_named(folder: Path, tmp_path: Path) -> None:
    _save_adapter(folder, tmp_path, tensors_fingerprint(folder))
    with pytest.raises(ConfigError, match="branches: 49 is more than the 48"):
        _engine(folder, {"kind": "kangaroo", "path": str(tmp_path), "branches": 49})
    shipped = resolve("smollm2-135m-instruct")
    with pytest.raises(ConfigError, match="branches: 20000 is more than the 10240"):
        check_files(AutoDraft(kind="auto", branches=20000), shipped, full_depth(30))
    label = json.loads((tmp_path / "kangaroo.json").read_text())
    (tmp_path / "kangaroo.json").write_text(json.dumps({**label, "exit_layer": LAYERS}))
    with pytest.raises(ModelError, match=f"follows layer {LAYERS} of a model that has {LAYERS}"):
        check_files(KangarooDraft(kind="kangaroo", path=str(tmp_path)), folder, full_depth(LAYERS))
    (tmp_path / "kangaroo.json").write_text(json.dumps({**label, "exit_layer": "2"}))
    with pytest.raises(ModelError, match=r"kangaroo\.json needs the keys .*exit_layer \(int\)"):
        check_files(KangarooDraft(kind="kangaroo", path=str(tmp_path)), folder, full_depth(LAYERS))
    (tmp_path / "kangaroo.json").write_text('{"base": "tiny"}')
    with pytest.raises(ModelError, match=r"kangaroo\.json needs the keys base \(str\), .*exit_layer \(int\)"):
        _engine(folder, {"kind": "kangaroo", "path": str(tmp_path)})


def test_a_damaged_adapter_and_the_folder_above_one_are_named(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "exit-2" / "kangaroo.safetensors"
    _save_adapter(folder, weights.parent, tensors_fingerprint(folder))
    with pytest.raises(ModelError, match=r"no kangaroo\.json; did you mean .*exit-2\?"):
        check_files(KangarooDraft(kind="kangaroo", path=str(tmp_path)), folder, full_depth(LAYERS))
    check_files(KangarooDraft(kind="kangaroo", path=str(weights.parent)), folder, full_depth(LAYERS))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"kangaroo\.safetensors is damaged"):
        check_files(KangarooDraft(kind="kangaroo", path=str(weights.parent)), folder, full_depth(LAYERS))


def test_a_drafts_step_as_one_call_does_what_its_operations_do(folder: Path) -> None:
    decoder = Decoder(*load(folder, torch.bfloat16, torch.device("cpu")), folder=folder)
    whole = load_kangaroo(decoder, folder / "adapter")
    if not isinstance(whole._draft, CpuDraftStep):
        pytest.skip("a library's products are used on this processor")
    apart = copy(whole)
    apart._draft = DraftStep(
        *(getattr(whole._draft, name) for name in ("layers", "exit_layer", "adapter", "head"))
    )
    table_rows, index = torch.tensor([2, 0]), torch.arange(10)
    ids = torch.randint(VOCAB, (10,), generator=torch.Generator().manual_seed(0))
    spans = [Span(0, 5, table_rows, 64)]
    batch = TokenBatch(ids, torch.arange(5).repeat(2), table_rows.repeat_interleave(5), spans, index)
    found = []
    for one, threads, after in ((apart, 1, [9, 3]), (whole, 1, [9, 3]), (whole, 2, [9, 3]), (whole, 2, [])):
        cache = decoder.new_cache(1)
        cache.fill(3, 64)
        with decoder.backend.threads(threads), torch.inference_mode():
            x, tokens, chances = one.step(batch, cache, after, 3)
        used = range(decoder.depth)[whole.exit_layer :]
        assert not any(cache.keys[cache.table[layer].long()].any() for layer in used)
        found.append((x, cache.keys, cache.values, torch.tensor(chances), tokens))
        assert len(tokens) == len(after)
    for mine, own in zip(found[1][:4], found[0], strict=False):
        torch.testing.assert_close(mine, own, atol=0.03, rtol=0.03)
    assert found[1][4] == found[0][4]
    assert all(torch.equal(mine, own) for mine, own in zip(found[2][:4], found[1], strict=False))
    assert all(torch.equal(mine, own) for mine, own in zip(found[3][:3], found[1], strict=False))


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    _save_adapter(folder, tmp_path, "another")
    with pytest.raises(ModelError, match="another model"):
        _engine(folder, {"kind": "kangaroo", "path": str(tmp_path)})


def test_a_model_without_a_shipped_adapter_says_so(folder: Path) -> None:
    with pytest.raises(ModelError, match="nothing ships for this model that drafts as kangaroo"):
        _engine(folder, {"kind": "kangaroo"})


def test_a_draft_model_may_lack_the_padding_of_a_larger_ones_embeddings(folder: Path, tmp_path: Path) -> None:
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    model = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "small")
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    for name in ("small", "padded"):
        tokenizer.save_pretrained(tmp_path / name)
    prompts, params = [*_prompts(), [4, VOCAB + 1, 5]], SamplingParams(max_tokens=30, ignore_eos=True)
    plain, drafting = (
        _engine(tmp_path / "padded", draft)
        for draft in ({"kind": "none"}, {"kind": "draft_model", "model": {"path": str(tmp_path / "small")}})
    )
    assert _outcomes(drafting.generate(prompts, params)) == _outcomes(plain.generate(prompts, params))
    assert (drafting.take_stats().mean_accepted or 0) > 2
    drafting.generate(prompts[-1:], params)
    assert drafting.take_stats().drafted == 0


def test_a_draft_model_with_other_tokens_is_refused(folder: Path, tiny_llama: Callable[..., Path]) -> None:
    other = tiny_llama("other", 1, vocab_size=VOCAB + 3, max_position_embeddings=64)
    with pytest.raises(ModelError, match="same tokenizer"):
        _engine(folder, {"kind": "draft_model", "model": {"path": str(other)}})
    draft = DecodeConfig.model_validate(
        {"draft": {"kind": "draft_model", "model": {"path": str(other)}}}
    ).draft
    with pytest.raises(ModelError, match="same tokenizer"):
        check_files(draft, folder, full_depth(LAYERS))
    (other / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Run", null]}}')
    with pytest.raises(ModelError, match="custom code"):
        check_files(draft, folder, full_depth(LAYERS))


def test_skipping_a_layer_that_drafts_is_refused(folder: Path) -> None:
    decode = DecodeConfig.model_validate(
        {"draft": _draft("kangaroo", folder), "skip": {**POLICIES["skip"], "warmup": 1}}
    )
    with pytest.raises(ConfigError, match="keeps the bottom 2"):
        Engine.load(ModelConfig(path=str(folder)), None, decode)
    with pytest.raises(ConfigError, match="keeps the bottom 2"):
        check_files(decode.draft, folder, skip_policy(decode.skip, LAYERS))


def test_a_job_may_go_on_with_another_drafter() -> None:
    def record(*overrides: str) -> JobRecord:
        job = load_config(
            ROOT / "configs/quickstart.yaml", [f"input.path={ROOT}/configs/data/quickstart.jsonl", *overrides]
        )
        return make_plan(job).record

    plain = record()
    for draft in ("{kind: lookup}", "{kind: auto, branches: 3}"):
        assert differences(plain, record(f"decode.draft={draft}")) == []
    skipping = differences(plain, record("decode.skip={kind: unified, speedup: 2}"))
    assert [name.split()[0] for name in skipping] == ["decode.skip.kind", "decode.skip.speedup"]


def _row(prompt: list[int], generated: list[int]) -> Sequence:
    row = Sequence(0, Prompt(0, prompt, SamplingParams(max_tokens=64), 0), 0, 256)
    row.generated = generated
    return row


def test_lookup_follows_the_longest_suffix() -> None:
    index = Index(3, 1)
    row = _row([1, 2, 3, 9, 2, 3, 5, 6], [1, 2, 3])
    assert index.copies(row, 3) == [Continuation([9, 2, 3], 3, 0)]
    row.generated += [5]
    assert index.copies(row, 3) == [Continuation([6, 1, 2], 3, 0)]
    row.generated += [77]
    assert index.copies(row, 3) == []


def test_lookup_tells_other_continuations_after_the_best() -> None:
    row = _row([1, 2, 3, 9, 2, 3, 5, 6, 2, 7], [1, 2])
    assert Index(2, 9).copies(row, 2) == [Continuation([3, 9], 2, 0), Continuation([7, 1], 1, 0)]
    assert Index(1, 9).copies(row, 1) == [Continuation([7], 1, 0), Continuation([3], 1, 1)]


def test_lookup_goes_on_in_circles() -> None:
    assert Index(2, 1).copies(_row([4, 1, 2, 1, 2], []), 5) == [Continuation([1, 2, 1, 2, 1], 2, 0)]


@pytest.mark.parametrize("kind", ["kangaroo", "auto", "draft_model"])
def test_long_texts_are_caught_up_on_piece_by_piece(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kangaroo", "draft_model"):
        monkeypatch.setattr(f"rayskip.decode.drafters.{module}.MISSED", 8)
    prompts, params = [list(range(3, 53)), list(range(5, 59))], SamplingParams(max_tokens=40, ignore_eos=True)
    plain = _engine(folder, {"kind": "none"}, rows=2).generate(prompts, params)
    engine = _engine(folder, _draft(kind, folder), rows=2)
    for worker in engine._workers:
        if isinstance(worker._drafter, AutoDrafter):
            worker._drafter._costs = StepCosts((1, 64), (1.0, 1.01))
    assert _outcomes(engine.generate(prompts, params)) == _outcomes(plain)
    assert engine.take_stats().drafted_by[kind if kind == "draft_model" else "kangaroo"] > 0


@pytest.mark.parametrize(("seconds_of_64", "asked"), [(1.01, True), (64.0, False)])
def test_auto_asks_kangaroo_only_where_its_tokens_may_pay(
    folder: Path, seconds_of_64: float, asked: bool
) -> None:
    engine = _engine(folder, _draft("auto", folder), rows=2)
    for worker in engine._workers:
        assert isinstance(worker._drafter, AutoDrafter)
        worker._drafter._costs = StepCosts((1, 64), (1.0, seconds_of_64))
    engine.generate([list(range(3, 12)), list(range(20, 30))], SamplingParams(max_tokens=20, ignore_eos=True))
    assert ("kangaroo" in engine.take_stats().drafted_by) is asked


def test_auto_learns_prices_from_steps_without_prompts(folder: Path) -> None:
    engine = _engine(folder, _draft("auto", folder), rows=1)
    drafter = engine._workers[0]._drafter
    assert isinstance(drafter, AutoDrafter)
    before = drafter._costs
    engine.generate([list(range(3, 50))], SamplingParams(max_tokens=1))
    assert drafter._costs == before
    engine.generate([list(range(3, 12))], SamplingParams(max_tokens=4, ignore_eos=True))
    assert drafter._costs != before


def test_retrieval_copies_from_other_texts() -> None:
    store = Store(limit=100)
    store.add([7, 1, 2, 3, 4, 5])
    store.add([8, 8, 9])
    assert store.propose([9, 2, 3], 2) == [4, 5]
    assert store.propose([7, 1], 1) == [2]
    assert store.propose([3, 4], 5) == [5]  # not on into another text
    assert store.propose([3], 2) == []
    store.add(range(100))
    assert store.propose([50, 51], 1) == [52]
    assert store.propose([7, 1], 1) == []


def test_retrieval_keeps_its_corpus(tmp_path: Path) -> None:
    """However many completions it has learnt and forgotten since."""
    sizes = EngineConfig(max_batch_rows=1)
    plain = Engine.load("smollm2-135m-instruct", sizes)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompt = "one, two, three, four, five, six, seven,"
    ((told,),) = plain.generate([prompt], params)
    (tmp_path / "corpus.txt").write_text(f"{prompt}{told.text}".replace("\n", " "))
    draft = {"kind": "retrieval", "corpus": str(tmp_path / "corpus.txt"), "max_tokens": 30}
    engine = Engine(plain.decoder, plain.tokenizer, sizes, DecodeConfig.model_validate({"draft": draft}))
    accepted = []
    for other in ("The sea is", "Once upon a time", "Dear sir,"):
        engine.generate([prompt], params)
        accepted.append(engine.take_stats().accepted)
        engine.generate([other], params)
    assert min(accepted) > 5


def test_retrieval_learns_from_completions_that_ended(folder: Path) -> None:
    engine = _engine(folder, {"kind": "retrieval"}, rows=1)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.generate([[5, 6, 7, 8]], params)
    assert engine.take_stats().drafted == 0
    engine.generate([[5, 6, 7, 8]], params)
    assert engine.take_stats().accepted == 6  # all but the first and the last token
