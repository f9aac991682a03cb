"""Labels: what scores say, whether calibration calibrates, and a whole job against its own counts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rayskip
from rayskip import Engine
from rayskip.cluster.paths import absolute
from rayskip.config.file import load_config
from rayskip.config.label import LabelTask
from rayskip.data.labels import Labeller, asked, expected_error, fitted_temperature, rightness, softmax
from rayskip.data.records import Generation, Labelled
from rayskip.driver.report import LabelReport
from rayskip.dry_run import dry_run
from rayskip.errors import ConfigError, InputError
from rayskip.stats import Stats

LABELS = {"good": "the writer is content", "bad": None, "mixed": None}


def _task(**more: Any) -> LabelTask:
    return LabelTask.model_validate({"labels": LABELS} | more)


def _scored(scores: list[float]) -> Generation:
    return Generation(0, 0, "score", scores=scores)


def test_scores_become_probabilities() -> None:
    scores = [-1.0, -4.0, -2.0]
    row = Labeller(_task(), [1, 4, 1]).label(_scored(scores))
    expected = np.exp(scores) / np.exp(scores).sum()
    assert row.labelled is not None
    assert (row.text, row.labelled.label, row.labelled.calibrated) == ("good", "good", None)
    assert list((row.labelled.probabilities or {}).values()) == pytest.approx(expected)
    assert row.labelled.margin == pytest.approx(expected[0] - expected[2])
    by_token = Labeller(_task(by_token=True), [1, 8, 1]).label(_scored(scores))
    assert by_token.text == "bad"  # -0.5 a token
    unsure = Labeller(_task(abstain_below=0.9), [1, 4, 1]).label(_scored(scores))
    assert unsure.labelled is not None
    assert (unsure.text, unsure.labelled.label, unsure.labelled.best) == (None, None, "good")
    generated = Labeller(_task(method="generate"), [1, 4, 1]).label(Generation(0, 0, "stop", text=" bad"))
    assert (generated.text, generated.labelled) == ("bad", Labelled("bad"))
    failed = Generation(0, 0, "error", error_type="x")
    assert Labeller(_task(), [1, 4, 1]).label(failed) == failed


def test_a_fitted_temperature_makes_confidence_accuracy() -> None:
    """Labels are drawn from a known distribution; the model is as right, and three times as sure."""
    random = np.random.default_rng(0)
    truth = random.normal(size=(6000, 3)) * 1.5
    right = np.array([random.choice(3, p=own) for own in softmax(truth)])
    evidence = truth * 3
    assert fitted_temperature(evidence, right) == pytest.approx(3, rel=0.05)
    names = list(LABELS)
    labeller = Labeller(_task(), [1, 1, 1]).fit(evidence[:3000].tolist(), [names[at] for at in right[:3000]])
    stats = Stats()
    for own, at in zip(evidence[3000:].tolist(), right[3000:], strict=True):
        row = labeller.label(_scored(own))
        assert row.labelled is not None
        stats += rightness(names[at], row.labelled)
    before, after = (expected_error(stats.label_bins, kind) for kind in ("probability", "calibrated"))
    assert before is not None
    assert after is not None
    assert before > 0.1 > 0.03 > after
    report = LabelReport.of(stats, _task())
    assert report is not None
    assert report.accuracy == pytest.approx((evidence[3000:].argmax(1) == right[3000:]).mean())
    assert report.by_label["good"]["rows"] == (right[3000:] == 0).sum()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"labels": ["one"]}, "must have two labels at least, got 1"),
        ({"labels": [True, False]}, "in YAML put yes, no, on, off in quotes"),
        ({"labels": ["a", "a "]}, "names a twice"),
        (
            {"labels": ["a", "b"], "method": "generate", "abstain_below": 0.5},
            "abstain_below needs method: score",
        ),
        ({"labels": ["a", "b"], "lables": 1}, "did you mean"),
    ],
)
def test_a_task_with_a_fault_is_refused(task: dict[str, Any], said: str) -> None:
    job = {"name": "l", "model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}, "task": task}
    with pytest.raises(ConfigError, match=said):
        load_config(job)


TEXTS = {
    "good": ["I loved every minute of it", "Great, works perfectly", "The best meal in years"],
    "bad": ["A waste of money", "It broke after one day", "Awful staff and cold food"],
}


def _job(folder: Path, **task: Any) -> dict[str, Any]:
    for name, rows in (("rows", 24), ("known", 12)):
        with (folder / f"{name}.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(["review", "gold"])
            for row in range(rows):
                label = ("good", "bad")[row % 2]
                writer.writerow([f"{TEXTS[label][row % 3]}, {name} {row}", label])
    return {
        "name": "labels",
        "model": {"path": "smollm2-135m-instruct"},
        "input": {"path": str(folder / "rows.csv"), "prompt": "review"},
        "task": {"labels": {"good": "the writer is content", "bad": None}, "gold": "gold"} | task,
        "output": {"path": str(folder / "out")},
    }


def test_a_job_labels_its_rows(tmp_path: Path) -> None:
    config = _job(tmp_path, calibrate={"path": str(tmp_path / "known.csv"), "column": "gold"})
    report = rayskip.run(config)
    table = pd.read_parquet(tmp_path / "out")
    assert report.labels is not None
    assert report.labels.accuracy == (table.label == table.gold).mean()
    assert report.labels.calibrated_error is not None
    engine = Engine.load("smollm2-135m-instruct", {"max_batch_rows": 4})
    task = LabelTask.model_validate(config["task"])
    chats = [[{"role": "user", "content": asked(task, review)}] for review in table.review[:3]]
    for row, generation in zip(table[:3].itertuples(), engine.score(chats, ["good", "bad"]), strict=True):
        expected = softmax(np.array(generation.scores))
        assert [row.probabilities["good"], row.probabilities["bad"]] == expected.tolist()  # bit by bit
        assert row.probability == expected.max()
        assert row.text == row.label == ("good", "bad")[expected.argmax()]
    changed = (tmp_path / "known.csv").read_text().replace("known 1,", "known one,")
    (tmp_path / "known.csv").write_text(changed)
    assert "the file of task.calibrate" in str(dry_run(load_config(config)).refused)


def test_labels_that_are_not_the_tasks_are_refused_before_anything_loads(tmp_path: Path) -> None:
    job = _job(tmp_path, calibrate={"path": str(tmp_path / "known.csv"), "column": "gold"})
    job["task"]["labels"] = ["goood", "bad"]
    with pytest.raises(
        InputError, match=r"known.csv: row 0: gold is .*none of task.labels; did you mean goood"
    ):
        dry_run(load_config(job))
    strange = _job(tmp_path)
    strange["task"]["labels"] = ["Good", "Bad"]
    with pytest.raises(ConfigError, match=r"task.gold: 24 of the first 24 .* as 'good'; did you mean Good"):
        dry_run(load_config(strange))
    partly = _job(tmp_path)
    partly["task"]["labels"] = ["Good", "bad"]
    assert "task.gold: 12 of the first 24" in " ".join(dry_run(load_config(partly)).plan.warnings)
    with pytest.raises(InputError, match=r"task\.gold names 'golden'"):
        dry_run(load_config(_job(tmp_path, gold="golden")))
    with pytest.raises(InputError, match=r"task\.calibrate\.column names 'label'"):
        dry_run(load_config(_job(tmp_path, calibrate={"path": str(tmp_path / "known.csv")})))


def test_plan_asks_as_the_job_will(tmp_path: Path) -> None:
    seen = dry_run(load_config(_job(tmp_path, method="generate")))
    assert "- good: the writer is content\n- bad\n\nText:\nI loved every minute" in seen.prompts[0]
    assert json.dumps(seen.job.task.model_dump() if seen.job.task else None)


def test_a_job_that_asks_through_a_template_which_tells_the_date_keeps_its_day(
    tmp_path: Path, smollm2: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2, model)
    config = model / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    config.write_text(json.dumps(settings))
    for file in model.glob("*.jinja"):
        file.unlink()
    job = _job(tmp_path) | {"model": {"path": str(model)}}
    job["task"]["labels"]["path"] = str(tmp_path)  # a name that a path of a section has
    seen = dry_run(load_config(job))
    assert seen.plan.record.date is not None
    assert absolute(load_config(job)).task == load_config(job).task
