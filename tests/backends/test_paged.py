"""Our attention over pages: its numbers by Triton's interpreter on CPU, and that it compiles for GPUs. What a GPU
makes of it, infra/gpu_check.py tells."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rayskip.model.backends.cuda import paged


def test_it_compiles_for_every_gpu_since_ampere() -> None:
    types = {**dict.fromkeys(("q", "keys", "values", "out"), "*bf16"), "table": "*i32", "rows": "*i64"}
    types |= {"firsts": "*i32", "widths": "*i32", "positions": "*i64"}
    types |= dict.fromkeys(("parts", "tops", "totals"), "*fp32")
    types |= {
        **dict.fromkeys(("count", "q_token", "q_head", "table_row"), "i32"),
        "scale": "fp32",
        "cap": "fp32",
    }
    sizes = {"HEADS": 9, "SHARED": 3, "SHARED_ROWS": 4, "KV_HEADS": 3, "DIM": 64, "DIMS": 64, "PAGE": 64}
    sizes |= {"ROWS_": paged.ROWS, "TILE_KEYS": paged.TILE, "CHUNK_KEYS": paged.CHUNK, "WINDOW": 100}
    sizes |= {"SINGLE": False, "WIDE": True, "CAPPED": False}
    for processor in (80, 90, 100):
        made = _compiled(paged._attend, types, sizes, processor)
        assert made.metadata.shared <= 99 * 1024, "what the smallest of these has"
    own = ("positions", "out", "parts", "tops", "totals", "count")
    names = ("HEADS", "DIM", "DIMS", "WINDOW", "CHUNK_KEYS")
    _compiled(paged._add_up, {name: types[name] for name in own}, {name: sizes[name] for name in names}, 90)


def _compiled(kernel: Any, types: dict[str, str], sizes: dict[str, Any], processor: int) -> Any:
    source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), sizes)
    target = GPUTarget("cuda", processor, 32)
    made = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})
    assert made.asm["cubin"]
    return made


def test_numbers_are_torchs_and_a_querys_depend_on_nothing_but_itself() -> None:
    """In a process of its own: Triton is told of its interpreter before it is imported."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    for case in found:
        assert case["off"] < 2e-3, case
        assert case["same_alone"], case
        assert case["same_in_one_stretch"], case


def _expected(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    position: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """Of one query [Hq, D], by its definition."""
    shared = q.shape[0] // keys.shape[1]
    k, v = (
        stored[pages.long()]
        .transpose(1, 2)
        .flatten(0, 1)[: position + 1]
        .repeat_interleave(shared, 1)
        .float()
        for stored in (keys, values)
    )
    scores = torch.einsum("hd,khd->hk", q.float(), k) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if window is not None:
        scores[:, : max(position + 1 - window, 0)] = -torch.inf
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


def _case(chance: random.Random) -> dict[str, Any]:
    """Three rows of random lengths: all bring one query, or one brings many, one brings some and one brings one."""
    dim, kv_heads, shared = chance.choice([16, 48, 64]), chance.choice([1, 2]), chance.choice([1, 3, 4])
    page, blocks, dtype = chance.choice([64, 128]), 2, chance.choice([torch.float16, torch.float32])
    window, cap = chance.choice([None, 13, 100]), chance.choice([None, 20.0])
    keys, values = (torch.randn(3 * blocks + 1, kv_heads, page, dim).to(dtype) for _ in range(2))
    table = (torch.randperm(3 * blocks) + 1).view(3, blocks).int()
    widths = chance.choice([[1, 1, 1], [35, 5, 1]])
    starts = [sum(widths[:at]) for at in range(3)]
    rows = torch.arange(3).repeat_interleave(torch.tensor(widths))
    begins = [chance.randrange(page * blocks - width) for width in widths]
    positions = torch.cat([torch.arange(at, at + width) for at, width in zip(begins, widths, strict=True)])
    q = torch.randn(len(rows), shared * kv_heads + 2, dim).to(dtype)[:, : shared * kv_heads]
    others = (dim**-0.5, window, cap)

    def attend(own: list[int], widths: list[int], starts: list[int]) -> Tensor:
        at = torch.tensor(own)
        tiles = paged.tiles_of(rows[at], starts, widths, len(own), shared, blocks)
        return paged.attend_pages(q[at], keys, values, table, tiles, positions[at], *others)

    paged.CHUNK = chance.choice([64, 128])
    every = list(range(len(rows)))
    found = attend(every, widths, starts)
    alone = [attend([at], [1], [0])[0] for at in starts]
    paged.CHUNK = 1024
    whole = attend(every, widths, starts)
    expected = [_expected(q[at], keys, values, table[rows[at]], int(positions[at]), *others) for at in every]
    # the interpreter's products are numpy's, whose sums depend on a row's place: the last bits may differ
    same = all(
        torch.allclose(found[at], own, atol=1e-6 if dtype == torch.float32 else 0)
        for at, own in zip(starts, alone, strict=True)
    )
    return {
        "of": [dim, kv_heads, shared, page, str(dtype), window, cap, widths],
        "off": float((found.float() - torch.stack(expected)).abs().max()),
        "same_alone": same,
        "same_in_one_stretch": bool(torch.allclose(whole, found, atol=2e-3)),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps([_case(random.Random(seed)) for seed in range(4)]))
