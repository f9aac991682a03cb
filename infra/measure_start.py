"""What surrounds generating, in seconds: help, plan, loading a model, and a job around its loading and generating.

Each is a process of its own, as a user starts it. Where other source trees are named, all take turns, so a machine
that is slow for a while is so for each. Medians; the last line is all of it as JSON.

    git worktree add ../before HEAD~1
    python infra/measure_start.py configs/quickstart.yaml ../before --rounds 5 --rows 8
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
COMMAND = "from rayskip.cli import main; main()"
LOAD = """
import os, sys
from rayskip.cluster.replica import use_threads
from rayskip.config.file import load_config
job = load_config(sys.argv[1], ())
use_threads(len(os.sched_getaffinity(0)))
from rayskip.engine import Engine
Engine.load(job.model, job.engine, job.decode, "cpu")
"""


def seconds(tree: Path, *arguments: str, cache: Path | None = None) -> float:
    """Of a Python process that imports rayskip from the tree. Ends the program where it fails."""
    environment = os.environ | {"PYTHONPATH": str(tree)} | ({"RAYSKIP_CACHE": str(cache)} if cache else {})
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {tree}: {done.stderr}")
    return time.perf_counter() - began


def first_load(tree: Path, config: str) -> float:
    """Of loading with nothing in the cache but the prepared models."""
    from rayskip.user_cache import cache_root

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(cache_root() / "models", Path(folder) / "models")
        return seconds(tree, LOAD, config, cache=Path(folder))


def measure(tree: Path, config: str, rows: int, first: bool) -> Iterator[tuple[str, float]]:
    yield "help", seconds(tree, COMMAND, "--help")
    yield "load", seconds(tree, LOAD, config)
    if first:
        yield "first load", first_load(tree, config)
    with tempfile.TemporaryDirectory() as out:
        job = [config, "--set", f"input.max_rows={rows}", "--set", f"output.path={out}"]
        yield "plan", seconds(tree, COMMAND, "plan", *job)
        whole = seconds(tree, COMMAND, "run", *job)
        report = json.loads((Path(out) / ".rayskip/report.json").read_text())
    yield "job", whole
    yield "job's loading", report["load_s"]
    yield "job's generating", report["generate_s"]
    yield "job's rest", whole - report["load_s"] - report["generate_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description="What surrounds generating, in seconds.")
    parser.add_argument("config", help="a job's config")
    parser.add_argument(
        "trees", type=Path, nargs="*", help="other source trees: folders with rayskip/ in them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of the job")
    parser.add_argument("--first", action="store_true", help="also load with an empty cache")
    arguments = parser.parse_args()
    trees = [HERE, *(tree.resolve() for tree in arguments.trees)]
    found: dict[str, dict[str, list[float]]] = {str(tree): {} for tree in trees}
    for _ in range(arguments.rounds):
        for tree in trees:
            for name, taken in measure(tree, arguments.config, arguments.rows, arguments.first):
                found[str(tree)].setdefault(name, []).append(taken)
                print(f"{tree.name}: {name} {taken:.2f} s", flush=True)
    for tree in trees:
        medians = (f"{name} {median(taken):.2f}" for name, taken in found[str(tree)].items())
        print(f"{tree}: {', '.join(medians)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
