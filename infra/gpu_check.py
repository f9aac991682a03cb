"""Does rayskip work on this GPU, and how fast? One command of under ten minutes, without Ray, network or data.

python infra/gpu_check.py out/gpu                # all parts; results in out/gpu/gpu_check.md and .json
python infra/gpu_check.py out/cpu --small        # the same on tiny models: to try this script where no GPU is
python infra/gpu_check.py out/gpu --parts parity,invariance

Needs torch, transformers, pydantic, psutil and pyyaml. Each part is a process of its own, with its own time, so
that a kernel that breaks one leaves the others alone; what was found is written after each part. Exits with 1
where a check failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "transformers", "pydantic", "psutil", "yaml", "safetensors")
LENGTHS = (44, 52, 57, 60, 64, 69, 72, 75, 76, 79, 82, 85, 90, 99, 112, 166)
"""Tokens of prompts: every fifteenth part of short instructions in a chat template."""
GRACE_S = 15
"""Seconds that a part may be late before it is stopped."""
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}

TINY: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS: dict[str, Any] = {
    "head_dim": 32,
    "sliding_window": 70,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 12,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 70, "head_dim": 32},
    "qwen3": {"head_dim": 48},
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "gptj": {"rotary_dim": 8},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 32},
    "ministral": {"head_dim": 32},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 96, "init_std": 0.1},
}
"""What a tiny config of a family needs beside TINY."""


class Report:
    """What a part finds, a line each, in a file that its parent reads; `stop`: when its time is over."""

    def __init__(self, file: Path, part: str, seconds: float, small: bool) -> None:
        self.small = small
        self._file, self._part, self._stop = file, part, time.monotonic() + seconds

    def add(self, name: str, ok: bool | None, **facts: Any) -> None:
        """ok: None for what is a fact and no check."""
        line = {"part": self._part, "name": name, "ok": ok, **facts}
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"[{self._part}] {'' if ok is None else 'ok ' if ok else 'FAILED '}{name} {facts}", flush=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._stop - time.monotonic()

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What fails inside is a line, and the next case goes on."""
        try:
            yield
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:600]
            self.add(name, False, error=f"{type(error).__name__}: {said}", at=f"{at.filename}:{at.lineno}")

    def has_time(self, name: str, seconds: float = 0.0) -> bool:
        """Whether a case that takes so long may begin."""
        if self.left > seconds:
            return True
        self.add(name, None, note="not run: no time was left")
        return False


