"""What a job costs beside its engine: a job and the bare engine over the same rows, in turns.

Each is a process of its own with all that it starts, and runs for some seconds while the other is stopped: a
machine that is slow for a while is so for both. The job is `rayskip run`'s, Ray, storage and commits included, into
a folder that goes away; its clock runs from its replica's being ready to the commit of the last shard. The engine
has the sizes that the replica chose, and its rows are tokenized before its clock runs. Loading is neither's. The
last line is all of it as JSON.

    python infra/measure_job.py configs/bench512.yaml --rounds 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from rayskip.cluster.ray_cluster import usable_cores
from rayskip.cluster.ray_pool import RayPool
from rayskip.cluster.replica import device_for, use_threads
from rayskip.config import JobConfig
from rayskip.config.file import load_config
from rayskip.data.sources import Source, discover, every_row
from rayskip.driver.loop import run_job
from rayskip.evaluate.turns import run_in_turns
from rayskip.pool import Event, Ready

if TYPE_CHECKING:
    from rayskip.engine import Completion


class WatchedPool(RayPool):
    """Tells what its replica says when it is ready, and when the last shard is committed."""

    def __init__(self, job: JobConfig, source: Source, told: Connection) -> None:
        super().__init__(job, source)
        self._told = told
        self._is_ready = False

    def wait(self, timeout_s: float) -> list[Event]:
        events = super().wait(timeout_s)
        for event in events:
            if isinstance(event, Ready):
                self._is_ready = True
                self._told.send(event.info.engine)
        return events

    def close(self) -> None:
        if self._is_ready:
            self._told.send("over")
        super().close()


def run_driver(told: Connection, job: JobConfig) -> None:
    """The job, from its driver on."""
    report = run_job(job, lambda job, source: WatchedPool(job, source, told))
    told.send(report.completion_tokens)


def generate(told: Connection, job: JobConfig) -> list[Completion]:
    """The engine over the job's rows."""
    use_threads(job.cluster.cpus_per_replica or 1)
    from rayskip.data.prompts import PromptBuilder, prompt_columns
    from rayskip.engine import Engine

    engine = Engine.load(job.model, job.engine, job.decode, device_for(job.cluster.gpus_per_replica))
    builder = PromptBuilder(job.input, job.sampling, engine.tokenizer, engine.max_model_len)
    rows = every_row(discover(job.input), prompt_columns(job.input), job.input.max_rows)
    prompts = [builder.build(row, index, shard.name) for shard, index, row in rows]
    told.send(engine.info)
    for prompt in prompts:
        engine.add(prompt)
    done = list(engine.run())
    told.send("over")
    return done


def run_engine(told: Connection, job: JobConfig) -> None:
    done = generate(told, job)
    told.send(sum(row.completion_tokens for completion in done for row in completion.generations))


class Side:
    """A process that has loaded and waits for its turns; see `Run` in rayskip/evaluate/turns.py.

    info: the facts of its engine. turns: that it has had. result: what it told last, once it is over.
    """

    def __init__(self, run: Callable[[Connection, JobConfig], None], job: JobConfig) -> None:
        self.seconds = 0.0
        self.turns = 0
        self.result: Any = None
        spawn = multiprocessing.get_context("spawn")
        self._told, theirs = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=run, args=(theirs, job))
        self._process.start()
        theirs.close()
        try:
            self.info: dict[str, Any] = self._hear()
            self._stop()
        except BaseException:
            self.close()
            raise

    def go_on(self, seconds: float) -> bool:
        began = time.perf_counter()
        self.turns += 1
        self._signal(signal.SIGCONT)
        over = self._told.poll(seconds)
        if not over:
            self._stop()
        self.seconds += time.perf_counter() - began
        if over:  # what it still does is not timed, and over before the other's turn
            self._hear()
            self.result = self._hear()
            self._process.join()
        return over

    def close(self) -> None:
        """End it and all that it started, wherever it is; safe to repeat."""
        self._signal(signal.SIGKILL)
        self._process.join()

    def _hear(self) -> Any:
        try:
            return self._told.recv()
        except EOFError:
            raise SystemExit("error: the job or the engine failed; what it said is above") from None

    def _stop(self) -> None:
        """All of it, also what was started meanwhile."""
        before: set[int] = set()
        while (now := self._signal(signal.SIGSTOP)) != before:
            before = now

    def _signal(self, number: int) -> set[int]:
        """To all of its processes; whom it reached."""
        reached = set()
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
                    reached.add(one.pid)
        return reached


def run_round(job: JobConfig, turn_s: float) -> dict[str, float]:
    """Tokens a second of both. Ends the program when they differ in sizes or in how many tokens they generate."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        output = job.output.model_copy(update={"path": folder})
        driver = Side(run_driver, job.model_copy(update={"output": output}))
        running.callback(driver.close)
        rows = driver.info["batch_rows"] * driver.info["workers"]
        sizes = job.engine.model_copy(update={"max_batch_rows": rows})
        engine = Side(run_engine, job.model_copy(update={"engine": sizes}))
        running.callback(engine.close)
        for key in driver.info.keys() - {"pages"}:
            if driver.info[key] != engine.info[key]:
                sys.exit(f"error: {key} is {driver.info[key]} in the job, {engine.info[key]} in the engine")
        run_in_turns([driver, engine], turn_s)
    if driver.result != engine.result:
        sys.exit(f"error: the job generated {driver.result} tokens, {engine.result} the engine")
    rates = [side.result / side.seconds for side in (driver, engine)]
    return {"job": rates[0], "engine": rates[1], "ratio": rates[0] / rates[1], "turns": driver.turns}


def main() -> None:
    parser = argparse.ArgumentParser(description="A job beside the bare engine, in turns.")
    parser.add_argument("config", type=Path, help="a job's config, with one replica")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=4.0, help="seconds that each runs at a time")
    arguments = parser.parse_args()
    job = load_config(arguments.config, arguments.overrides)
    if job.cluster.replica_range != (1, 1):
        parser.error("cluster.replicas must be 1: the engine beside the job is one")
    if job.cluster.address or "RAY_ADDRESS" in os.environ:
        parser.error(
            "cluster.address and RAY_ADDRESS must not be set: only a cluster of the job's own can be stopped"
        )
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that nothing stays stopped
    job = job.model_copy(update={"cluster": job.cluster.with_cpus(usable_cores())})
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append(run_round(job, arguments.turn))
        print(
            "job {job:.0f} tok/s, engine {engine:.0f}: {ratio:.3f} in {turns} turns".format(**rounds[-1]),
            flush=True,
        )
    print(f"median {median(one['ratio'] for one in rounds):.3f}")
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
