"""report.json: what a run did and how fast. Knows counters, not how they came about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rayskip.driver.records import CommitRecord, Document
from rayskip.stats import Stats


class Report(Document):
    """Throughput of the run that finished a job.

    Rows and tokens are the whole job's (output rows: input rows x n), seconds and speeds are this run's:
    shards_resumed says how many shards earlier runs had committed.
    load_s: seconds a replica took to load (the slowest). generate_s: from the first replica ready to the
    last shard committed. wall_s: the whole run. seconds: per phase, summed over this run's replicas.
    completion_tok_s: completion tokens of this run / generate_s.
    """

    name: str
    fingerprint: str
    model: str
    hardware: dict[str, Any]
    engine: dict[str, Any]
    replicas: int
    shards: int
    shards_resumed: int
    retries: int
    rows: int
    rows_failed: int
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    completion_tok_s: float
    completion_tok_s_per_replica: float
    batch_fill: float
    seconds: dict[str, float]


def total(commits: Iterable[CommitRecord]) -> Stats:
    """The sum of the records' counters."""
    stats = Stats()
    for commit in commits:
        stats += Stats(**commit.stats)
    return stats


def format_report(report: Report) -> str:
    """The report on one screen, one aligned line per fact."""
    facts = {
        "job": f"{report.name}  ({report.fingerprint[:12]})",
        "model": report.model,
        "hardware": ", ".join(f"{key} {value}" for key, value in report.hardware.items()),
        "replicas": f"{report.replicas}, {report.retries} shard retries",
        "shards": f"{report.shards:,}, {report.shards_resumed:,} from earlier runs",
        "rows": f"{report.rows:,}, {report.rows_failed:,} failed",
        "prompt tokens": f"{report.prompt_tokens:,}, {report.prefix_tokens:,} from a shared prefix",
        "completion tokens": f"{report.completion_tokens:,}",
        "tokens/s": f"{report.completion_tok_s:,.1f}, {report.completion_tok_s_per_replica:,.1f} a replica",
        "batch fill": f"{report.batch_fill:.0%}",
        "time": f"load {report.load_s:.1f} s, generate {report.generate_s:.1f} s, wall {report.wall_s:.1f} s",
        "phases": ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.seconds.items()),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