def environment(report: Report) -> None:
    import torch
    import transformers

    facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"transformers": transformers.__version__, "cores": os.cpu_count()}
    for name in ("triton", "ray", "pyarrow"):
        facts[name] = importlib.util.find_spec(name) is not None
    facts["compiler"] = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
    report.add("software", None, **facts)
    with report.case("nvidia-smi"):
        if shutil.which("nvidia-smi"):
            asked = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
            told = subprocess.run(["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True)
            report.add("nvidia-smi", None, said=told.stdout.strip())
    with report.case("rayskip"):
        from rayskip.model.backends.cuda import backend

        options = sorted(backend.OPTIONS)
        report.add("varlen_attn", None, options=options, reads_pages=backend.PAGED)
    if not torch.cuda.is_available():
        report.add("GPU", None if report.small else False, note="torch sees none")
        return
    about = torch.cuda.get_device_properties(0)
    memory = round(about.total_memory / 1e9, 1)
    sm = f"{about.major}.{about.minor}"
    processors = about.multi_processor_count
    report.add("GPU", True, gpu=about.name, sm=sm, processors=processors, memory_gb=memory)
    with report.case("rates"):
        size = 1024 if report.small else 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        seconds = gpu_seconds(lambda: a @ b, 10)
        tflops = round(2 * size**3 / seconds / 1e12, 1)
        copied = round(copy_bytes_s(report.small) / 1e9)
        report.add("rates", None, bf16_tflop_s=tflops, copy_gb_s=copied)


def gpu_seconds(run: Callable[[], Any], count: int) -> float:
    """Of one of `count` runs, by the device's clock; by the host's on a CPU."""
    import torch

    run()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - began) / count
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    stop.record()
    stop.synchronize()
    return max(start.elapsed_time(stop) / 1e3 / count, 1e-9)


def copy_bytes_s(small: bool) -> float:
    """Bytes a second read and written by a copy from device to device."""
    import torch

    size = (1 << 24) if small else (1 << 32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / gpu_seconds(lambda: target.copy_(source), 5)


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_folder(model_type: str, folder: Path, **own: Any) -> Path:
    """A checkpoint in bfloat16 with random weights, norms and biases too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        key: value for key, value in (TINY | OWN.get(model_type, {}) | own).items() if value is not None
    }
    if model_type == "gemma3":
        text = TINY | WINDOWS
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        vision |= {"image_size": 28, "patch_size": 14}
        tokens = {"boi_token_index": 196, "eoi_token_index": 197, "image_token_index": 198}
        values = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 1, **tokens}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def forced_logits(decoder: Any, tokens: Any, prompt: int) -> Any:
    """Logits [steps, R, V] in float32 on the host: of rows of tokens [R, T] whose first `prompt` run together and
    whose others run one by one, all rows in a step."""
    import torch

    from rayskip.model.cache.kv_cache import key_blocks
    from rayskip.model.token_batch import Span, TokenBatch

    rows, length = tokens.shape
    where = decoder.backend.device
    tokens = tokens.to(where)
    cache = decoder.new_cache()
    cache.fill(rows, length)
    index = torch.arange(rows, device=where)
    found = []
    for start, stop in ((0, prompt), *((at, at + 1) for at in range(prompt, length))):
        width = stop - start
        batch = TokenBatch(
            tokens[:, start:stop].flatten(),
            torch.arange(start, stop, device=where).repeat(rows),
            index.repeat_interleave(width),
            [Span(0, width, index, key_blocks(stop))],
            (index + 1) * width - 1,
        )
        found.append(decoder.logits(decoder.hidden(batch, cache)).float().cpu())
    return torch.stack(found)


def parity(report: Report) -> None:
    """Every family in FAMILIES: logits on the device against the reference backend's on the CPU in float32."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from rayskip.model.families import FAMILIES

    with tempfile.TemporaryDirectory() as aside:
        for model_type in FAMILIES:
            if model_type != "gemma3" and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                continue  # of those that also see images their text models are alike
            if not report.has_time(model_type, 3):
                continue
            with report.case(model_type):
                family_parity(report, model_type, tiny_folder(model_type, Path(aside) / model_type))


def family_parity(report: Report, model_type: str, folder: Path) -> None:
    import torch

    from rayskip.model.backends.choose import choose_backend
    from rayskip.model.backends.torch import TorchBackend
    from rayskip.model.checkpoint import load
    from rayskip.model.decoder import Decoder
    from rayskip.model.spec import Experts

    rows, length, prompt = 3, 90, 65
    tokens = torch.randint(3, 190, (rows, length), generator=torch.Generator().manual_seed(1))
    cpu = torch.device("cpu")
    spec, weights = load(folder, torch.float32, cpu)
    reference = TorchBackend(spec, torch.float32, cpu)
    expected = forced_logits(Decoder(spec, weights, reference), tokens, prompt)
    graphed = None
    # rounding may send a token to other experts
    rounded = 0.3 if any(isinstance(layer.mlp, Experts) for layer in weights.layers) else 0.08
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, rounded)):
        _, weights = load(folder, dtype, device())
        backend = choose_backend(spec, dtype, device())
        variants = [("", backend)]
        if backend.name != "torch" and backend.name in ATTENTIONS:
            variants = [(" with graphs", backend), (" without graphs", ungraphed(backend))]
            variants += [("", other) for other in attentions(spec, dtype) if other.name != backend.name]
        for how, own in variants:
            name = f"{model_type} {str(dtype).removeprefix('torch.')} {own.name}{how}"
            with report.case(name):
                decoder = Decoder(spec, weights, own)
                found = forced_logits(decoder, tokens, prompt)
                off = float((found - expected).norm() / expected.norm())
                facts = {"off": round(off, 6), "warnings": own.warnings}
                if "graphs" in how:
                    same = graphed is None or torch.equal(found, graphed)
                    facts["same_bits_with_and_without"] = same
                    off, graphed = off if same else float("inf"), found
                report.add(name, bool(off <= limit), **facts)


