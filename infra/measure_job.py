"""What a job costs beside its engine: a job and the bare engine over the same rows, in turns.

Each runs for some seconds while all processes of the other are stopped: a machine that is slow for a while is so
for both. The job is `rayskip run`'s, Ray, storage and commits included, into a folder of its own; its clock runs
from the first shard that is handed out to the commit of the last one. The engine's runs over rows that are
tokenized already. Loading is neither's. The last line is all of it as JSON.

    python infra/measure_job.py configs/bench512.yaml --rounds 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import psutil

from rayskip.cluster.ray_pool import RayPool
from rayskip.cluster.replica import use_threads
from rayskip.config import JobConfig
from rayskip.config_file import load_config
from rayskip.data.prompts import PromptBuilder
from rayskip.data.records import Prompt, Shard
from rayskip.data.sources import Source, discover, every_row
from rayskip.driver.loop import run_job
from rayskip.engine import Engine
from rayskip.evaluate.turns import EngineRun, run_in_turns

BEGUN, COMMITTED = "begun", "committed"


class WatchedPool(RayPool):
    """Tells when the first shard is handed out and when the last one is committed."""

    def __init__(self, job: JobConfig, source: Source, told: Connection) -> None:
        super().__init__(job, source)
        self._told = told
        self._begun = False

    def submit(self, replica: int, shard: Shard) -> None:
        if not self._begun:
            self._told.send(BEGUN)
            self._begun = True
        super().submit(replica, shard)

    def close(self) -> None:
        self._told.send(COMMITTED)
        super().close()


def drive(job: JobConfig, told: Connection) -> None:
    """The job's driver, in a process of its own; the tokens that it generated come last."""
    report = run_job(job, lambda job, source: WatchedPool(job, source, told), fresh=True)
    told.send(report.completion_tokens)


class JobRun:
    """A job that has loaded and waits for its first turn; see `Run` in rayskip/evaluate/turns.py."""

    def __init__(self, job: JobConfig) -> None:
        self.seconds = 0.0
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the engine's threads
        self._told, theirs = spawn.Pipe(duplex=False)
        self._driver = spawn.Process(target=drive, args=(job, theirs))
        self._driver.start()
        theirs.close()
        self._hear(BEGUN)
        self._signal(signal.SIGSTOP)

    def go_on(self, seconds: float) -> bool:
        began = time.perf_counter()
        self._signal(signal.SIGCONT)
        over = self._told.poll(seconds)
        if over:
            self._hear(COMMITTED)
        else:
            self._signal(signal.SIGSTOP)
        self.seconds += time.perf_counter() - began
        return over

    def completion_tokens(self) -> int:
        """Of the whole job, once it is over; its processes are gone then."""
        tokens: int = self._told.recv()
        self._driver.join()
        return tokens

    def _hear(self, expected: str) -> None:
        said = self._told.recv()
        if said != expected:
            raise RuntimeError(f"the job said {said!r} where {expected!r} was to come")

    def _signal(self, number: int) -> None:
        driver = psutil.Process(self._driver.pid)
        for process in [driver, *driver.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def run_round(
    job: JobConfig, engine: Engine, prompts: Sequence[Prompt], turn_s: float
) -> tuple[float, float]:
    """Tokens a second of the job and of the bare engine. Raises RuntimeError when they do not generate the same."""
    with tempfile.TemporaryDirectory() as folder:
        output = job.output.model_copy(update={"path": folder})
        runs = JobRun(job.model_copy(update={"output": output})), EngineRun(engine, prompts)
        run_in_turns(runs, turn_s)
        tokens = runs[0].completion_tokens()
    bare = sum(row.completion_tokens for completion in runs[1].completions for row in completion.generations)
    if tokens != bare:
        raise RuntimeError(f"the job generated {tokens} tokens, the bare engine {bare}")
    return tokens / runs[0].seconds, bare / runs[1].seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="A job beside the bare engine, in turns.")
    parser.add_argument("config", type=Path, help="a job's config, with one replica")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=2.0, help="seconds that each runs at a time")
    arguments = parser.parse_args()
    job = load_config(arguments.config, arguments.overrides)
    if job.cluster.replica_range != (1, 1):
        parser.error("cluster.replicas must be 1: the engine beside the job is one")
    use_threads(job.cluster.cpus_per_replica or os.cpu_count() or 1)
    weights = Engine.load(job.model, job.engine, job.decode)
    builder = PromptBuilder(job.input, job.sampling, weights.tokenizer, weights.max_model_len)
    rows = every_row(discover(job.input), job.input.max_rows)
    prompts = [builder.build(row, index, shard.name) for shard, index, row in rows]
    rounds = []
    for _ in range(arguments.rounds):
        engine = Engine(weights.decoder, weights.tokenizer, job.engine, job.decode)
        rounds.append(run_round(job, engine, prompts, arguments.turn))
        print("job {:.0f} tok/s, engine {:.0f}: {:.3f}".format(*rounds[-1], share(rounds[-1])), flush=True)
    print(f"median {median(map(share, rounds)):.3f}")
    print(json.dumps({"rows": len(prompts), "rounds": rounds}))


def share(rates: tuple[float, float]) -> float:
    return rates[0] / rates[1]


if __name__ == "__main__":
    main()
