"""The run: plan, claim the folder, keep replicas fed, commit, finish. The shell around pure decisions.

Does not know Ray, torch or files: it runs on any pool and any storage.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from rayskip.config import JobConfig
from rayskip.data.attempt import data_key
from rayskip.data.folder import JOB, MANIFEST, REPORT, open_folder
from rayskip.data.output import SUFFIXES
from rayskip.data.sources import Source
from rayskip.data.storage import Storage
from rayskip.driver.commit import commit_all, finish, load_commits, sweep, take_back
from rayskip.driver.heartbeat import beating, is_alive, last_driver, silent_s
from rayskip.driver.identity import as_begun
from rayskip.driver.lease import Lease, adopt, open_job
from rayskip.driver.plan import Plan, adopted, make_plan, settled
from rayskip.driver.progress import Meter, Progress
from rayskip.driver.record_store import lost_files, read, sizes
from rayskip.driver.records import CommitRecord, JobRecord, Manifest, commit_key, fold, signature
from rayskip.driver.report import LabelReport, Report, error_lines, merged, total, total_errors
from rayskip.driver.retry import Assign, Dispatch, Instruction, Kill
from rayskip.driver.signals import StopSignal
from rayskip.errors import Interrupted, JobFailed, RayskipError, Retryable, counted
from rayskip.pool import LOOK_AHEAD, MOST_AHEAD, Alive, Done, Event, Failed, Lost, Pool, Ready, ReplicaInfo

PoolFactory = Callable[[JobConfig, Source], Pool]
OnProgress = Callable[[Progress], None]

_log = logging.getLogger(__name__)

TICK_S = 0.5
FENCE_CHECK_S = 5.0
GRACE_S = 12.0
"""Seconds that work in flight gets after a signal: with the pool's end, less than 20 in all."""


def _ignore(progress: Progress) -> None:
    """The default of `on_progress`."""


def run_job(
    job: JobConfig, pool_factory: PoolFactory, fresh: bool = False, on_progress: OnProgress = _ignore
) -> Report:
    """Run a job to its end, or go on with what an earlier run left, and return its report.

    A finished job is not run again: its report is returned. fresh: delete what is there and start over.
    Raises UserError before any replica starts when the job cannot run as given, JobFailed when it gave up,
    Interrupted after SIGTERM or Ctrl-C; what was committed stays in each case.
    """
    if not fresh:
        job = as_begun(job, read(open_folder(job.output.path), JOB, JobRecord))
    return run_plan(job, make_plan(job), pool_factory, fresh, on_progress)


def run_plan(
    job: JobConfig,
    plan: Plan,
    pool_factory: PoolFactory,
    fresh: bool = False,
    on_progress: OnProgress = _ignore,
) -> Report:
    """`run_job` for a plan that is made already."""
    for warning in plan.warnings:
        _log.warning("%s", warning)
    storage = open_folder(job.output.path)
    if not fresh and (report := finished_report(storage, plan)):
        _log.warning("%s is finished already, nothing was done; --fresh starts over", job.output.path)
        return report
    with suppress(RayskipError):  # opening the folder says it
        _warn_of_living(storage)
    with StopSignal() as stop:
        lease = open_job(storage, plan.record, fresh)
        plan = adopted(job, plan, storage)
        with beating(storage, lease.epoch, on_progress) as show:
            run = JobRun(settled(job, plan.record), plan, storage, lease, stop, show)
            run.check_limits()  # what an earlier run committed may be past them already
            if not run.dispatch.finished:
                run.generate(pool_factory)
            return run.finish()


def _warn_of_living(storage: Storage) -> None:
    """Of a driver that this one is about to stop."""
    driver, said = last_driver(storage)
    if driver is not None and said is not None and said.ended is None and is_alive(driver, said):
        _log.warning(
            "%s: taking the job over from process %d on %s, which was %s %.0f s ago; what it has not committed is "
            "done again",
            *(storage.url, driver.pid, driver.host, said.phase, silent_s(said)),
        )