ATTENTIONS = ("varlen", "triton")


def attentions(spec: Any, dtype: Any) -> list[Any]:
    """The GPU's backends that have kernels for such a model."""
    from rayskip.model.backends.cuda.backend import CudaBackend, PagedBackend

    return [
        kind(spec, dtype, device()) for kind in (CudaBackend, PagedBackend) if not kind.unfit(spec, dtype)
    ]


def ungraphed(backend: Any) -> Any:
    """The same, its layers launched operation by operation."""
    from rayskip.model.backends.torch import TorchBackend

    kind = type(backend)
    return type("Ungraphed", (kind,), {"stack": TorchBackend.stack})(backend.spec, backend.dtype, device())


def attention_seconds(backend: Any, rows: int, length: int, width: int) -> float:
    """Of attention of the last `width` tokens of rows of `length`, many of them in one CUDA graph."""
    import torch

    from rayskip.model.backends.cuda.backend import Stored
    from rayskip.model.backends.cuda.graphs import cuda_graphs
    from rayskip.model.cache.kv_cache import KVCache, key_blocks
    from rayskip.model.token_batch import Span, TokenBatch

    spec, where, calls = backend.spec, backend.device, 10
    cache = KVCache(spec, 1, backend)
    cache.fill(rows, length)
    index = torch.arange(rows, device=where)
    at = torch.arange(length - width, length, device=where).repeat(rows)
    spans = [Span(0, width, index, key_blocks(length))]
    batch = TokenBatch(at, at, index.repeat_interleave(width), spans, index)
    q = torch.randn(rows * width, spec.heads, spec.head_dim, device=where, dtype=backend.dtype)
    stored = Stored(cache.keys.normal_(), cache.values.normal_(), cache.table[0])

    def several() -> Any:
        for _ in range(calls):
            out = backend.attend(q, batch, spans, stored, None)
        return out

    several()
    _, again = cuda_graphs()(several)
    return gpu_seconds(again, 5) / calls


def attention(report: Report) -> None:
    """Both kernels for decode steps and prompts of Llama 3 8B's heads: which reads keys faster."""
    import torch

    from rayskip.model.backends.cuda.backend import _fault
    from rayskip.model.cache.kv_cache import KVCache
    from rayskip.model.spec import Spec

    spec = Spec("llama", 4096, 32, 8, 128, 128256, 8192, 128**-0.5)
    shapes = [
        (1, 128, 1),
        (1, 4096, 1),
        (16, 1024, 1),
        (64, 128, 1),
        (64, 1024, 1),
        (256, 512, 1),
        (512, 256, 1),
    ]
    shapes += [(8, 512, 512), (64, 80, 80), (1, 4096, 4096)]
    for backend in attentions(spec, torch.bfloat16):
        if reason := _fault(backend):
            report.add(backend.name, None, note=reason)
            continue
        for rows, length, width in shapes[:2] if report.small else shapes:
            name = f"{backend.name}: {rows} rows of {length}" + (", prompts" if width > 1 else "")
            if not report.has_time(name, 2):
                continue
            with report.case(name), torch.inference_mode():
                seconds = attention_seconds(backend, rows, length, width)
                read = rows * length * KVCache.bytes_per_position(spec, 1, torch.bfloat16)
                facts = {"us": round(seconds * 1e6, 1), "gb_s": round(read / seconds / 1e9, 1)}
                if width > 1:
                    work = 4 * 32 * 128 * rows * width * (length - width / 2)
                    facts = {"us": facts["us"], "tflop_s": round(work / seconds / 1e12, 1)}
                report.add(name, None, **facts)
            free(torch)


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int


