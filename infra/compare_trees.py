"""Two source trees of rayskip over the rows of one job, in turns: how many times as fast this one is as the other.

For a change to the engine or the kernels: check out or copy the tree without it, and compare. Each side is the bare
engine of its tree in a process of its own, which runs for some seconds while the other is stopped (as in
measure_job.py), so a machine that is slow for a while is so for both. Loading is not timed. Both need the names
that measure_job.py imports. The last line is all of it as JSON.

    git worktree add ../before HEAD~1
    python infra/compare_trees.py ../before configs/bench512.yaml --set input.max_rows=128
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from measure_job import Side, generate

from rayskip.cluster.ray_cluster import usable_cores
from rayskip.config import JobConfig
from rayskip.config.file import load_config
from rayskip.evaluate.turns import run_in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent.parent


@contextmanager
def imports_from(tree: Path) -> Iterator[None]:
    """Processes that start meanwhile import rayskip from the tree."""
    sys.path.insert(0, str(tree))
    try:
        yield
    finally:
        sys.path.remove(str(tree))


def run_tree(told: Connection, job: JobConfig) -> None:
    """Generate; tell how many tokens, and their hash."""
    rows = [
        row
        for done in sorted(generate(told, job), key=lambda one: one.request_id)
        for row in done.generations
    ]
    tokens = [row.token_ids for row in rows]
    told.send((sum(map(len, tokens)), hashlib.sha256(repr(tokens).encode()).hexdigest()))


def run_round(trees: list[Path], job: JobConfig, turn_s: float) -> dict[str, float | bool]:
    """Tokens a second of both trees, and whether all token ids are the same."""
    sides = []
    with ExitStack() as running:
        for tree in trees:
            with imports_from(tree):
                sides.append(Side(run_tree, job))
            running.callback(sides[-1].close)
        run_in_turns(sides, turn_s)
    own, other = (side.result[0] / side.seconds for side in sides)
    same = sides[0].result == sides[1].result
    return {"this": own, "other": other, "ratio": own / other, "turns": sides[0].turns, "same_tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser(description="This source tree beside another one, in turns.")
    parser.add_argument("tree", type=Path, help="the other tree: a folder with rayskip/ in it")
    parser.add_argument("config", type=Path, help="a job's config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turn", type=float, default=3.0, help="seconds that each runs at a time")
    arguments = parser.parse_args()
    other = arguments.tree.resolve()
    if not (other / "rayskip" / "__init__.py").is_file():
        parser.error(f"{other} has no rayskip/__init__.py")
    job = load_config(arguments.config, arguments.overrides)
    job = job.model_copy(update={"cluster": job.cluster.with_cpus(usable_cores())})
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that nothing stays stopped
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append(run_round([HERE, other], job, arguments.turn))
        print(
            "this {this:.1f} tok/s, other {other:.1f}: {ratio:.3f} in {turns} turns".format(**rounds[-1]),
            "" if rounds[-1]["same_tokens"] else ", and OTHER TOKENS",
            sep="",
            flush=True,
        )
    print(f"median {median(one['ratio'] for one in rounds):.3f}")
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
