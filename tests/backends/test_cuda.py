"""What only CUDA runs, on CPU (see cuda_double.py). A GPU's own kernels are not tested here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_double import CudaOnCpu, flash_attention_on_cpu, recorded_again
from torch import Tensor

from rayskip.cluster.replica import device_for
from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine, engine
from rayskip.errors import ConfigError, ModelError
from rayskip.model.backends.choose import BACKENDS
from rayskip.model.backends.cuda import backend as cuda
from rayskip.model.backends.cuda.backend import cuda_backend
from rayskip.model.backends.cuda.compiled import compile_pieces
from rayskip.model.backends.torch import TorchBackend
from rayskip.model.checkpoint import load, tensors_fingerprint, weight_bytes
from rayskip.model.decoder import Decoder
from rayskip.model.invariance import is_batch_invariant
from rayskip.model.spec import Spec, Weights
from rayskip.model.trained import MedusaLabel, save_trained

CPU = torch.device("cpu")
DECODE: list[dict[str, Any]] = [
    {},
    {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": 12}},
    {"draft": {"kind": "lookup"}},
    {"draft": {"kind": "lookup"}, "skip": {"kind": "skipdecode", "speedup": 2, "horizon": 12}},
    {"draft": {"kind": "medusa", "branches": 3}},
]


@pytest.fixture
def flash() -> Iterator[None]:
    with flash_attention_on_cpu():
        yield


def _generate(decoder: Decoder, decode: dict[str, Any]) -> list[list[int]]:
    engine = Engine(
        decoder,
        None,
        EngineConfig(max_batch_rows=3, max_batch_tokens=16),
        DecodeConfig.model_validate(decode),
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in (5, 21, 1, 40, 9)]
    params = [SamplingParams(max_tokens=count, temperature=0) for count in (17, 6, 12, 9, 20)]
    return [samples[0].token_ids or [] for samples in engine.generate(prompts, params)]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention sees so many tokens back, and heads for trees of drafts."""
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=request.param,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    label = MedusaLabel("tiny", tensors_fingerprint(folder), 199, 0, 0.0, heads=3)
    heads = {"weights": torch.zeros(3, 64, 64), "biases": torch.zeros(3, 64), "token_ids": torch.arange(199)}
    save_trained(folder / "heads", label, heads)
    return folder


@cache
def _tokens_of_torchs_attention(folder: Path, decode: str) -> list[list[int]]:
    spec, weights = load(folder, torch.float32, CPU)
    plain = Decoder(spec, weights, TorchBackend(spec, torch.float32, CPU), folder)
    return _generate(plain, json.loads(decode))


@pytest.mark.parametrize(
    ("folder", "decode", "graphs", "paged"),
    [
        *(
            (window, decode, graphs, True)
            for window in (None, 13)
            for decode in DECODE
            for graphs in (False, True)
        ),
        (13, DECODE[0], True, False),
        (None, DECODE[4], False, False),
    ],
    indirect=["folder"],
)
def test_tokens_are_those_of_torchs_attention(
    folder: Path,
    decode: dict[str, Any],
    graphs: bool,
    paged: bool,
    monkeypatch: pytest.MonkeyPatch,
    flash: None,
) -> None:
    monkeypatch.setattr(cuda, "PAGED", paged)
    if decode.get("draft", {}).get("kind") == "medusa":
        decode = {"draft": {**decode["draft"], "path": str(folder / "heads")}}
    spec, weights = load(folder, torch.float32, CPU)
    recorded = []

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        recorded.append(work)
        return recorded_again(work)

    fast = Decoder(spec, weights, CudaOnCpu(spec, torch.float32, record if graphs else None), folder)
    assert _generate(fast, decode) == _tokens_of_torchs_attention(folder, json.dumps(decode))
    branches = "branches" in decode.get("draft", {})
    assert bool(recorded) is (graphs and not branches)