SMOLLM = Shape(30, 576, 1536, 9, 3, 49152)
LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
SMALL = Shape(4, 64, 96, 4, 2, 199)


def random_decoder(shape: Shape, **changes: Any) -> Any:
    """A Llama with random weights in bfloat16, made where it runs."""
    import torch

    from rayskip.model.decoder import Decoder
    from rayskip.model.spec import MLP, Attention, Dense, Layer, Norm, Rope, Spec, Weights

    shape = replace(shape, **changes)
    where, dim = device(), shape.hidden // shape.heads
    spec = Spec("llama", shape.hidden, shape.heads, shape.kv_heads, dim, shape.vocab, 4096, dim**-0.5)
    generator = torch.Generator(where).manual_seed(0)

    def dense(outputs: int, inputs: int) -> Dense:
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=where)
        return Dense(weight.normal_(0, inputs**-0.5, generator=generator))

    def norm() -> Norm:
        return Norm("rms", torch.ones(shape.hidden, dtype=torch.bfloat16, device=where), None, 1e-5)

    def layer() -> Layer:
        attention = Attention(
            dense((shape.heads + 2 * shape.kv_heads) * dim, shape.hidden), dense(shape.hidden, shape.hidden)
        )
        mlp = MLP(dense(2 * shape.inner, shape.hidden), dense(shape.hidden, shape.inner), "silu", True)
        return Layer(attention, norm(), mlp, norm())

    inverse = 500000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(spec.max_positions)[:, None] * torch.cat([inverse, inverse])
    ropes = {"default": Rope(angles.cos(), angles.sin())}
    embed = torch.randn(shape.vocab, shape.hidden, device=where, dtype=torch.bfloat16, generator=generator)
    head = dense(shape.vocab, shape.hidden)
    return Decoder(spec, Weights(embed, head, [layer() for _ in range(shape.layers)], norm(), ropes))


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    """Token ids of prompts of LENGTHS, in an order that mixes them."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab, (LENGTHS[index * 7 % len(LENGTHS)],), generator=generator).tolist()
        for index in range(count)
    ]


def invariance(report: Report) -> None:
    """Tokens and the bits of their log-probabilities of the first rows, in batches of any size, against those of
    one row at a time; at CUDA graphs' sizes and others."""
    import torch

    from rayskip.config import EngineConfig
    from rayskip.engine import Engine

    shapes = {"8B, 2 layers": replace(LLAMA_8B, layers=2), "135M, 4 layers": replace(SMOLLM, layers=4)}
    sizes = (2, 3, 5, 8, 13, 16, 33, 64, 100, 128, 200, 256, 512, 600)
    if report.small:
        shapes, sizes = {"small": SMALL}, (2, 5, 16)
    params = {**GREEDY, "max_tokens": 24, "logprobs": 2}
    for name, shape in shapes.items():
        with report.case(name):
            decoder = random_decoder(shape)
            prompts = prompts_of(max(sizes), shape.vocab)
            engine = Engine(decoder, engine=EngineConfig(max_batch_rows=1, max_model_len=512))
            info = {key: engine.info[key] for key in ("ops", "row_rule", "batch_invariant", "warnings")}
            report.add(f"{name}: at load", bool(info["batch_invariant"]), **info)
            alone = [
                [(one.token_ids, one.logprobs) for one in row] for row in engine.generate(prompts[:4], params)
            ]
            for rows in sizes:
                if not report.has_time(f"{name}: {rows} rows", 2):
                    continue
                with report.case(f"{name}: {rows} rows"):
                    del engine
                    free(torch)
                    engine = Engine(decoder, engine=EngineConfig(max_batch_rows=rows, max_model_len=512))
                    every = engine.generate(prompts[:rows], params)
                    found = [[(one.token_ids, one.logprobs) for one in row] for row in every[:4]]
                    pairs = [(a, b) for a, b in zip(found, alone, strict=False) if a != b]
                    tokens = sum(a[0][0] != b[0][0] for a, b in pairs)
                    report.add(
                        f"{name}: {rows} rows", not pairs, rows_off=len(pairs), of_them_in_tokens=tokens
                    )
            del engine, decoder
        free(torch)


