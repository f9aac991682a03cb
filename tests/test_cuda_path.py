"""What only CUDA runs, on CPU: FlashAttention's call with a slow function that does as torch documents it, and CUDA
graphs with calls that are made again. A GPU's own kernels are not tested here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.model.checkpoint import load, tensors_fingerprint
from rayskip.model.compiled import compile_pieces
from rayskip.model.forward import Decoder
from rayskip.model.graphs import GraphedLayers
from rayskip.model.invariance import is_batch_invariant
from rayskip.model.medusa import MedusaLabel
from rayskip.model.ops import Ops
from rayskip.model.trained import save_trained
from rayskip.model.varlen import PAGE, VarlenOps, varlen_ops

CPU = torch.device("cpu")
DECODE: list[dict[str, Any]] = [
    {},
    {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": 12}},
    {"draft": {"kind": "lookup"}},
    {"draft": {"kind": "lookup"}, "skip": {"kind": "skipdecode", "speedup": 2, "horizon": 12}},
    {"draft": {"kind": "medusa", "branches": 3}},
]


def documented_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """Row by row and head by head; queries [Tq, Hq, D], pages [pages, positions, Hkv, D] -> [Tq, Hq, D]."""
    assert cu_seq_k is None
    assert num_splits == 1
    assert key.shape[1] % PAGE == 0
    assert {tensor.dtype for tensor in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert enable_gqa or query.shape[1] == key.shape[2]
    shared = query.shape[1] // key.shape[2]
    out = torch.empty_like(query)
    for row, (start, stop) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q[1:].tolist(), strict=False)):
        used = int(seqused_k[row])
        assert stop - start <= max_q
        assert used <= max_k
        keys, values = (stored[block_table[row].long()].flatten(0, 1)[:used] for stored in (key, value))
        for query_at in range(start, stop):
            seen = used - (stop - query_at) + 1 + window_size[1]  # the last query sees the last key
            first = 0 if window_size[0] < 0 else max(seen - 1 - window_size[0], 0)
            for head in range(query.shape[1]):
                scores = keys[first:seen, head // shared] @ query[query_at, head] * scale
                out[query_at, head] = scores.softmax(0) @ values[first:seen, head // shared]
    return out


def recorded_again(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    out = work()

    def again() -> None:
        out.copy_(work())

    return out, again


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


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("window", [None, 13])
def test_tokens_are_those_of_torchs_attention(
    window: int | None, decode: dict[str, Any], graphs: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    label = MedusaLabel("tiny", tensors_fingerprint(tmp_path), 199, 0, 0.0, heads=3)
    heads = {"weights": torch.zeros(3, 64, 64), "biases": torch.zeros(3, 64), "token_ids": torch.arange(199)}
    save_trained(tmp_path / "heads", label, heads)
    if decode.get("draft", {}).get("kind") == "medusa":
        decode = {"draft": {**decode["draft"], "path": str(tmp_path / "heads")}}
    spec, weights = load(tmp_path, torch.float32, CPU)
    plain = Decoder(spec, weights, Ops(spec), tmp_path)
    fast = Decoder(spec, weights, VarlenOps(spec, documented_varlen_attn), tmp_path)
    recorded = []

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        recorded.append(work)
        return recorded_again(work)

    fast.graphs = GraphedLayers(record) if graphs else None
    assert _generate(fast, decode) == _generate(plain, decode)
    branches = "branches" in decode.get("draft", {})
    assert bool(recorded) is (graphs and not branches)


def test_where_flash_attention_cannot_run_torchs_attention_serves(
    tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    spec, _ = load(tiny_llama("cuda", 0), torch.bfloat16, CPU)
    assert varlen_ops(spec, torch.bfloat16, CPU).name == "torch"
    assert "does not serve here" in caplog.text
    assert varlen_ops(spec, torch.float32, CPU).name == "torch"


@pytest.fixture
def fused(tiny_llama: Callable[..., Path]) -> tuple[Decoder, Decoder]:
    """A model with compiled pieces, and the same without."""
    spec, weights = load(tiny_llama("compiled", 0, initializer_range=0.3), torch.bfloat16, CPU)
    fused, plain = (Decoder(spec, weights, Ops(spec)) for _ in range(2))
    compile_pieces(fused.ops, spec, weights, fused._ropes)
    assert set(vars(fused.ops)) - set(vars(plain.ops)) == {"normalise", "gate", "turn"}
    return fused, plain


def test_compiled_pieces_are_torchs_for_any_number_of_tokens(fused: tuple[Decoder, Decoder]) -> None:
    decoder, plain = fused
    norm, rope = decoder.weights.layers[0].attn_norm, decoder.rope("default")
    assert rope is not None
    generator = torch.Generator().manual_seed(0)
    x, branch, up = (torch.randn(9, size, generator=generator).bfloat16() for size in (64, 64, 192))
    q, k = torch.split(torch.randn(9, 6, 16, generator=generator).bfloat16(), [4, 2], dim=1)

    @torch.inference_mode()
    def pieces(ops: Ops, tokens: slice) -> list[Tensor]:
        own, apart = x[tokens].clone(), x[tokens] + branch[tokens]
        normed = [ops.add_normalise(own, branch[tokens], norm), ops.add_normalise(apart, None, norm)]
        assert torch.equal(*normed)  # a layer that some tokens skip adds by itself
        turned = ops.turn(q[tokens], k[tokens], rope, torch.arange(9)[tokens])
        return [own, *normed, ops.gate(up[tokens]), *turned]

    every = pieces(decoder.ops, slice(None))
    for found, expected in zip(every, pieces(plain.ops, slice(None)), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    for tokens in (slice(4, 5), slice(2, 4), slice(0, 8)):
        for found, together in zip(pieces(decoder.ops, tokens), every, strict=True):
            assert torch.equal(found, together[tokens])


@pytest.mark.parametrize("decode", [DECODE[0], DECODE[3]])
def test_compiled_pieces_keep_rows_apart(fused: tuple[Decoder, Decoder], decode: dict[str, Any]) -> None:
    decoder, _ = fused
    assert is_batch_invariant(decoder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 190, (length,), generator=generator).tolist() for length in (5, 21, 1, 40, 9)]
    params = SamplingParams(max_tokens=14, logprobs=1, ignore_eos=True)
    found = []
    for rows in (1, 5):
        sizes = EngineConfig(max_batch_rows=rows)
        engine = Engine(decoder, None, sizes, DecodeConfig.model_validate(decode))
        found.append([(row[0].token_ids, row[0].logprobs) for row in engine.generate(prompts, params)])
    assert found[0] == found[1]


def test_without_a_compiler_nothing_changes(
    tiny_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load(tiny_llama("uncompiled", 0), torch.bfloat16, CPU)
    decoder = Decoder(spec, weights, Ops(spec))
    before = dict(vars(decoder.ops))

    def broken(*_: Any) -> Any:
        raise FileNotFoundError("cc")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    compile_pieces(decoder.ops, spec, weights, decoder._ropes)
    assert "does not serve here" in caplog.text
    assert vars(decoder.ops) == before
