"""What the contract promises (model/backends/base.py), on every backend at hand, against forwards of its own kind
that are slow and obvious: parity, invariance, trees, skipping, pages taken and given up, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_double import CudaOnCpu, flash_attention_on_cpu
from reference import reference_logits
from test_families import CONFIGS, new_peer

from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.model.backends.base import Backend
from rayskip.model.backends.choose import choose_backend
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.checkpoint import load, tensors_fingerprint
from rayskip.model.decoder import Decoder
from rayskip.model.invariance import is_batch_invariant
from rayskip.model.spec import Spec, Weights
from rayskip.model.token_batch import Span, TokenBatch
from rayskip.model.trained import MedusaLabel, save_trained
from rayskip.skip import skip_policy

CPU = torch.device("cpu")
VOCAB, LAYERS, WIDTH = 199, 4, 64
SKIP = {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": 12}}
AT_HAND = ["torch", "cpu", "cuda on a cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NewBackend = Callable[[Spec, Weights], Backend]
with_experts = pytest.mark.parametrize(
    "folder", ["full attention", "windows", "experts"], indirect=True, scope="module"
)


@pytest.fixture(params=AT_HAND)
def new_backend(request: pytest.FixtureRequest) -> Iterator[NewBackend]:
    name: str = request.param

    def make(spec: Spec, weights: Weights) -> Backend:
        dtype, device = weights.embed.dtype, weights.embed.device
        match name:
            case "torch":
                return TorchBackend(spec, dtype, device)
            case "cuda on a cpu":
                return CudaOnCpu(spec, dtype, None)
            case _:
                return choose_backend(spec, dtype, device)

    with flash_attention_on_cpu() if name == "cuda on a cpu" else nullcontext():
        yield make


@pytest.fixture(scope="module", params=["full attention", "windows"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and heads for trees of drafts."""
    from transformers import AutoModelForCausalLM, MistralConfig, Qwen2MoeConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    experts = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    }
    config = (
        Qwen2MoeConfig(**sizes, **experts)
        if request.param == "experts"
        else MistralConfig(**sizes, sliding_window=13 if request.param == "windows" else None)
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    label = MedusaLabel("tiny", tensors_fingerprint(folder), VOCAB, 0, 0.0, heads=3)
    heads = {
        "weights": torch.zeros(3, WIDTH, WIDTH),
        "biases": torch.zeros(3, WIDTH),
        "token_ids": torch.arange(VOCAB),
    }
    save_trained(folder / "heads", label, heads)
    return folder


def _decoder(folder: Path, new_backend: NewBackend, dtype: torch.dtype = torch.float32) -> Decoder:
    spec, weights = load(folder, dtype, CPU)
    return Decoder(spec, weights, new_backend(spec, weights), folder)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, 190, (length,), generator=generator).tolist() for length in (5, 70, 1, 40, 9, 40)
    ]


def _tokens(decoder: Decoder, decode: dict[str, Any], **sizes: Any) -> list[list[int]]:
    engine = Engine(decoder, None, EngineConfig(**sizes), DecodeConfig.model_validate(decode))
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (30, 9, 70, 17, 6, 25)]
    return [samples[0].token_ids or [] for samples in engine.generate(_prompts(), params)]


@with_experts
@pytest.mark.parametrize("skipping", [False, True])
def test_logits_equal_a_forward_without_a_cache(
    skipping: bool, folder: Path, new_backend: NewBackend
) -> None:
    """A prompt in two parts, then tokens one by one; each skips the layers that its position skips."""
    decoder = _decoder(folder, new_backend)
    policy = skip_policy(DecodeConfig.model_validate(SKIP if skipping else {}).skip, LAYERS)
    prompt, length = 70, 84
    tokens = torch.randint(3, 190, (length,), generator=torch.Generator().manual_seed(2))
    cache = decoder.new_cache()
    cache.fill(3, length)
    found = []
    for start, stop in ((0, 41), (41, prompt), *((at, at + 1) for at in range(prompt, length))):
        runs = [stop - 1 < prompt or layer in policy.layers(stop - 1 - prompt) for layer in range(LAYERS)]
        batch = TokenBatch(
            tokens[start:stop],
            torch.arange(start, stop),
            torch.full((stop - start,), 1),
            [Span(0, stop - start, torch.tensor([1]), 128)],
            torch.arange(stop - start),
            [(stop - start) * own for own in runs],
        )
        found.append(decoder.logits(decoder.hidden(batch, cache)))
    expected = reference_logits(
        decoder.spec,
        decoder.weights,
        tokens.tolist(),
        lambda layer, position: position < prompt or layer in policy.layers(position - prompt),
    )
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["cohere2", "granite", "hunyuan_v1_dense", "olmo3"])
def test_every_part_of_a_layer_is_served(name: str, new_backend: NewBackend, tmp_path: Path) -> None:
    """Norms before and after, over each head and over all, before rope and after it, or shared by two branches;
    layers without rope; windows; scaled logits."""
    new_peer(CONFIGS[name]).save_pretrained(tmp_path)
    tokens = torch.randint(3, 190, (80,), generator=torch.Generator().manual_seed(2))
    decoder = _decoder(tmp_path, new_backend)
    cache = decoder.new_cache()
    cache.fill(2, len(tokens))
    found = []
    for start, stop in ((0, 70), *((at, at + 1) for at in range(70, 80))):
        row, places = torch.ones(stop - start, dtype=torch.long), torch.arange(start, stop)
        batch = TokenBatch(
            tokens[start:stop], places, row, [Span(0, stop - start, torch.tensor([1]), 128)], places - start
        )
        found.append(decoder.logits(decoder.hidden(batch, cache)))
    expected = reference_logits(decoder.spec, decoder.weights, tokens.tolist())
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=2e-4)


