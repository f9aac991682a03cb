"""The shipped configs over the shipped data: every row becomes a prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rayskip.config.evaluate import BenchConfig, EvalQualityConfig, SpecBenchConfig
from rayskip.config.file import load_config, load_section
from rayskip.config.train import TrainKangarooConfig, TrainMedusaConfig, TrainSkipConfig
from rayskip.data.output import choose_prefix
from rayskip.data.prompts import PromptBuilder, check_input
from rayskip.data.tokenizer import load_tokenizer
from rayskip.decode.drafters import load_drafters
from rayskip.driver.plan import Plan, make_plan
from rayskip.errors import ModelError
from rayskip.model.checkpoint import load, trained_policy
from rayskip.model.decoder import Decoder
from rayskip.skip import full_depth, skip_policy

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART_ROWS = 200
Named = BenchConfig | EvalQualityConfig | SpecBenchConfig | TrainKangarooConfig | TrainSkipConfig


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_config_loads_and_writes_below_out(path: Path) -> None:
    job = load_config(path)
    assert job.output.path.startswith("out/")
    # Data outside the repository is the user's to fetch; data inside is ours to ship.
    if not job.input.path.startswith("../"):
        assert (ROOT / job.input.path).is_file()


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("train/*_skip.yaml", TrainSkipConfig),
        ("train/kangaroo.yaml", TrainKangarooConfig),
        ("train/medusa.yaml", TrainMedusaConfig),
        ("eval/*_quality.yaml", EvalQualityConfig),
        ("eval/spec_bench*.yaml", SpecBenchConfig),
        ("bench/*.yaml", BenchConfig),
    ],
)
def test_configs_of_other_commands_load_and_write_below_out(pattern: str, kind: type[Named]) -> None:
    paths = sorted((ROOT / "configs").glob(pattern))
    assert paths
    for path in paths:
        assert load_section(kind, path).output.startswith("out/")


def test_the_shipped_adapter_was_trained_for_its_job(smollm2: Path) -> None:
    job = load_config(ROOT / "configs/e2e_2x.yaml")
    assert job.model.adapter is not None
    adapter = ROOT / job.model.adapter
    assert trained_policy(adapter) == skip_policy(job.decode.skip, 30).name
    load(smollm2, torch.bfloat16, torch.device("cpu"), adapter)
    assert sum(file.stat().st_size for file in adapter.iterdir()) < 8_000_000


def test_a_job_with_an_adapter_is_planned_and_a_folder_without_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('mr,ref\n"name[Alimentum]",x\n')
    adapter = str(ROOT / "configs/adapters/e2e-2x")

    def plan(adapter: str) -> Plan:
        overrides = [f"input.path={tmp_path}/rows.csv", f"model.adapter={adapter}"]
        return make_plan(load_config(ROOT / "configs/e2e_2x.yaml", overrides))

    parts = plan(adapter).record.parts
    copied = tmp_path / "copied"
    shutil.copytree(adapter, copied)
    assert plan(str(copied)).record.parts == parts
    settings = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    assert plan(str(copied)).record.parts["model"] != parts["model"]
    with pytest.raises(ModelError, match=r"model\.adapter: no folder .*nowhere"):
        plan(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"model\.adapter: .* has no adapter_config\.json"):
        plan(str(tmp_path))


def test_every_drafter_of_the_configs_loads(smollm2: Path) -> None:
    """What they name without a path comes with the package."""
    decoder = Decoder(*load(smollm2, torch.bfloat16, torch.device("cpu")), folder=smollm2)
    configs = [load_config(path) for path in SHIPPED]
    drafts = [job.decode.draft for job in configs]
    for path in sorted((ROOT / "configs/eval").glob("spec_bench*.yaml")):
        drafts += [drafter.decode.draft for drafter in load_section(SpecBenchConfig, path).drafters]
    assert {draft.kind for draft in drafts} >= {"auto", "kangaroo", "medusa"}
    for draft in drafts:
        load_drafters(draft, decoder, full_depth(30))
    assert sum(file.stat().st_size for file in (ROOT / "rayskip/model/shipped").rglob("*.*")) < 6_000_000


def test_every_quickstart_row_is_a_prompt(smollm2: Path) -> None:
    job = load_config(ROOT / "configs/quickstart.yaml")
    rows = [json.loads(line) for line in (ROOT / job.input.path).read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= QUICKSTART_ROWS
    assert len({row["id"] for row in rows}) == len({row["ticket"] for row in rows}) == len(rows)
    check_input(job.input, rows[0])
    assert choose_prefix(job, rows[0]) == ""
    builder = PromptBuilder(job.input, job.sampling, load_tokenizer(smollm2), 2048)
    prompts = [builder.build(row, index, "quickstart.jsonl") for index, row in enumerate(rows)]
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == len(rows)