def finished_report(storage: Storage, plan: Plan) -> Report | None:
    """The report of a job that is finished already and has all its files, else None; strays are swept.

    Raises OutputError for another job, and for a data file that has changed its size.
    """
    record = adopt(storage, plan.record)
    manifest = read(storage, MANIFEST, Manifest)
    if manifest is None or lost_files(storage, sizes(manifest)):
        return None
    sweep(storage, manifest)
    storage.create(JOB, record.to_bytes())  # a person may have deleted it
    return read(storage, REPORT, Report)


def still_there(storage: Storage, commits: dict[int, CommitRecord]) -> dict[int, CommitRecord]:
    """The commits whose files are there; the others are taken back, so that their shards run again."""
    lost = lost_files(storage, sizes(commits.values()))
    if not lost:
        return commits
    gone = [shard for shard, record in commits.items() if record.file in lost]
    _log.warning("%s: %s gone, run again", storage.url, ", ".join(sorted(lost)))
    take_back(storage, [], map(commit_key, gone))
    return {shard: record for shard, record in commits.items() if shard not in gone}


class JobRun:
    """One driver's run of a job: what is committed, who works on what."""

    def __init__(
        self,
        job: JobConfig,
        plan: Plan,
        storage: Storage,
        lease: Lease,
        stop: StopSignal,
        on_progress: OnProgress,
    ) -> None:
        self.job = job
        self.plan = plan
        self.storage = storage
        self.lease = lease
        self.stop = stop
        self.on_progress = on_progress
        self.began = time.monotonic() - plan.seconds
        self.cpu_began = time.process_time()
        self.first_token: float | None = None
        self.loading = ""
        self.commits = still_there(
            storage, load_commits(storage, plan.record.fingerprint, plan.shards, lease.since)
        )
        self.whole = total(self.commits.values())
        self.resumed = frozenset(self.commits)
        self.failed = sum(record.rows_failed for record in self.commits.values())
        self.input_rows_failed = sum(record.failed_input_rows for record in self.commits.values())
        self.dispatch = Dispatch(
            [shard for shard in plan.shards if shard.index not in self.commits],
            job.cluster.replica_range,
            job.retry.max_shard_attempts,
            job.retry.shard_timeout_s,
        )
        self.meter = Meter(
            sum(shard.rows for shard in plan.shards if shard.index in self.resumed),
            job.sampling.max_tokens * job.sampling.n,
        )
        self.replicas: list[ReplicaInfo] = []
        self.warned: set[str] = set()
        self.most_replicas = 0
        self.first_ready = self.last_commit = 0.0
        self.next_fence_check = 0.0

    def generate(self, pool_factory: PoolFactory) -> None:
        """Run every shard that is not committed."""
        self._show("starting")
        pool = pool_factory(self.job, self.plan.source)
        try:
            while not self.dispatch.finished:
                if self.stop.asked:
                    self._drain(pool)
                self._check_fence()
                self._turn(pool)
        finally:
            pool.close()

    def finish(self) -> Report:
        """Write the report and the manifest of a job whose shards are all committed."""
        record = self.plan.record
        report = self._report()
        self.lease.check()
        self.storage.put(REPORT, report.to_bytes())
        finish(
            self.storage,
            self.lease,
            fold(
                record.name,
                record.fingerprint,
                self.job.output.format,
                self.job.decode.skip.model_dump(mode="json", exclude_none=True),
                self.commits.values(),
            ),
        )
        self._show("finished")
        return report

    def _turn(self, pool: Pool) -> None:
        """Decide, obey, listen."""
        for instruction in self.dispatch.decide(time.monotonic()):
            self._obey(pool, instruction)
        events = pool.wait(TICK_S)
        if finished := [event for event in events if isinstance(event, Done)]:
            self._commit(finished)
        for event in events:
            self._hear(event)
        if self.first_token is None and self.meter.tokens:
            self.first_token = time.monotonic()
        loading = f"loading: {self.loading}" if self.loading else "loading"
        self._show("generating" if self.dispatch.ready else loading)

    def _drain(self, pool: Pool) -> None:
        """After a signal: commit what finishes within the grace, then raise Interrupted."""
        _log.warning(
            "stopping: shards that end within %.0f s are still committed; a second signal stops at once",
            GRACE_S,
        )
        self.dispatch.stop()
        deadline = time.monotonic() + GRACE_S
        while self.dispatch.in_flight and time.monotonic() < deadline:
            self._turn(pool)
        raise Interrupted(
            f"stopped by a signal; {len(self.commits):,} of {counted(len(self.plan.shards), 'shard')} committed, "
            f"the same command resumes"
        )

    def _obey(self, pool: Pool, instruction: Instruction) -> None:
        match instruction:
            case Assign(replica, shard):
                output = data_key(shard.index, self.lease.nonce, SUFFIXES[self.job.output.format])
                begun = self.plan.record.begun
                pool.submit(replica, replace(shard, full_depth=self.below_floor, output=output, begun=begun))
            case Kill(replica):
                pool.kill(replica)
                self.meter.lost(replica)
            case _:
                self.dispatch.started(pool.start(), time.monotonic())

    def _hear(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Ready(replica, info):
                self._ready(replica, info, now)
            case Alive(replica, progress):
                self.loading = progress.loading
                if self.meter.said(replica, progress):
                    self.dispatch.progressed(replica, now)
            case Done():
                pass  # committed before the others, any of which may end the job
            case Failed(replica, shard, Retryable() as error):
                self.dispatch.failed(replica, shard, str(error), now)
            case Failed(_, _, error):
                raise error
            case Lost(replica, reason):
                self._lost(replica, reason)

    def _ready(self, replica: int, info: ReplicaInfo, now: float) -> None:
        self.dispatch.became_ready(replica, now, self._places(info))
        self.meter.start(now)
        self.first_ready = self.first_ready or now
        for warning in info.engine.get("warnings", []):
            if warning not in self.warned:  # hundreds of replicas have one model and like machines
                self.warned.add(warning)
                _log.warning("replica on %s: %s", info.hardware.get("host", "this machine"), warning)
        self.replicas.append(info)
        self.most_replicas = max(self.most_replicas, self.dispatch.ready)

    def _places(self, info: ReplicaInfo) -> int:
        """Shards for a replica to hold: as many as fill its batch, and one that is read or written meanwhile."""
        shard = self.plan.record.shard_rows * self.job.sampling.n
        return min(max(LOOK_AHEAD, 1 + math.ceil(info.batch_rows / shard)), MOST_AHEAD)

    def _commit(self, finished: list[Done]) -> None:
        """Commit together what came in together: with hundreds of replicas, shards finish faster than a store
        answers one commit after the other."""
        now = time.monotonic()
        attempts = []
        for done in finished:
            shard = self.dispatch.done(done.replica, done.result.shard, now)
            if shard.probe:
                self.meter.dropped(done.replica, shard.rows, done.result.stats.completion_tokens)
            else:
                attempts.append((done, shard))
        records = commit_all(
            self.storage,
            self.lease,
            [(shard, done.result) for done, shard in attempts],
        )
        for (done, _), record in zip(attempts, records, strict=True):
            self._committed(done, record)
        self.check_limits()

    def _committed(self, done: Done, record: CommitRecord) -> None:
        self.commits[record.shard] = record
        self.last_commit = time.monotonic()
        self.failed += record.rows_failed
        self.input_rows_failed += record.failed_input_rows
        self.whole += record.counters
        self.meter.committed(done.replica, record.stop - record.start, done.result.stats.completion_tokens)

    def _lost(self, replica: int, reason: str) -> None:
        self.meter.lost(replica)
        self.dispatch.lost(replica, reason)

    def check_limits(self) -> None:
        """Raises JobFailed when what is committed says that the job goes wrong."""
        self._check_failed_rows()
        self._check_quality()

    def _check_failed_rows(self) -> None:
        limit = self.job.retry.max_failed_rows
        if limit is None:
            return
        most = limit * self.plan.rows if isinstance(limit, float) else limit
        if self.input_rows_failed > most:
            errors = error_lines(total_errors(self.commits.values()))
            raise JobFailed(
                f"{counted(self.input_rows_failed, 'row')} failed, "
                f"more than retry.max_failed_rows = {limit} allows: " + "; ".join(errors)
            )

    @property
    def below_floor(self) -> bool:
        """Whether the audits of what is committed say that skipping layers costs too much."""
        quality, stats = self.job.quality, self.whole
        return stats.audits >= quality.min_audits and stats.agreement["edit_similarity"] < quality.floor

    def _check_quality(self) -> None:
        if self.job.quality.below_floor == "stop" and self.below_floor:
            stats = self.whole
            raise JobFailed(
                f"decode.skip changes the output too much: over {stats.audits} rows decoded both ways the "
                f"edit similarity is {stats.agreement['edit_similarity']:.2f}, "
                f"quality.floor is {self.job.quality.floor:g}"
            )

    def _check_fence(self) -> None:
        """Stop a replaced driver soon, not only at its next commit."""
        now = time.monotonic()
        if now >= self.next_fence_check:
            self.next_fence_check = now + FENCE_CHECK_S
            self.lease.check()

    def _show(self, phase: str) -> None:
        now = time.monotonic()
        tok_s_now, tok_s = self.meter.speeds(now)
        self.on_progress(
            Progress(
                phase=phase,
                elapsed_s=now - self.began,
                rows=self.meter.rows,
                rows_total=self.plan.rows,
                tokens=self.meter.tokens,
                tok_s_now=tok_s_now,
                tok_s=tok_s,
                eta_s=self.meter.eta_s(tok_s, self.plan.rows),
                replicas=self.dispatch.ready,
                replicas_total=self.job.cluster.replica_range[1],
                retries=self.dispatch.retries,
                failed=self.failed,
            )
        )

    def _report(self) -> Report:
        job, whole = self.job, self.whole
        ours = total(self._ours())
        generate_s = self.last_commit - self.first_ready
        tok_s = ours.completion_tokens / generate_s if generate_s > 0 else 0.0
        replica_s = generate_s * self.most_replicas
        cpu_s = time.process_time() - self.cpu_began
        rows = sum(record.stop - record.start for record in self._ours())
        return Report(
            name=job.name,
            fingerprint=self.plan.record.fingerprint,
            model=job.model.path,
            hardware=self.replicas[0].hardware if self.replicas else {},
            engine=merged([info.engine for info in self.replicas]),
            replicas=self.most_replicas,
            shards=len(self.plan.shards),
            shards_resumed=len(self.resumed),
            retries=self.dispatch.retries,
            rows=self.plan.rows,
            generations=sum(record.rows for record in self.commits.values()),
            generations_failed=self.failed,
            generations_cut=whole.rows_cut,
            prefix=self.plan.record.prefix,
            errors=total_errors(record for _, record in sorted(self.commits.items())),
            prompt_tokens=whole.prompt_tokens,
            prefix_tokens=whole.prefix_tokens,
            completion_tokens=whole.completion_tokens,
            load_s=max((info.load_s for info in self.replicas), default=0.0),
            generate_s=generate_s,
            wall_s=time.monotonic() - self.began,
            first_token_s=None if self.first_token is None else self.first_token - self.began,
            # a replica waits from before the driver hears that it is ready
            idle_share=min(1.0, ours.seconds["idle"] / replica_s) if replica_s > 0 else 0.0,
            driver_cpu_s_per_1000_rows=1000 * cpu_s / rows if rows else 0.0,
            completion_tok_s=tok_s,
            completion_tok_s_per_replica=tok_s / max(1, self.most_replicas),
            batch_fill=ours.batch_fill,
            skip=self.job.decode.skip.kind,
            mean_layers=whole.mean_layers,
            layer_tokens=whole.layer_tokens,
            layer_tokens_ideal=whole.layer_tokens_ideal,
            prompt_layer_tokens=whole.prompt_layer_tokens,
            cohort_fill=whole.cohort_fill,
            kv_bytes_saved=whole.kv_bytes_saved,
            kv_fill=ours.kv_fill,
            drafted=whole.drafted,
            accepted=whole.accepted,
            mean_accepted=whole.mean_accepted,
            drafted_by=whole.drafted_by,
            accepted_by=whole.accepted_by,
            audits=whole.audits,
            agreement=whole.agreement,
            fell_back_to_full_depth=self.below_floor,
            labels=LabelReport.of(whole, self.job.task),
            seconds=ours.seconds,
            **signature(),
        )

    def _ours(self) -> list[CommitRecord]:
        return [record for index, record in self.commits.items() if index not in self.resumed]
