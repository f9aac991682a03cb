"""Real answers to a job's first rows, in this process: what a replica would generate, and nothing is written.

Does not know Ray. A job that the output folder holds is answered as it goes on there; one that is changed may be
tried beside what an earlier one left.
"""

from __future__ import annotations

from rayskip.cluster.ray_cluster import usable_cores
from rayskip.cluster.replica import Replica
from rayskip.config import JobConfig
from rayskip.data.output import OutputRow
from rayskip.data.records import BROKEN_ROW
from rayskip.data.sources import plan_shards, read_shard
from rayskip.data.values import whole_rows
from rayskip.driver.plan import plan_in_folder


def preview(job: JobConfig, rows: int) -> list[OutputRow]:
    """The output rows of the job's first `rows` input rows. Raises UserError as a run would."""
    plan, job, _ = plan_in_folder(job)
    engine = job.engine.model_copy(
        update={"max_batch_rows": job.engine.max_batch_rows or rows * job.sampling.n}  # nothing to try out
    )
    cluster = job.cluster.model_copy(
        update={"cpus_per_replica": job.cluster.cpus_per_replica or usable_cores()}
    )
    replica = Replica(job.model_copy(update={"engine": engine, "cluster": cluster}), plan.source)
    replica.load()
    most = min(rows, job.input.max_rows or rows)
    found = []
    for shard in plan_shards(plan.source, most, most):
        table = whole_rows(read_shard(shard, plan.source).drop_columns([BROKEN_ROW]))
        found += [
            OutputRow(
                row_file=shard.name,
                row_index=row.row_index,
                sample_index=row.sample_index,
                finish_reason=row.finish_reason,
                text=row.text,
                error_type=row.error_type,
                error_message=row.error_message,
                columns=table[row.row_index - shard.start],
                probability=None if row.labelled is None else row.labelled.surest,
            )
            for row in replica.generate(shard)
        ]
    return found
