"""The benchmarks on small inputs: modes do the same work, and what they report adds up. No timing is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayskip.errors import InputError
from rayskip.evaluate.bench import format_timings, run_bench
from rayskip.evaluate.spec_bench import TASKS, format_scores, run_spec_bench
from rayskip.tool_config import BenchConfig, SpecBenchConfig

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
    timings = run_bench(config)
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
    assert json.loads((tmp_path / "out" / "bench.json").read_text())[1]["mode"] == "skip"
    assert (tmp_path / "out" / "bench.png").stat().st_size > 0


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
