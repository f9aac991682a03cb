"""How many replicas one driver keeps busy: the real driver on one core, with replicas that only take time.

Planning, the loop, commit records, report and manifest are the driver's own, on a local folder with its fsyncs.
A replica takes a fixed time per shard and says once a second how far it is, as one on Ray does. Attempt files are
replicas' work: they are written before the clock starts, and so is the input. Does not know what Ray costs the
driver (a remote call per shard, one per replica and second for its progress), nor an object store's latency.

    python infra/simulate_driver.py --replicas 64 512 --shards-per-replica 8 --seconds 1
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayskip.cluster.ray_pool import PROGRESS_EVERY_S
from rayskip.config import JobConfig
from rayskip.data.records import Shard, ShardResult
from rayskip.data.sources import Source
from rayskip.driver.loop import run_plan
from rayskip.driver.plan import make_plan
from rayskip.driver.verify import verify
from rayskip.pool import LOOK_AHEAD, Alive, Done, Event, Ready, ReplicaInfo, ReplicaProgress
from rayskip.stats import Stats

TOKENS_PER_ROW = 100
"""What a replica says it generated; only the driver's display and report add it up."""


@dataclass(frozen=True)
class Size:
    """A simulated job: replicas, shards for each, rows of a shard, seconds that a replica takes for one."""

    replicas: int
    shards_per_replica: int
    shard_rows: int
    seconds: float

    @property
    def shards(self) -> int:
        return self.replicas * self.shards_per_replica

    @property
    def rows(self) -> int:
        return self.shards * self.shard_rows


@dataclass(frozen=True)
class Measured:
    """One simulated job. generate_s: from the first replica ready to the last commit. wall_s: the whole run.

    busy: share of generate_s that the replicas worked. dispatches_s: shards handed out per second of generate_s.
    cpu_s_*: the driver's CPU seconds (user and system, all threads), without the pool's. rss_mb: growth of the peak
    resident memory. finish_s: report, check of the data files and manifest. most_held: shards that a replica had at
    once, running or waiting.
    """

    replicas: int
    shards: int
    rows: int
    plan_s: float
    generate_s: float
    finish_s: float
    wall_s: float
    busy: float
    dispatches_s: float
    cpu_s_per_1000_shards: float
    cpu_s_per_1000_rows: float
    pool_cpu_s: float
    rss_mb: float
    most_held: int


class ClockReplicas:
    """A Pool without threads: a heap of the times at which replicas say something.

    A replica runs its shards one after the other, each for `seconds`; it starts the next the moment one ends,
    whether or not the driver has heard of the end.
    """

    def __init__(self, attempts: dict[int, ShardResult], seconds: float) -> None:
        self._attempts = attempts
        self._seconds = seconds
        self._free_at: list[float] = []  # per replica: when it has run all it was given
        self._held: Counter[int] = Counter()
        self._rows: Counter[int] = Counter()
        self._due: list[tuple[float, int, int]] = []  # (when, replica, shard or _READY or _PROGRESS)
        self.most_held = 0
        self.cpu_s = 0.0
        self.closed = 0.0

    def start(self) -> int:
        with self._apart():
            replica = len(self._free_at)
            self._free_at.append(time.monotonic())
            heapq.heappush(self._due, (self._free_at[replica], replica, _READY))
            return replica

    def submit(self, replica: int, shard: Shard) -> None:
        with self._apart():
            self._free_at[replica] = max(self._free_at[replica], time.monotonic()) + self._seconds
            heapq.heappush(self._due, (self._free_at[replica], replica, shard.index))
            self._held[replica] += 1
            assert self._held[replica] <= LOOK_AHEAD, f"replica {replica} is busy and got shard {shard.index}"
            self.most_held = max(self.most_held, self._held[replica])

    def wait(self, timeout_s: float) -> list[Event]:
        with self._apart():
            until_first = self._due[0][0] - time.monotonic() if self._due else timeout_s
            if until_first > 0:
                time.sleep(min(until_first, timeout_s))
            now = time.monotonic()
            events = []
            while self._due and self._due[0][0] <= now:
                _, replica, what = heapq.heappop(self._due)
                events.append(self._event(replica, what, now))
            return events

    def kill(self, replica: int) -> None:
        raise AssertionError(f"replica {replica} never hangs")

    def close(self) -> None:
        self.closed = time.monotonic()

    def _event(self, replica: int, what: int, now: float) -> Event:
        if what >= 0:
            self._held[replica] -= 1
            result = self._attempts[what]
            self._rows[replica] += result.rows
            return Done(replica, result)
        heapq.heappush(self._due, (now + PROGRESS_EVERY_S, replica, _PROGRESS))
        if what == _READY:
            return Ready(replica, ReplicaInfo(0.0, {"cpu": "none"}, {"max_batch_rows": 1}))
        rows = self._rows[replica]
        return Alive(replica, ReplicaProgress(rows, rows * TOKENS_PER_ROW))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Count the CPU time of the block as the pool's."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.cpu_s += time.thread_time() - began


_READY = -2
_PROGRESS = -1


