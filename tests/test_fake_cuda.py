"""Torch's CUDA build without a GPU, over the runtime of fake_cuda.c: what it refuses and waits for is real, what it
computes is not. Only where a C compiler and the CUDA wheels are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SITE = Path(torch.__file__).parents[1]
HEADERS = ("nvidia/cu*/include/cuda_runtime_api.h", "triton/backends/nvidia/include/crt/host_defines.h")
PLACES = [path.parents[header.count("crt/")] for header in HEADERS for path in SITE.glob(header)]
"""Of the headers, in NVIDIA's wheel and in Triton's, which has what that one leaves out."""
LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
    pytest.mark.skipif(len(PLACES) < 2, reason="torch's CUDA wheels are not here"),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="no gcc here"),
]

ENGINES = """
import ctypes, json, sys, torch
from pathlib import Path
from rayskip.cluster.replica import device_for
from rayskip.config import DecodeConfig, EngineConfig, SamplingParams
from rayskip.engine import Engine
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("violations", "waits", "graphs", "flash")]
    _fields_ += [("first", ctypes.c_char * 120)]

counts = Counts.in_dll(ctypes.CDLL(None), "fake_counts")
greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
sampled = SamplingParams(max_tokens=8, temperature=0.9, top_k=9, ignore_eos=True)
skip = {"kind": "skipdecode", "speedup": 2, "horizon": 12}
found = {}
for folder in map(Path, sys.argv[1:]):
    for dtype in (torch.bfloat16, *([] if found else [torch.float32])):
        counts.graphs = counts.flash = 0
        decoder = Decoder(*load(folder, dtype, torch.device("cuda")), folder=folder)
        facts = {"ops": decoder.backend.name, "warnings": decoder.backend.warnings}
        for decode, params in (({}, sampled), ({"draft": {"kind": "lookup"}, "skip": skip}, greedy), ({}, greedy)):
            sizes = EngineConfig(max_batch_rows=4, max_batch_tokens=64, kv_cache_gb=0.1)
            engine = Engine(decoder, None, sizes, DecodeConfig.model_validate(decode))
            for length in (3, 30, 70, 9):
                engine.add([5] * length, params)
            done, steps = [], 0
            while engine.has_work:
                if steps == 10:
                    counts.waits = 0
                done += engine.step()
                steps += 1
                if steps == 20:
                    facts["waits"] = counts.waits
            facts["rows"] = [len(row.generations[0].token_ids or []) == params.max_tokens for row in done]
        facts |= {"graphs": counts.graphs, "flash": counts.flash}
        facts |= {"violations": counts.violations, "first": counts.first.decode()}
        found[f"{folder.name} {dtype}"] = facts
devices = [device_for(0), device_for(0.5)]
print(json.dumps([found, devices]))
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the environment of a process needs in which torch finds the fake."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    source = (HERE / "fake_cuda.c").read_text()
    names: set[str] = set()
    for library in LIBRARIES:
        if (path := SITE / "torch/lib" / library).exists():
            listed = subprocess.run(
                ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
            )
            names |= set(re.findall(r"\bU ((?:__cuda|cuda|cublas)\w+)", listed.stdout))
    own = set(re.findall(r"\b((?:__cuda|cuda|cublas)\w+)\(", source))
    aliases = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - own))
    (folder / "succeed.c").write_text(aliases)
    made = folder / "libfake_cuda.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *(f"-I{place}" for place in PLACES), "-o", made]
    subprocess.run([*command, HERE / "fake_cuda.c", folder / "succeed.c"], check=True)
    (folder / "libcuda.so.1").symlink_to(made)  # the driver, which torch asks too
    paths = {"LD_PRELOAD": str(made), "LD_LIBRARY_PATH": str(folder)}
    return {**os.environ, **paths, "TORCHDYNAMO_DISABLE": "1"}


def _run(script: str, environment: dict[str, str], *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_family_begins_on_a_gpu(runtime: dict[str, str], tmp_path: Path) -> None:
    """In bfloat16 by FlashAttention and CUDA graphs, with nothing that a capture forbids; no greedy step waits."""
    from test_families import CONFIGS
    from transformers import AutoModelForCausalLM

    families = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "opt")
    for name in families:
        AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    found, devices = _run(ENGINES, runtime, *(str(tmp_path / name) for name in families))
    assert devices == ["cpu", "cuda"], "as many GPUs as the job gives a replica, not as many as there are"
    assert len(found) == len(families) + 1
    for name, facts in found.items():
        fast = "bfloat16" in name and "gemma2" not in name
        assert facts["ops"] == ("varlen" if fast else "torch"), (name, facts)
        assert (facts["violations"], facts["first"]) == (0, ""), name
        assert facts["rows"] == [True] * 4, name
        if fast:
            assert facts["warnings"] == [], name
            assert facts["waits"] == 0, name
            assert facts["graphs"] >= 20, name
            assert facts["flash"] > 0, name
        else:
            assert "FlashAttention has no" in facts["warnings"][0]
