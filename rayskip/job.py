"""A job from config to report on Ray: where driver and cluster meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayskip.config import JobConfig
    from rayskip.config.file import Overrides
    from rayskip.data.sources import Source
    from rayskip.driver.progress import Progress
    from rayskip.driver.report import Report
    from rayskip.pool import Pool


def run(
    job: JobConfig | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Overrides = (),
    fresh: bool = False,
    progress: bool | Callable[[Progress], None] = False,
) -> Report:
    """Run a job, or go on where it stopped, as `rayskip run` does, and return its report.

    job: a config, as the path of a YAML file, as a nested dict or as JobConfig. Relative paths in it start at the
    current directory. overrides: {"sampling.max_tokens": 64}, or as after --set, ["sampling.max_tokens=64"].
    fresh: delete the job that the output folder holds and start over.
    progress: True shows a bar, in a notebook too; a function is called with each snapshot.

    A job that is finished already is not run again: its report is returned. Works in a notebook and in any thread;
    in the main thread Ctrl-C, SIGTERM or SIGHUP has what finishes within seconds committed, then raises. (In others
    Python hears no signals.)
    Raises what `rayskip.errors` has: UserError before anything runs, for what must be given otherwise; JobFailed;
    Interrupted; TakenOver by another run; StorageBusy where a store does not answer. What was committed stays in
    each case, and the same call goes on. A job of which no row succeeded ends, and `failure` of its report says so.
    """
    from rayskip.cluster.paths import check_output
    from rayskip.cluster.ray_pool import RayPool
    from rayskip.config.file import load_config
    from rayskip.driver.look import check_rows
    from rayskip.driver.loop import run_job

    job = load_config(job, overrides)
    check_output(job.output.path)

    def ray_pool(job: JobConfig, source: Source) -> Pool:
        check_rows(job, source)
        return RayPool(job, source)

    if callable(progress):
        return run_job(job, ray_pool, fresh, progress)
    with _bar(job.name, progress) as on_progress:
        return run_job(job, ray_pool, fresh, on_progress)


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Callable[[Progress], None]]:
    """What to call with each snapshot of a job; shown as a bar of input rows."""
    if not shown:
        yield lambda progress: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=name, unit="row") as bar:

        def show(progress: Progress) -> None:
            bar.total, bar.n = progress.rows_total, progress.rows
            bar.set_postfix_str(f"{progress.phase}, {progress.tok_s:,.0f} tok/s, {progress.failed:,} failed")

        yield show