def free(torch: Any) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SKIPS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "skipdecode": {"kind": "skipdecode", "speedup": 2, "horizon": 12},
    "unified": {"kind": "unified", "speedup": 2},
    "hierarchical": {"kind": "hierarchical", "skip": 1},
    "layers": {"kind": "layers", "layers": [[0, 1, 2, 3], [0, 1, 3], [0, 3]]},
}


def decode(report: Report) -> None:
    """All skip policies with all drafters: the tokens are those without a drafter."""
    import torch

    from rayskip.model.checkpoint import load
    from rayskip.model.decoder import Decoder
    from rayskip.model.kangaroo import adapter_shapes
    from rayskip.model.trained import KangarooLabel, MedusaLabel, save_trained

    with tempfile.TemporaryDirectory() as aside:
        folder = tiny_folder("llama", Path(aside) / "model", initializer_range=0.3)
        decoder = Decoder(*load(folder, torch.bfloat16, device()))
        torch.manual_seed(1)
        adapter = {name: torch.randn(shape) * 0.1 for name, shape in adapter_shapes(decoder).items()}
        token_ids = {"token_ids": torch.arange(TINY["vocab_size"])}
        kangaroo, medusa = Path(aside) / "kangaroo", Path(aside) / "medusa"
        vocab, hidden = TINY["vocab_size"], TINY["hidden_size"]
        save_trained(kangaroo, KangarooLabel("tiny", "", vocab, 0, 0.5, exit_layer=1), adapter | token_ids)
        heads = {"weights": torch.zeros(3, hidden, hidden), "biases": torch.zeros(3, hidden)}
        save_trained(medusa, MedusaLabel("tiny", "", vocab, 0, 0.5, heads=3), heads | token_ids)
        drafts: dict[str, dict[str, Any]] = {
            "lookup": {"kind": "lookup"},
            "lookahead": {"kind": "lookahead"},
            "retrieval": {"kind": "retrieval"},
            "kangaroo": {"kind": "kangaroo", "path": str(kangaroo), "eta": 0.0},
            "kangaroo tree": {"kind": "kangaroo", "path": str(kangaroo), "eta": 0.0, "branches": 2},
            "medusa tree": {"kind": "medusa", "path": str(medusa), "branches": 3},
            "draft_model": {"kind": "draft_model", "model": {"path": str(folder)}},
            "auto": {"kind": "auto", "path": str(kangaroo)},
        }
        for skip_name, skip in SKIPS.items():
            expected, _ = tokens_under(decoder, {"skip": skip})
            report.add(skip_name, all(len(own) == 40 for row in expected for own in row))
            for name, draft in drafts.items():
                name = f"{skip_name} + {name}"
                if not report.has_time(name, 2):
                    continue
                with report.case(name):
                    found, stats = tokens_under(decoder, {"skip": skip, "draft": draft})
                    facts = {"drafted": stats.drafted, "accepted": stats.accepted}
                    report.add(name, found == expected, **facts)