def test_flash_attention_serves_where_it_agrees_with_torchs(
    tiny_llama: Callable[..., Path], flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = load(tiny_llama("cuda", 0), torch.bfloat16, CPU)
    for paged in (True, False):
        monkeypatch.setattr(cuda, "PAGED", paged)
        fast = cuda_backend(spec, torch.bfloat16, CPU)
        assert (fast.name, fast.warnings) == ("varlen", [])
    monkeypatch.setattr(cuda, "varlen_attn", lambda q, *_, **__: q * 9)
    wrong = cuda_backend(spec, torch.bfloat16, CPU)
    assert wrong.name == "torch"
    assert "off by up to" in wrong.warnings[0]


def test_where_flash_attention_cannot_run_torchs_attention_serves_and_the_reason_is_a_fact(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load(tiny_llama("cuda", 0), torch.bfloat16, CPU)
    monkeypatch.setitem(BACKENDS, "cpu", cuda_backend)  # what a decoder asks on a GPU
    model = Decoder(spec, weights)
    assert model.backend.name == "torch"
    (said,) = model.backend.warnings
    assert "does not serve here" in said
    assert "FlashAttention has no float32" in cuda_backend(spec, torch.float32, CPU).warnings[0]
    capped = replace(spec, attn_softcap=20.0)
    assert "no softcap" in cuda_backend(capped, torch.bfloat16, CPU).warnings[0]


def test_the_job_chooses_between_cpu_and_gpu() -> None:
    """Not what happens to be visible: no GPU is never taken, nor silently missed."""
    assert device_for(0) == "cpu"
    if torch.cuda.is_available():
        assert device_for(0.5) == "cuda"
    else:
        with pytest.raises(
            ConfigError, match=r"gpus_per_replica: 0\.5, but .* cannot use a GPU: .*; 0 runs on CPU"
        ):
            device_for(0.5)


def test_a_model_too_large_for_a_gpu_is_one_message_before_it_loads(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama("large", 0, vocab_size=199)
    weights = 199 * 64 + 64 + 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64)
    assert weight_bytes(folder, "bfloat16") == 2 * weights
    assert weight_bytes(folder, "float32") == 4 * weights
    monkeypatch.setattr(engine, "open_device", torch.device)  # there need be none
    monkeypatch.setattr(engine, "free_bytes", lambda place: 2 * weights - 1)
    with pytest.raises(
        ModelError, match=r"needs 0\.0 GB for its weights in bfloat16, and 0\.0 GB .* are free"
    ):
        Engine.load(folder, device="cuda")


@pytest.fixture(scope="module")
def fused(tiny_llama: Callable[..., Path]) -> tuple[Decoder, Decoder]:
    """A model with compiled pieces, and the same without."""
    spec, weights = load(tiny_llama("compiled", 0, initializer_range=0.3), torch.bfloat16, CPU)
    fused, plain = (_torch_decoder(spec, weights) for _ in range(2))
    backend = _torch_backend(fused)
    compile_pieces(backend)
    assert set(vars(backend)) - set(vars(plain.backend)) == {"normalise", "gate", "turn"}
    return fused, plain


def _torch_decoder(spec: Spec, weights: Weights) -> Decoder:
    return Decoder(spec, weights, TorchBackend(spec, weights.embed.dtype, CPU))


def _torch_backend(decoder: Decoder) -> TorchBackend:
    assert isinstance(decoder.backend, TorchBackend)
    return decoder.backend


def test_compiled_pieces_are_torchs_for_any_number_of_tokens(fused: tuple[Decoder, Decoder]) -> None:
    decoder, plain = fused
    norm, rope = decoder.weights.layers[0].attn_norm, _torch_backend(decoder).ropes["default"]
    generator = torch.Generator().manual_seed(0)
    x, branch, up = (torch.randn(9, size, generator=generator).bfloat16() for size in (64, 64, 192))
    q, k = torch.split(torch.randn(9, 6, 16, generator=generator).bfloat16(), [4, 2], dim=1)

    @torch.inference_mode()
    def pieces(ops: TorchBackend, tokens: slice) -> list[Tensor]:
        own, apart = x[tokens].clone(), x[tokens] + branch[tokens]
        normed = [ops.add_normalise(own, branch[tokens], norm), ops.add_normalise(apart, None, norm)]
        assert torch.equal(*normed)  # a layer that some tokens skip adds by itself
        turned = ops.turn(q[tokens], k[tokens], rope, torch.arange(9)[tokens])
        return [own, *normed, ops.gate(up[tokens], "silu", True), *turned]

    every = pieces(_torch_backend(decoder), slice(None))
    for found, expected in zip(every, pieces(_torch_backend(plain), slice(None)), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    for tokens in (slice(4, 5), slice(2, 4), slice(0, 8), slice(3, 3)):
        for found, together in zip(pieces(_torch_backend(decoder), tokens), every, strict=True):
            assert torch.equal(found, together[tokens])


def test_compiled_pieces_keep_rows_apart(fused: tuple[Decoder, Decoder]) -> None:
    decoder, _ = fused
    assert is_batch_invariant(decoder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in (5, 21, 1, 40, 9)]
    params = SamplingParams(max_tokens=14, logprobs=1, ignore_eos=True)
    for decode in (DECODE[0], DECODE[3]):
        found = []
        for rows in (1, 5):
            sizes = EngineConfig(max_batch_rows=rows)
            engine = Engine(decoder, None, sizes, DecodeConfig.model_validate(decode))
            found.append([(row[0].token_ids, row[0].logprobs) for row in engine.generate(prompts, params)])
        assert found[0] == found[1]


def test_without_a_compiler_nothing_changes(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load(tiny_llama("uncompiled", 0), torch.bfloat16, CPU)
    backend = _torch_backend(_torch_decoder(spec, weights))
    before = dict(vars(backend))

    def broken(*_: Any) -> Any:
        raise FileNotFoundError("cc")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    assert "does not serve here" in (compile_pieces(backend) or "")
    assert vars(backend) == before