@with_experts
def test_a_row_has_the_same_bits_alone_and_in_a_batch(folder: Path, new_backend: NewBackend) -> None:
    """In float32 a library's products in attention may not have them, which a report says."""
    assert is_batch_invariant(_decoder(folder, new_backend, torch.bfloat16))


@pytest.mark.parametrize("decode", [{}, SKIP], ids=["full depth", "skipping"])
def test_tokens_are_the_same_while_pages_are_taken_and_given_up(
    decode: dict[str, Any], folder: Path, new_backend: NewBackend
) -> None:
    """The least memory holds the longest row and no more, so rows give their pages up and begin anew."""
    decoder = _decoder(folder, new_backend)
    alone = _tokens(decoder, decode, max_batch_rows=1)
    layout = decoder.backend.layout
    together = {"max_batch_rows": 6, "max_model_len": 128, "kv_cache_gb": 1e-9}
    engine = Engine(decoder, None, EngineConfig(**together), DecodeConfig.model_validate(decode))
    assert engine.sizes.pages < 6 * LAYERS * (layout.blocks(128) + 1)
    assert _tokens(decoder, decode, **together) == alone
    assert _tokens(decoder, decode, max_batch_rows=3, max_batch_tokens=16) == alone


@pytest.mark.parametrize(
    "draft", [{"kind": "lookup"}, {"kind": "medusa", "branches": 3}], ids=["chain", "tree"]
)
@pytest.mark.parametrize("skip", [{}, SKIP], ids=["full depth", "skipping"])
def test_drafts_change_no_token(
    draft: dict[str, Any], skip: dict[str, Any], folder: Path, new_backend: NewBackend
) -> None:
    decoder = _decoder(folder, new_backend)
    if draft["kind"] == "medusa":
        draft = draft | {"path": str(folder / "heads")}
    sizes = {"max_batch_rows": 3, "max_batch_tokens": 64}
    assert _tokens(decoder, skip | {"draft": draft}, **sizes) == _tokens(decoder, skip, **sizes)


def test_what_the_head_says_is_what_its_logits_say(folder: Path, new_backend: NewBackend) -> None:
    decoder = _decoder(folder, new_backend)
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))
    x[7] = torch.nan
    finite = [row for row in range(40) if row != 7]
    logits = decoder.logits(x)
    for full in ([], [3, 9], list(range(40))):
        output = decoder.head_output(x, full)
        assert output.best[7].isnan()
        assert torch.equal(output.best[finite], logits[finite].amax(dim=1))
        assert torch.equal(output.argmax[finite], logits[finite].argmax(dim=1))
        torch.testing.assert_close(output.of(full), logits[full], atol=0, rtol=0, equal_nan=True)
    places, chances = decoder.head.top_k(x[finite], 3)
    expected = logits[finite].softmax(dim=-1).topk(3)
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(chances, expected.values)


def test_samples_are_those_of_the_reference(folder: Path, new_backend: NewBackend) -> None:
    """In float32 logits differ in the last bits alone, which moves no draw of these."""

    def sampled(decoder: Decoder) -> list[list[int]]:
        engine = Engine(decoder, None, EngineConfig(max_batch_rows=4))
        params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, n=2, ignore_eos=True, seed=5)
        return [one.token_ids or [] for samples in engine.generate(_prompts(), params) for one in samples]

    reference = _decoder(folder, lambda spec, weights: TorchBackend(spec, weights.embed.dtype, CPU))
    assert sampled(_decoder(folder, new_backend)) == sampled(reference)
