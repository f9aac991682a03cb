"""A job from config to report on Ray: where driver and cluster meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayskip.config import JobConfig
    from rayskip.data.sources import Source
    from rayskip.driver.progress import Progress
    from rayskip.driver.report import Report
    from rayskip.pool import Pool


def run(
    job: JobConfig, fresh: bool = False, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Report:
    """Run or resume a job; see `rayskip.driver.loop.run_job` for what it raises."""
    from rayskip.cluster.paths import check_output
    from rayskip.cluster.ray_pool import RayPool
    from rayskip.driver.loop import run_job

    check_output(job.output.path)

    def ray_pool(job: JobConfig, source: Source) -> Pool:
        return RayPool(job, source)

    return run_job(job, ray_pool, fresh, on_progress)
