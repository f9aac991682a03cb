"""The files that start the job elsewhere: they parse, and what they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import ray
import yaml

from rayskip.config.file import load_config
from rayskip.pool import LOOK_AHEAD

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "Dockerfile").read_text()
RAYJOB = yaml.safe_load((INFRA / "rayjob.yaml").read_text())
CLUSTER_TEXT = (INFRA / "ray-cluster.yaml").read_text()
CLUSTER = yaml.safe_load(CLUSTER_TEXT)


def check_entrypoint(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python SCRIPT CONFIG [--set KEY=VALUE]...`: the script exists, the config loads so overridden."""
    python, script, config, *options = command
    assert python == "python"
    assert (ROOT / script).is_file()
    assert options[::2] == ["--set"] * (len(options) // 2)
    monkeypatch.chdir(ROOT)
    assert load_config(config, options[1::2]).output.path.startswith("s3://")


def comment_commands(text: str) -> str:
    """The commands in a file's leading comment, with their continuation lines joined."""
    comment = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    return re.sub(r"\\\n\s*", "", comment)


def containers() -> list[dict[str, Any]]:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_rayjob_runs_the_job_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    env, chdir, *command = shlex.split(RAYJOB["spec"]["entrypoint"])
    assert (env, chdir) == ("env", "--chdir=" + re.findall(r"^WORKDIR (.+)$", DOCKERFILE, re.M)[-1])
    check_entrypoint(command, monkeypatch)


def test_rayjob_names_the_locked_ray_and_one_image() -> None:
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    assert len({container["image"] for container in containers()}) == 1


def test_rayjob_replicas_fit_their_pods() -> None:
    overrides = re.findall(r"--set (\S+)", RAYJOB["spec"]["entrypoint"])
    cluster = load_config(ROOT / "configs/quickstart.yaml", overrides).cluster
    (workers,) = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster.cpus_per_replica is not None
    assert cluster.cpus_per_replica <= float(limits["cpu"])
    assert cluster.gpus_per_replica <= limits["nvidia.com/gpu"]
    assert cluster.replica_range == (workers["minReplicas"], workers["maxReplicas"])


def test_cluster_file_fits_rays_schema() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(CLUSTER, json.loads(schema.read_text()))
    assert CLUSTER["head_node_type"] in CLUSTER["available_node_types"]


def test_cluster_files_comment_submits_a_job_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"ray job submit .* -- (.+)", comment_commands(CLUSTER_TEXT))
    check_entrypoint(shlex.split(command), monkeypatch)


def test_dockerfile_copies_what_exists() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    assert {"rayskip", "jobs", "configs"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_ci_runs_the_checks_and_the_tests_of_the_makefile() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    targets = re.findall(r"^make (\w+)$", script.read_text(), re.M)
    assert targets == ["check", "test"]
    planned = subprocess.run(
        ["make", "--dry-run", *targets, "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "rayskip run configs/quickstart.yaml" in planned.stdout


def test_the_simulated_driver_commits_every_row_and_overloads_no_replica() -> None:
    """The script itself verifies what each job wrote: every row exactly once."""
    command = [sys.executable, "infra/simulate_driver.py", "--replicas", "1", "5"]
    options = ["--shards-per-replica", "3", "--shard-rows", "4", "--seconds", "0.01"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    jobs = json.loads(done.stdout.splitlines()[-1])["jobs"]
    assert [(job["replicas"], job["shards"], job["rows"]) for job in jobs] == [(1, 3, 12), (5, 15, 60)]
    assert all(1 <= job["most_held"] <= LOOK_AHEAD for job in jobs)


@pytest.mark.soak
def test_growth_is_measured_on_a_random_model_of_any_size(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--experts", "6"]
    subprocess.run([sys.executable, "infra/random_llama.py", str(tmp_path), *sizes], cwd=ROOT, check=True)
    command = [sys.executable, "infra/measure_growth.py", "--model", str(tmp_path), "--rows", "9"]
    options = ["--prompts", "4", "40", "--outputs", "3", "--batch-rows", "2"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(one["grows"], one["rows"], one["prompt"], one["output"]) for one in found[:3]] == [
        ("prompt", 2, 4, 32),
        ("prompt", 2, 40, 32),
        ("output", 2, 32, 3),
    ]
    assert (found[3]["grows"], found[3]["rows"], found[3]["output"]) == ("rows", 9, 8)
    assert all(one["tok_s"] > 0 and one["gflop_s"] > 0 for one in found)


def small_job(tmp_path: Path) -> Path:
    """The config of a job with a small random model, some thousand tokens long."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Row number {row}:"}) + "\n" for row in range(24)))
    config = tmp_path / "job.yaml"
    job = {
        "name": "turns",
        "model": {"path": str(tmp_path / "model")},
        "input": {"path": str(rows), "max_rows": 20},
        "sampling": {"max_tokens": 200, "temperature": 0},
        "cluster": {"replicas": 1, "cpus_per_replica": 1},
        "output": {"path": str(tmp_path / "never"), "shard_rows": 5},
    }
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--heads", "4"]
    subprocess.run(
        [sys.executable, "infra/random_llama.py", str(tmp_path / "model"), *sizes], cwd=ROOT, check=True
    )
    config.write_text(json.dumps(job))  # JSON is YAML
    return config


@pytest.mark.soak
def test_a_job_and_the_bare_engine_take_turns(tmp_path: Path) -> None:
    """The script itself refuses to compare what has other sizes or generated another number of tokens."""
    config = str(small_job(tmp_path))
    command = [sys.executable, "infra/measure_job.py", config, "--rounds", "1", "--turn", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    stopped: set[int] = set()
    while process.poll() is None:
        stopped |= stopped_sides(process.pid)
        time.sleep(0.01)
    assert process.stdout is not None
    assert process.returncode == 0
    (found,) = json.loads(process.stdout.read().splitlines()[-1])
    assert len(stopped) == 2
    assert found["turns"] > 1
    assert found["ratio"] == found["job"] / found["engine"] > 0
    assert not (tmp_path / "never").exists()


@pytest.mark.soak
def test_two_source_trees_take_turns(tmp_path: Path) -> None:
    config, other, imported = str(small_job(tmp_path)), tmp_path / "other", tmp_path / "imported"
    shutil.copytree(ROOT / "rayskip", other / "rayskip")
    with (other / "rayskip" / "__init__.py").open("a") as package:
        package.write(f"\n__import__('pathlib').Path({str(imported)!r}).touch()\n")
    command = [sys.executable, "infra/compare_trees.py", str(other), config, "--rounds", "1", "--turn", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert imported.exists()
    assert found["turns"] > 1
    assert found["same_tokens"]
    assert found["ratio"] == found["this"] / found["other"] > 0


def stopped_sides(pid: int) -> set[int]:
    """Processes that were spawned to be measured and are stopped with all that they started."""
    found = set()
    with suppress(psutil.NoSuchProcess, IndexError):
        for side in psutil.Process(pid).children():
            tree = [side, *side.children(recursive=True)]
            if "spawn_main" in str(side.cmdline()) and all(one.status() == "stopped" for one in tree):
                found.add(side.pid)
    return found
