"""The benchmarks on small inputs: modes do the same work, and what they report adds up. No timing is judged."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from rayskip.config import EngineConfig, SamplingParams
from rayskip.config.evaluate import BenchConfig, BenchPeer, SpecBenchConfig
from rayskip.data.records import Prompt
from rayskip.engine import Engine
from rayskip.errors import ConfigError, InputError
from rayskip.evaluate.bench import run_bench
from rayskip.evaluate.peer_process import PeerArguments, running_peer
from rayskip.evaluate.roofline import Roofline, measure_roofline
from rayskip.evaluate.spec_bench import TASKS, error_of_ratio, format_scores, run_spec_bench
from rayskip.evaluate.timing import format_timings
from rayskip.evaluate.turns import EngineRun, run_in_turns
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import load
from rayskip.model.decoder import Decoder

MODEL = {"path": "smollm2-135m-instruct"}
SKIP = {"kind": "skipdecode", "speedup": 2, "horizon": 8}


def test_bench_times_every_mode_at_every_batch_size(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Count to {count}:"}) + "\n" for count in range(9)))
    config = BenchConfig.model_validate(
        {
            "name": "tiny",
            "model": MODEL,
            "input": {"path": str(rows)},
            "sampling": {"max_tokens": 8, "ignore_eos": True},
            "modes": [
                {"name": "full"},
                {"name": "skip", "decode": {"skip": SKIP}},
                {"name": "lookup", "decode": {"draft": {"kind": "lookup"}}},
            ],
            "batch_rows": [1, 4],
            "rows_per_place": 1,
            "min_rows": 2,
            "rounds": 1,
            "output": str(tmp_path / "out"),
        }
    )
    said: list[str] = []
    timings = run_bench(config, said.append)
    assert [line for line in said if line.startswith("loading")] == [f"loading {config.model.path}"]
    assert [(t.mode, t.batch_rows, t.rows) for t in timings] == [
        (mode, batch, rows) for batch, rows in ((1, 2), (4, 4)) for mode in ("full", "skip", "lookup")
    ]
    assert all(t.completion_tokens == 8 * t.rows for t in timings)
    assert [t.speedup for t in timings if t.mode == "full"] == [1, 1]
    full, skip, lookup = timings[:3]
    assert (full.allowed_speedup, full.mean_layers, full.mean_accepted) == (1, 30, 1)
    assert skip.mean_layers < 22
    assert 1 < skip.allowed_speedup < 30 / skip.mean_layers
    assert lookup.mean_accepted > 1
    assert all(t.identical == 1 for t in timings)
    assert len(format_timings(timings).splitlines()) == 1 + len(timings)
    for timing in (full, skip):
        assert timing.decode_tok_s
        assert timing.limit_tok_s
        assert timing.limit_share == pytest.approx(timing.decode_tok_s / timing.limit_tok_s)
    assert (lookup.limit_tok_s, lookup.limit_share) == (None, None)
    assert sum(share for _, share in full.seconds.values()) == pytest.approx(1)
    described = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert described["timings"][1]["mode"] == "skip"
    assert [(limit["mode"], limit["rows"]) for limit in described["limits"]] == [
        (mode, rows) for rows in (1, 4) for mode in ("full", "skip")
    ]
    assert (tmp_path / "out" / "bench.png").stat().st_size > 0


def test_the_limit_is_what_products_and_cached_bytes_take(tiny_llama: Callable[..., Path]) -> None:
    spec, weights = load(tiny_llama("limit", 0), torch.bfloat16, torch.device("cpu"))
    decoder = Decoder(spec, weights)
    for greedy in (True, False):
        measured = measure_roofline(decoder, rows=3, greedy=greedy)
        assert min(measured.layers_s, measured.head_s, measured.read_bytes_s) > 0
    roofline = Roofline(rows=10, layers_s=2.0, head_s=1.0, read_bytes_s=100.0)
    cached = 10 * 7 * KVCache.bytes_per_position(spec, decoder.depth, torch.bfloat16) / 100
    assert roofline.tok_s(decoder, 7, 4) == pytest.approx(10 / (2 + cached + 1))
    assert roofline.tok_s(decoder, 7, 1) == pytest.approx(10 / ((2 + cached) / 4 + 1))


PROMPTS = [[1, 5, 9], [7], [3, 4, 5, 6, 7, 8], [11, 12]]


def _against(folder: Path, tmp_path: Path, peer: dict[str, Any], **changes: Any) -> BenchConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in PROMPTS))
    return BenchConfig.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(folder), "dtype": "float32"},
            "input": {"path": str(rows)},
            "sampling": {"max_tokens": 6},
            "modes": [{"name": "full"}],
            "peers": [peer],
            "batch_rows": [1, 2],
            "rounds": 1,
            "output": str(tmp_path / "out"),
            **changes,
        }
    )


@pytest.mark.parametrize("turn_s", [None, 0.02])
def test_bench_times_a_peer_over_the_same_rows(
    turn_s: float | None, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    folder = tiny_llama("peer", 0)
    peer = {"name": "generate", "kind": "transformers", "batch_rows": [2], "dtype": "float32"}
    model, exact = ({"path": str(folder), "dtype": dtype} for dtype in ("bfloat16", "float32"))
    modes = [{"name": "full", "model": exact}]
    timings = run_bench(
        _against(folder, tmp_path, peer, model=model, modes=modes, sampling={"max_tokens": 48}, turn_s=turn_s)
    )
    assert [(t.mode, t.batch_rows) for t in timings] == [("full", 1), ("full", 2), ("generate", 2)]
    theirs = timings[2]
    assert (theirs.rows, theirs.identical) == (4, 1)
    assert theirs.completion_tokens == timings[1].completion_tokens
    assert theirs.load_s
    assert theirs.tok_s_range[0] <= theirs.tok_s <= theirs.tok_s_range[1]
    assert (theirs.skip, theirs.decode_tok_s, theirs.limit_share, theirs.mean_layers) == (None,) * 4
    assert "generate" in format_timings(timings)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_peer_generates_what_its_library_does(ignore_eos: bool, tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama("peer", 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = [
        model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
        for ids in PROMPTS
    ]
    end = int(wanted[2][3])  # from now on it ends a row
    stops = [row.tolist().index(end) + 1 if end in row and not ignore_eos else 6 for row in wanted]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    arguments = PeerArguments(str(folder), "float32", 3, 6, ignore_eos, longest=12, samples=1, temperature=0)
    with running_peer(BenchPeer(name="generate", kind="transformers"), arguments) as peer:
        for prompts, seconds in ((PROMPTS, math.inf), (PROMPTS[::-1], 0.001)):
            peer.begin(prompts)
            turns = 1
            while not peer.go_on(seconds):
                turns += 1
            order = [PROMPTS.index(ids) for ids in prompts]
            assert peer.token_ids() == [wanted[at][: stops[at]].tolist() for at in order]
            assert (turns > 1) == math.isfinite(seconds)
    assert (stops[2] == 6) == ignore_eos


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/no/such/python", "peers: other: /no/such/python cannot be started"),
        ("{shell}", "(?s)peers: other: .*/fails ended with code 3; its last lines:\n  no vllm here"),
    ],
)
def test_a_peer_that_cannot_run_is_named(
    python: str, message: str, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no vllm here >&2\nexit 3\n")
    fails.chmod(0o755)
    peer = {"name": "other", "kind": "vllm", "python": python.format(shell=fails)}
    with pytest.raises(ConfigError, match=message):
        run_bench(_against(tiny_llama("peer", 0), tmp_path, peer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"temperature": 0.5, "top_p": 0.9}}, "must have temperature 0"),
        (
            {"sampling": {"temperature": 0.5}, "peers": [{"name": "other", "kind": "transformers"}]},
            "must have temperature 0",
        ),
        ({"sampling": {"stop": ["."]}}, "no stop strings"),
        ({"peers": [{"name": "full", "kind": "vllm"}]}, "two are named 'full'"),
        ({"peers": [{"name": "other", "kind": "vllm", "batch_rows": [8]}]}, "other runs at 8 rows"),
        ({"model": {"path": "x", "adapter": "y"}}, r"merge model\.adapter"),
    ],
)
def test_peers_that_cannot_be_compared_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        _against(Path("model"), tmp_path, {"name": "other", "kind": "vllm"}, **changes)


def _spec_bench(questions: Path, **changes: Any) -> SpecBenchConfig:
    return SpecBenchConfig.model_validate(
        {
            "name": "tiny",
            "model": MODEL,
            "questions": str(questions),
            "sampling": {"max_tokens": 6},
            "drafters": [
                {"name": "none", "batch_rows": [1]},
                {"name": "lookup", "decode": {"draft": {"kind": "lookup"}}},
            ],
            "batch_rows": [1, 16],
            "warmups": 1,
            "rounds": 1,
            "output": str(questions.parent / "out"),
            **changes,
        }
    )


def test_spec_bench_scores_every_subtask(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    rows = [{"category": task, "turns": [f"Say {task} twice."]} for task in TASKS[1:]]
    rows += [{"category": "writing", "turns": ["Write one word.", "Write it again."]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = run_spec_bench(_spec_bench(questions))
    assert len(scores) == 3 * 7
    assert [score.speedup for score in scores if score.batch_rows == 16] == [None] * 7
    assert {score.task for score in scores} == {*TASKS, "overall"}
    assert all(score.identical == 1 for score in scores)
    for score in scores:
        if score.drafter == "none":
            assert (score.speedup, score.mean_accepted, score.drafted) == (1, 1, 0)
        assert score.accepted == sum(length * rows for length, rows in score.accepted_lengths.items())
    assert "translation" in format_scores(scores)
    page = (tmp_path / "out" / "spec_bench.html").read_text()
    assert "speedup.png" in page
    assert (tmp_path / "out" / "acceptance.png").stat().st_size > 0


def test_a_spec_bench_that_is_stopped_has_had_of_every_subtask_alike(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    rows = [{"category": task, "turns": [f"Say {n} of {task}."]} for task in TASKS[1:] for n in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stop_after_two(line: str) -> None:
        if "question 3 of 3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_spec_bench(_spec_bench(questions, batch_rows=[1]), stop_after_two)
    saved = json.loads((tmp_path / "out" / "spec_bench.json").read_text())
    assert {(score["task"], score["answers"]) for score in saved} == {
        *((task, 2) for task in TASKS[1:]),
        ("overall", 10),
    }


def test_the_error_of_a_speedup_is_the_jackknife_s() -> None:
    chance = random.Random(0)
    base = [chance.uniform(80, 90) for _ in range(200)]
    drafted = [rate * chance.gauss(1.3, 0.2) for rate in base]
    ratios = [(sum(drafted) - mine) / (sum(base) - other) for mine, other in zip(drafted, base, strict=True)]
    jackknife = (statistics.pvariance(ratios) * (len(base) - 1)) ** 0.5
    assert error_of_ratio(drafted, base) == pytest.approx(jackknife, rel=0.02)


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ([{"name": "none", "batch_rows": [16]}], r"drafters\[0\] must run at batch_rows\[0\]"),
        ([{"name": "none"}, {"name": "auto", "batch_rows": [8]}], "auto runs at 8 rows"),
        ([{"name": "none"}, {"name": "none"}], "two are named 'none'"),
    ],
)
def test_drafters_that_cannot_be_compared_are_refused(drafters: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _spec_bench(Path("q.jsonl"), drafters=drafters)


def test_a_broken_question_is_named(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"category": "qa", "turns": ["a"]}\n{"category": "qa"}\n')
    with pytest.raises(InputError, match="row 1 needs category and turns"):
        run_spec_bench(_spec_bench(questions))


def test_turns_are_counted_and_nothing_runs_between_them(tiny_llama: Callable[..., Path]) -> None:
    engines = [Engine.load(str(tiny_llama("turns", 0)), EngineConfig(max_batch_rows=2)) for _ in range(2)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [Prompt(row, [5, 6, 7 + row], params, row) for row in range(6)]
    alone = EngineRun(engines[0], prompts)
    run_in_turns([alone], math.inf)
    runs = [EngineRun(engine, prompts) for engine in engines]
    turns = []

    class Counted:
        seconds = 0.0

        def __init__(self, run: EngineRun) -> None:
            self._run = run

        def go_on(self, seconds: float) -> bool:
            before = self._run.seconds
            over = self._run.go_on(seconds)
            turns.append((runs.index(self._run), self._run.seconds - before))
            assert not self._run.engine._steps
            return over

    run_in_turns([Counted(run) for run in runs], 0.005)
    assert [index for index, _ in turns[:4]] == [0, 1, 0, 1]
    for index, run in enumerate(runs):
        assert run.seconds == pytest.approx(sum(spent for own, spent in turns if own == index))
        found = [done.generations[0].token_ids for done in run.completions]
        assert found == [done.generations[0].token_ids for done in alone.completions]
