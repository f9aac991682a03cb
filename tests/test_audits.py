"""Jobs that skip layers: their output is labelled, a share is decoded both ways, a floor holds."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rayskip.cluster.local_pool import LocalPool
from rayskip.cluster.replica import Replica
from rayskip.config import JobConfig
from rayskip.data.sources import Source
from rayskip.driver.loop import run_job
from rayskip.driver.plan import make_plan
from rayskip.driver.records import Manifest
from rayskip.driver.report import Report, format_report
from rayskip.driver.verify import verify
from rayskip.errors import JobFailed

ROWS, TOKENS = 24, 12
SKIP = {"kind": "skipdecode", "max_layers": 4, "min_layers": 2, "horizon": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, whose tokens change a lot when layers are skipped, and prompts as token ids."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("audits")
    model = LlamaConfig(
        vocab_size=199,
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=6,
        initializer_range=0.3,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(model, dtype=torch.float32).save_pretrained(root / "model")
    rows = [{"prompt_token_ids": [3 + row, 5, 7 + row % 4]} for row in range(ROWS - 1)]
    lines = [json.dumps(row) for row in [*rows, {"prompt_token_ids": None}]]
    (root / "in.jsonl").write_text("\n".join(lines) + "\n")
    return root


def _job(folder: Path, out: Path, **sections: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "audits",
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "input": {"path": str(folder / "in.jsonl")},
            "sampling": {"max_tokens": TOKENS, "ignore_eos": True},
            "engine": {"max_batch_rows": 4},
            "output": {"path": str(out), "format": "jsonl", "token_ids": True, "shard_rows": 4},
            **sections,
        }
    )


def _run(folder: Path, out: Path, **sections: Any) -> tuple[Report, list[dict[str, Any]]]:
    def pool(job: JobConfig, source: Source) -> LocalPool:
        return LocalPool(lambda: Replica(job, source))

    report = run_job(_job(folder, out, **sections), pool)
    assert verify(str(out)).rows == ROWS
    manifest = Manifest.model_validate_json((out / ".rayskip/manifest.json").read_text())
    lines = [line for file in manifest.files for line in (out / file.path).read_text().splitlines()]
    return report, [json.loads(line) for line in lines]


def test_what_a_replica_says_when_it_is_ready_is_read_without_torch(folder: Path, tmp_path: Path) -> None:
    """A driver would import it for seconds, while replicas wait."""
    job = _job(folder, tmp_path)
    ready = Replica(job, make_plan(job).source).load()
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1])); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, pickle.dumps(ready).hex()]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_output_is_labelled_and_audits_are_what_two_jobs_show(folder: Path, tmp_path: Path) -> None:
    full, expected = _run(folder, tmp_path / "full")
    skipped, rows = _run(folder, tmp_path / "skipped", decode={"skip": SKIP}, quality={"sample": 1.0})

    assert full.generations_cut == sum(row["finish_reason"] == "length" for row in expected) == ROWS - 1
    assert f"{ROWS - 1} cut off at max_tokens" in format_report(full)
    assert "skip_policy" not in expected[0]
    assert (full.skip, full.mean_layers, full.audits, full.agreement) == ("none", 6, 0, {})
    good = [row for row in rows if row["error_type"] is None]
    assert {row["skip_policy"] for row in good} == {"skipdecode(warmup=1, layers=4->2, horizon=6)"}
    depths = [4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    assert [row["mean_layers"] for row in good] == pytest.approx([sum(depths) / len(depths)] * (ROWS - 1))
    manifest = json.loads((tmp_path / "skipped/.rayskip/manifest.json").read_text())
    assert manifest["skip"] == SKIP | {"warmup": 1}
    same = (
        sum(row["token_ids"] == other["token_ids"] for row, other in zip(rows, expected, strict=True)) - 1
    )  # the row that cannot run
    assert skipped.audits == ROWS - 1
    assert skipped.agreement["exact_match"] == pytest.approx(same / (ROWS - 1))
    assert 0 < skipped.agreement["edit_similarity"] < 0.9
    assert not skipped.fell_back_to_full_depth
    assert skipped.layer_tokens <= 1.02 * skipped.layer_tokens_ideal
    assert "audits: exact_match" in format_report(skipped)


def test_below_the_floor_the_job_stops(folder: Path, tmp_path: Path) -> None:
    quality = {"sample": 1.0, "floor": 0.9, "min_audits": 3}
    with pytest.raises(JobFailed, match="edit similarity is 0"):
        _run(folder, tmp_path / "out", decode={"skip": SKIP}, quality=quality)


def test_below_the_floor_the_rest_runs_at_full_depth(folder: Path, tmp_path: Path) -> None:
    quality = {"sample": 1.0, "floor": 0.9, "min_audits": 3, "below_floor": "full_depth"}
    report, rows = _run(folder, tmp_path / "out", decode={"skip": SKIP}, quality=quality)
    _, expected = _run(folder, tmp_path / "full")
    assert report.fell_back_to_full_depth
    policies = [row["skip_policy"] for row in rows if row["error_type"] is None]
    assert policies[0].startswith("skipdecode")
    assert policies[-1] == "none"
    for row, other in zip(rows, expected, strict=True):
        if row["skip_policy"] == "none":
            assert row["token_ids"] == other["token_ids"]
