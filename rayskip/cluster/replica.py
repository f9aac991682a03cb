"""A replica: a Shard goes in, a ShardResult comes out. A plain class; Ray makes an actor of it elsewhere.

Does not know how shards were planned, committed or retried, nor that other replicas exist.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rayskip.cluster.engine_thread import EngineThread
from rayskip.config import JobConfig
from rayskip.config.label import LabelTask
from rayskip.data.agreement import agreement
from rayskip.data.attempt import write_attempt
from rayskip.data.folder import JOB, open_folder
from rayskip.data.labels import Labeller, rightness
from rayskip.data.locate import stamp
from rayskip.data.output import count_rows, encode, errors_by_type, output_table
from rayskip.data.records import Generation, Prompt, Shard, ShardResult, failed_row
from rayskip.data.sources import Source, read_shard
from rayskip.data.storage import Storage
from rayskip.data.token_bytes import token_bytes
from rayskip.data.values import python_rows
from rayskip.errors import ConfigError, InputError, OutputError, RowError, first_line
from rayskip.failpoints import failpoint
from rayskip.pool import ReplicaInfo, ReplicaProgress
from rayskip.stats import Stats

if TYPE_CHECKING:
    import pyarrow as pa


class Replica:
    """One engine. Several threads call `run` at once: while one shard is read, tokenized or written,
    another generates."""

    def __init__(self, job: JobConfig, source: Source) -> None:
        """Costs nothing; `ready` loads."""
        self._job = job
        self._source = source
        self._loading = "starting"

    @cached_property
    def _storage(self) -> Storage:
        return open_folder(self._job.output.path)

    def ready(self) -> ReplicaInfo:
        """`load`, if this node sees the folders that the driver sees. Raises InputError or OutputError if not."""
        self._check_paths()
        return self.load()

    def load(self) -> ReplicaInfo:
        """Load the engine and start its thread. Raises ModelError, and ConfigError where the GPU that the job asks
        for does not work."""
        began = time.monotonic()
        job = self._job
        from rayskip.data.prompts import PromptBuilder, prepare_templates, prompt_columns

        templates = prepare_templates(job.input)  # while torch is imported and the engine loads
        self._loading = "torch"
        use_threads(job.cluster.cpus_per_replica or 1)
        from rayskip.engine import Engine

        device = device_for(job.cluster.gpus_per_replica)
        self._loading = "model"
        engine = Engine.load(job.model, job.engine, job.decode, device)
        self._prompts = PromptBuilder(
            job.input, job.sampling, engine.tokenizer, engine.max_model_len, templates, job.task
        )
        self._token_bytes = token_bytes(engine.tokenizer) if engine.tokenizer is not None else None
        self._columns = prompt_columns(job.input, templates)
        self._loading = "batch invariance"  # which info tries out, a part of loading
        facts = hardware(device), engine.info
        self._engine = EngineThread(engine)
        self._loading = "labels"
        self._labeller = self._fitted_labeller(job.task) if job.task is not None else None
        self._loading = ""
        return ReplicaInfo(
            time.monotonic() - began, *facts, batch_rows=engine.sizes.workers * engine.sizes.batch_rows
        )

    def _fitted_labeller(self, task: LabelTask) -> Labeller:
        """What reads the task's scores. Every replica fits it anew: to the same rows, so all have the same."""
        labeller = Labeller(task, [len(tokens) for tokens in self._prompts.candidates])
        if task.calibrate is None:
            return labeller
        from rayskip.data.labelled_file import labelled_rows, open_labelled

        source = open_labelled(self._job, task.calibrate)
        prompts, right = [], {}
        for index, row, label in labelled_rows(self._job, task, task.calibrate, source):
            with suppress(RowError):  # of a row that cannot run nothing is learnt
                prompts.append(self._prompts.build(row, index, ""))
                right[index] = label
        rows = [row for row in self._engine.generate(prompts, [], False).rows if row.scores is not None]
        self._engine.rows = 0  # these are none of the job's
        if not rows:
            raise InputError(f"task.calibrate.path: {task.calibrate.path} has no row that can run")
        return labeller.fit([row.scores or [] for row in rows], [right[row.row_index] for row in rows])

    def _check_paths(self) -> None:
        """Look, before anything loads, whether this node sees the folders that the driver saw."""
        if self._storage.get(JOB) is None:
            raise OutputError(
                f"output.path: {self._storage.url} is not the folder that the driver sees, with its {JOB}; "
                f"name one that all nodes share, or s3:// or gs://"
            )
        if stamp(file := self._source.files[0].url) is None:
            raise InputError(
                f"input.path: {file} is not here; name a folder that all nodes share, or s3:// or gs://"
            )

    def progress(self) -> ReplicaProgress:
        """Rows finished and tokens generated since the start; or what it is at, while it loads."""
        if self._loading:
            return ReplicaProgress(0, 0, self._loading)
        return ReplicaProgress(self._engine.rows, self._engine.tokens)

    def run(self, shard: Shard) -> ShardResult:
        """Generate a shard and write its output file, or find it written by an attempt before. A probe is generated
        and not written.

        Raises InputError for a file that can no longer be read, StorageBusy or OutputError from the write,
        ReplicaLost when the engine is dead.
        """
        own = Stats()
        with own.timed("tokenize"):
            table = read_shard(shard, self._source)
            prompts, rows = self._prompts_of(table, shard)
        again = [] if shard.full_depth else self._to_decode_again(prompts)
        generated = self._engine.generate(prompts, again, shard.full_depth)
        if shard.probe:
            return _result(shard, b"", rows + generated.rows, generated.stats + own)
        with own.timed("write"):
            rows = self._finished(rows + generated.rows)
            data = encode(
                self._job.output.format, output_table(table, rows, shard, self._job), self._token_bytes
            )
            there = write_attempt(self._storage, shard.output, data)
        own += agreement(rows, generated.again) + self._rightness(table, rows, shard)
        result = _result(shard, data, rows, generated.stats + own)
        return result if there == data else self._other(result, shard, there)

    def generate(self, shard: Shard) -> list[Generation]:
        """The output rows of a shard, which is neither written nor audited. Raises as `run` does."""
        prompts, rows = self._prompts_of(read_shard(shard, self._source), shard)
        return self._finished(rows + self._engine.generate(prompts, [], shard.full_depth).rows)

    def _finished(self, rows: list[Generation]) -> list[Generation]:
        """Output rows in their order, with their labels."""
        rows = sorted(rows, key=lambda row: (row.row_index, row.sample_index))
        return rows if self._labeller is None else [self._labeller.label(row) for row in rows]

    def _rightness(self, table: pa.Table, rows: list[Generation], shard: Shard) -> Stats:
        """How a shard's labels compare with the right ones, where the input has those."""
        stats, task = Stats(), self._job.task
        if task is None or task.gold is None:
            return stats
        right = table[task.gold].to_pylist()
        for row in rows:
            if row.labelled is not None and (gold := right[row.row_index - shard.start]) is not None:
                stats += rightness(str(gold), row.labelled)
        return stats

    def _prompts_of(self, table: pa.Table, shard: Shard) -> tuple[list[Prompt], list[Generation]]:
        """The rows that can run, and the output rows of those that cannot."""
        prompts: list[Prompt] = []
        failed: list[Generation] = []
        lost = dict(shard.lost)
        for index, row in enumerate(python_rows(table, self._columns), shard.start):
            try:
                if index in lost:
                    raise RowError("replica_lost", f"a replica ends whenever it runs this row: {lost[index]}")
                failpoint("replica.row", index)
                prompts.append(self._prompts.build(row, index, shard.name))
            except RowError as error:
                failed += failed_row(index, self._prompts.samples(row), error)
        return prompts, failed

    def _to_decode_again(self, prompts: list[Prompt]) -> list[Prompt]:
        """The rows for a quality audit: a share, chosen by their random keys."""
        if self._job.decode.skip.kind == "none":
            return []
        return [prompt for prompt in prompts if prompt.key < self._job.quality.sample * 2**64]

    def _other(self, result: ShardResult, shard: Shard, there: bytes) -> ShardResult:
        """The result of an attempt that was first and differs, as engines do that are not batch-invariant."""
        try:
            output = self._job.output
            rows, failed, inputs_failed = count_rows(there, output.format, output.prefix or "", shard)
        except ValueError as error:
            raise OutputError(
                f"{self._storage.place(shard.output)}: {error}; delete it and run again"
            ) from error
        return replace(
            result,
            sha256=hashlib.sha256(there).hexdigest(),
            bytes=len(there),
            rows=rows,
            rows_failed=failed,
            input_rows_failed=inputs_failed,
        )