def tokens_under(decoder: Any, decode: dict[str, Any]) -> tuple[list[list[list[int]]], Any]:
    """Tokens of greedy and of sampled rows side by side."""
    from rayskip.config import DecodeConfig, EngineConfig
    from rayskip.engine import Engine

    sizes = EngineConfig(max_batch_rows=8, max_batch_tokens=64, max_model_len=256, kv_cache_gb=0.05)
    engine = Engine(decoder, engine=sizes, decode=DecodeConfig.model_validate(decode))
    sampled = {"temperature": 0.8, "top_p": 0.9, "ignore_eos": True, "max_tokens": 40, "n": 2}
    penalised = {"repetition_penalty": 1.2, "temperature": 0, "ignore_eos": True, "max_tokens": 40}
    kinds = [{**GREEDY, "max_tokens": 40}, sampled, penalised]
    prompts = [prompt[:60] for prompt in prompts_of(9, decoder.spec.vocab - 9)]
    rows = engine.generate(prompts, [kinds[index % 3] for index in range(len(prompts))])
    return [[one.token_ids or [] for one in row] for row in rows], engine.take_stats()


@contextmanager
def phases(seconds: defaultdict[str, float]) -> Iterator[None]:
    """Host seconds of what an engine does, by wrapping what does it."""
    from rayskip.engine import engine, requests, worker

    def timed(owner: Any, name: str, phase: str) -> Callable[[], None]:
        own = getattr(owner, name)

        @wraps(own)
        def call(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return own(*args, **named)
            finally:
                seconds[phase] += time.perf_counter() - began

        setattr(owner, name, call)
        return lambda: setattr(owner, name, own)

    wrapped = [
        timed(worker.Worker, "next", "plan"),
        timed(worker.Worker, "run", "launch"),
        timed(worker, "sample", "sample"),
        timed(engine, "wait", "wait"),
        timed(engine.Engine, "_collect", "collect"),
        timed(worker.Chosen, "choices", "wait for tokens"),
        timed(requests.Requests, "advance", "advance"),
        timed(requests.Requests, "complete", "complete"),
        timed(requests.Requests, "_finish", "detokenise"),
    ]
    try:
        yield
    finally:
        for undo in wrapped:
            undo()
        seconds["launch"] -= seconds["sample"]


def run_until(engine: Any, report: Report, until: float) -> None:
    while engine.has_work and report.left > until:
        engine.step()


def measure(
    report: Report,
    name: str,
    decoder: Any,
    rows: int,
    count: int,
    tokens: int,
    decode: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Generate for `count` prompts, `rows` at a time, after a run that is not counted."""
    import torch

    from rayskip.config import DecodeConfig, EngineConfig
    from rayskip.engine import Engine
    from rayskip.model.cache.kv_cache import KVCache

    sizes = EngineConfig(max_batch_rows=rows, max_model_len=512)
    engine = Engine(decoder, tokenizer, sizes, DecodeConfig.model_validate(decode or {}))
    prompts = prompts_of(count, decoder.spec.vocab)
    params = {**GREEDY, "max_tokens": tokens}
    for prompt in prompts[:rows]:
        engine.add(prompt, params)
    run_until(engine, report, 0)
    engine.take_stats()
    by_phase: defaultdict[str, float] = defaultdict(float)
    requests = [engine.add(prompt, params) for prompt in prompts]
    began = time.perf_counter()
    with phases(by_phase):
        run_until(engine, report, 0)
    seconds, stats, ended = time.perf_counter() - began, engine.take_stats(), not engine.has_work
    engine.abort(requests)
    engine.drain()
    spec, depth = decoder.spec, decoder.depth
    share = (stats.mean_layers or depth) / depth
    per_weight = decoder.backend.dtype.itemsize
    layers = sum(layer.size for layer in decoder.weights.layers) * per_weight * share
    head = decoder.weights.head.weight.numel() * per_weight
    length = sum(LENGTHS) / len(LENGTHS) + tokens / 2
    keys = length * KVCache.bytes_per_position(spec, depth, decoder.backend.dtype) * share
    limit = rows * copy_bytes_s(report.small) / (layers + head + rows * keys)
    rate = stats.steady_tokens / stats.steady_seconds if stats.steady_seconds else 0.0
    report.add(
        name,
        None,
        rows=rows,
        tok_s=round(stats.completion_tokens / seconds, 1),
        decode_tok_s=round(rate, 1),
        bandwidth_limit_tok_s=round(limit, 1),
        share_of_limit=round(rate / limit, 3),
        mean_layers=stats.mean_layers,
        accepted=stats.mean_accepted,
        steps=stats.steps,
        seconds=round(seconds, 2),
        whole=ended,
        ms_per_step={phase: round(own * 1e3 / max(stats.steps, 1), 3) for phase, own in by_phase.items()},
        device_seconds={phase: round(own, 3) for phase, own in stats.seconds.items() if own},
        warnings=engine.info["warnings"] if report.left > 10 else [],
    )
    del engine
    free(torch)


def kernels(report: Report, name: str, decoder: Any, rows: int) -> None:
    """The ten operations that take the device most of its time, in decode steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from rayskip.config import EngineConfig
    from rayskip.engine import Engine

    engine = Engine(decoder, engine=EngineConfig(max_batch_rows=rows, max_model_len=512))
    requests = [
        engine.add(prompt, {**GREEDY, "max_tokens": 64}) for prompt in prompts_of(rows, decoder.spec.vocab)
    ]
    for _ in range(20):
        engine.step()
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for _ in range(15):
            engine.step()
        if cuda:
            torch.cuda.synchronize()
    engine.abort(requests)
    engine.drain()

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = [one for one in profiled.key_averages() if not cuda or str(one.device_type).endswith("CUDA")]
    report.add(f"{name} kernels", None, kinds=len(events))
    total = sum(map(spent, events)) or 1.0
    for rank, event in enumerate(sorted(events, key=spent, reverse=True)[:10], 1):
        took = {"ms": round(spent(event) / 1e3, 3), "share": round(spent(event) / total, 3)}
        report.add(f"{name} kernel {rank}", None, kernel=event.key[:140], calls=event.count, **took)


def bench_small(report: Report) -> None:
    """SmolLM2-135M, the embedded model, or random weights of its shape."""
    import torch

    from rayskip.data.tokenizer import load_tokenizer
    from rayskip.model.checkpoint import load, resolve
    from rayskip.model.decoder import Decoder

    tokenizer = None
    try:
        if report.small:
            raise LookupError("small")
        folder = resolve("smollm2-135m-instruct")
        decoder, tokenizer = Decoder(*load(folder, torch.bfloat16, device())), load_tokenizer(folder)
    except Exception as error:
        report.add("model", None, note=f"random weights ({error})")
        decoder = random_decoder(SMALL if report.small else SMOLLM)
    cases = [(512, 8192, 48), (256, 1024, 48), (1024, 4096, 48), (64, 256, 48), (1, 1, 64)]
    for rows, count, tokens in [(4, 16, 8)] if report.small else cases:
        if report.has_time(f"{rows} rows", 5):
            with report.case(f"{rows} rows"):
                measure(report, f"{rows} rows", decoder, rows, count, tokens, tokenizer=tokenizer)
    with report.case("drafted"):
        if report.has_time("lookup", 5):
            draft = {"draft": {"kind": "lookup"}}
            rows = 4 if report.small else 64
            measure(report, f"{rows} rows, lookup", decoder, rows, rows, 32, draft, tokenizer)


def bench_8b(report: Report) -> None:
    """Llama 3 8B's shape: decode steps against the bandwidth of memory, full depth and SkipDecode 2x."""
    shape, tokens = (SMALL, 8) if report.small else (LLAMA_8B, 64)
    decoder = random_decoder(shape)
    skip = {"skip": {"kind": "skipdecode", "speedup": 2, "horizon": tokens}}
    for rows in (1, 4) if report.small else (64, 1, 256, 16):
        for name, decode in (("full depth", {}), ("SkipDecode 2x", skip)):
            name = f"{rows} rows, {name}"
            if report.has_time(name, 10):
                with report.case(name):
                    measure(report, name, decoder, rows, rows, tokens, decode)
        if rows in (4, 64) and report.has_time("kernels", 15):
            with report.case("kernels"):
                kernels(report, f"{rows} rows", decoder, rows)


PARTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "environment": (environment, 40),
    "parity": (parity, 130),
    "bench_8b": (bench_8b, 130),
    "attention": (attention, 40),
    "invariance": (invariance, 70),
    "decode": (decode, 70),
    "bench_small": (bench_small, 80),
}
"""What is done, and the seconds that it may take; the most wanted first."""


def run_part(name: str, file: Path, seconds: float, small: bool) -> None:
    """In a process of its own."""
    logging.disable(logging.WARNING)
    report = Report(file, name, seconds, small)
    with report.case(name):
        PARTS[name][0](report)


def page(lines: list[dict[str, Any]]) -> str:
    """Markdown: what failed first, then each part as a table."""
    failed = [line for line in lines if line["ok"] is False]
    checked = [line for line in lines if line["ok"] is not None]
    out = ["# rayskip on a GPU", "", f"{len(checked) - len(failed)} of {len(checked)} checks hold."]
    for part in dict.fromkeys(line["part"] for line in lines):
        out += ["", f"## {part}", "", "| | | |", "|---|---|---|"]
        for line in sorted(
            (one for one in lines if one["part"] == part), key=lambda one: one["ok"] is not False
        ):
            facts = {key: value for key, value in line.items() if key not in ("part", "name", "ok")}
            told = (
                "; ".join(f"{key} {value}" for key, value in facts.items())
                .replace("|", "\\|")
                .replace("\n", " ")
            )
            verdict = {True: "ok", False: "**FAILED**", None: ""}[line["ok"]]
            out.append(f"| {line['name']} | {verdict} | {told} |")
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time rayskip on a GPU.")
    parser.add_argument(
        "output", type=Path, nargs="?", default=ROOT / "infra" / "gpu", help="folder of the results"
    )
    parser.add_argument("--small", action="store_true", help="tiny models: to try this script")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--minutes", type=float, default=9.5, help="in all, at most")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # a part's own process
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.part is not None:
        name, file, seconds = given.part
        run_part(name, Path(file), float(seconds), given.small)
        return 0
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gpu_check needs {', '.join(missing)}", file=sys.stderr)
        return 2
    wanted = given.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        print(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    stop, lines = time.monotonic() + given.minutes * 60, []
    for name in wanted:
        seconds = min(PARTS[name][1], stop - time.monotonic() - GRACE_S)
        lines += part_lines(name, seconds, given.small)
        (given.output / "gpu_check.json").write_text(json.dumps(lines, indent=1) + "\n")
        (given.output / "gpu_check.md").write_text(page(lines))
    print(given.output / "gpu_check.md")
    return int(any(line["ok"] is False for line in lines))


def part_lines(name: str, seconds: float, small: bool) -> list[dict[str, Any]]:
    """What a part found, and how it ended if not well."""
    if seconds <= 0:
        return [{"part": name, "name": name, "ok": None, "note": "not run: no time was left"}]
    with tempfile.TemporaryDirectory() as aside:
        file, began = Path(aside) / "lines", time.monotonic()
        own = ["--part", name, str(file), str(seconds), *(["--small"] if small else [])]
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        child = subprocess.Popen([sys.executable, __file__, *own], env=os.environ | quiet)
        try:
            code: int | None = child.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = None
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    took = round(time.monotonic() - began, 1)
    ended = {0: "ended", None: "stopped: its time was over"}.get(code, f"died with {code}")
    return [*lines, {"part": name, "name": "process", "ok": code == 0, "note": ended, "seconds": took}]


if __name__ == "__main__":
    sys.exit(main())