def simulate(size: Size, folder: Path) -> Measured:
    """Run one job in `folder`, on one core where the system lets a process choose, and verify its output."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    write_input(size, folder / "in.parquet")
    job = job_config(size, folder)
    plan = make_plan(job)
    pool = ClockReplicas(
        {shard.index: write_attempt(folder / "attempts", shard) for shard in plan.shards}, size.seconds
    )

    def pool_factory(job: JobConfig, source: Source) -> ClockReplicas:
        # not before: a job does not begin beside others' data
        (folder / "attempts/data").rename(folder / "out/data")
        return pool

    peak, cpu, began = peak_mb(), time.process_time(), time.monotonic()
    report = run_plan(job, plan, pool_factory)
    ended = time.monotonic()
    driver_cpu_s = time.process_time() - cpu - pool.cpu_s
    grown = peak_mb() - peak
    found = verify(str(folder / "out"))
    assert (found.files, found.rows) == (size.shards, size.rows), found
    return Measured(
        replicas=size.replicas,
        shards=size.shards,
        rows=size.rows,
        plan_s=plan.seconds,
        generate_s=report.generate_s,
        finish_s=ended - pool.closed,
        wall_s=ended - began,
        busy=size.shards_per_replica * size.seconds / report.generate_s,
        dispatches_s=size.shards / report.generate_s,
        cpu_s_per_1000_shards=driver_cpu_s / size.shards * 1000,
        cpu_s_per_1000_rows=driver_cpu_s / size.rows * 1000,
        pool_cpu_s=pool.cpu_s,
        rss_mb=grown,
        most_held=pool.most_held,
    )


def job_config(size: Size, folder: Path) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "simulated",
            "model": {"path": "smollm2-135m-instruct"},  # fingerprinted, never loaded
            "input": {"path": str(folder / "in.parquet"), "prompt": "prompt"},
            "cluster": {"replicas": size.replicas},
            "output": {"path": str(folder / "out"), "format": "jsonl", "shard_rows": size.shard_rows},
        }
    )


def write_input(size: Size, path: Path) -> None:
    """One column of equal prompts, a batch at a time so that this leaves no peak in memory."""
    schema = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, size.rows, 1 << 16):
            rows = min(1 << 16, size.rows - start)
            writer.write_table(pa.table([pa.repeat("Say something.", rows)], schema=schema))


def write_attempt(out: Path, shard: Shard) -> ShardResult:
    """A data file with nothing but the rows' identities, and what a replica would tell of it."""
    identity = {"row_file": shard.name, "sample_index": 0, "error_type": None}
    rows = range(shard.start, shard.stop)
    data = "".join(json.dumps(identity | {"row_index": row}) + "\n" for row in rows).encode()
    path = f"data/shard-{shard.index:05d}-{shard.index:032x}.jsonl"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_bytes(data)
    stats = Stats(rows=shard.rows, completion_tokens=shard.rows * TOKENS_PER_ROW)
    return ShardResult(shard.index, path, hashlib.sha256(data).hexdigest(), len(data), shard.rows, 0, stats)


def peak_mb() -> float:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def simulate_apart(size: Size, folder: Path) -> Measured:
    """`simulate` in a process of its own, so that one job's memory and core are not the next one's."""
    folder.mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(simulate, size, folder).result()


def format_row(cells: list[str]) -> str:
    return "  ".join(f"{cell:>12}" for cell in cells)


HEADER = [
    "replicas",
    "shards",
    "generate s",
    "busy",
    "dispatch/s",
    "CPU s/1k sh",
    "CPU s/1k row",
    "RSS +MB",
    "finish s",
]


def cells(measured: Measured) -> list[str]:
    return [
        f"{measured.replicas:,}",
        f"{measured.shards:,}",
        f"{measured.generate_s:.2f}",
        f"{measured.busy:.1%}",
        f"{measured.dispatches_s:.0f}",
        f"{measured.cpu_s_per_1000_shards:.2f}",
        f"{measured.cpu_s_per_1000_rows:.4f}",
        f"{measured.rss_mb:.1f}",
        f"{measured.finish_s:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="How many replicas one driver keeps busy, on one core.")
    parser.add_argument("--replicas", type=int, nargs="+", default=[64, 512], help="one job for each number")
    parser.add_argument("--shards-per-replica", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="a replica's time per shard; 0: the driver's pace"
    )
    parser.add_argument("--shard-rows", type=int, default=256)
    parser.add_argument(
        "--folder", help="where the jobs' folders are made and removed; default: the system's"
    )
    options = parser.parse_args()
    measured = []
    print(format_row(HEADER))
    # Removed only at the end: ext4 creates files slowly for minutes after thousands were deleted beside them.
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for replicas in options.replicas:
            size = Size(replicas, options.shards_per_replica, options.shard_rows, options.seconds)
            measured.append(simulate_apart(size, Path(folder, str(replicas))))
            print(format_row(cells(measured[-1])), flush=True)
        print(
            json.dumps({"seconds": options.seconds, "jobs": [asdict(each) for each in measured]}), flush=True
        )


if __name__ == "__main__":
    main()