def _result(shard: Shard, data: bytes, rows: list[Generation], stats: Stats) -> ShardResult:
    """Counters of rows and tokens are the shard's own; steps and seconds are the engine's since the last
    shard ended, since shards share steps."""
    stats.rows = len(rows)
    stats.rows_failed = sum(row.finish_reason == "error" for row in rows)
    stats.rows_cut = sum(row.finish_reason == "length" for row in rows)
    stats.prompt_tokens = sum(row.prompt_tokens for row in rows)
    stats.completion_tokens = sum(row.completion_tokens for row in rows)
    return ShardResult(
        shard=shard.index,
        path=shard.output,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        rows=stats.rows,
        rows_failed=stats.rows_failed,
        input_rows_failed=len({row.row_index for row in rows if row.finish_reason == "error"}),
        stats=stats,
        errors=errors_by_type(rows, shard),
    )


def use_threads(cpus: float) -> None:
    """Have torch compute on as many threads as the replica has CPUs (Ray would leave it at one).

    Before torch is imported: its OpenMP reads the variable once.
    """
    threads = max(1, math.floor(cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def device_for(gpus: float) -> str:
    """What a replica with so many GPUs runs on: the job chooses, not what happens to be there.

    Raises ConfigError where there is to be a GPU, and torch cannot compute on one.
    """
    if not gpus:
        return "cpu"
    from rayskip.model.backends.choose import check_device

    try:
        check_device("cuda")
    except (RuntimeError, AssertionError) as error:
        import torch

        raise ConfigError(
            f"cluster.gpus_per_replica: {gpus:g}, but torch {torch.__version__} on {platform.node()} cannot use a "
            f"GPU: {first_line(error)}; 0 runs on CPU"
        ) from error
    return "cuda"


def hardware(device: str) -> dict[str, Any]:
    """What this process runs on, for the report. Plain values: torch's own kind of version would have the driver
    import torch to read it, for seconds."""
    import torch

    from rayskip.model.backends.choose import gpu_facts
    from rayskip.model.backends.machine import cpu_name

    facts: dict[str, Any] = {"host": platform.node(), "cpu": cpu_name(), "cpus": os.cpu_count()}
    return facts | gpu_facts(device) | {"torch": str(torch.__version__), "python": platform.python_version()}
