"""report.json: what a run did and how fast. Knows counters, not how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, model_validator

from rayskip.config.label import LabelTask
from rayskip.data.labels import accuracy, by_label, expected_error, label_pairs
from rayskip.data.records import RowErrors
from rayskip.driver.records import CommitRecord, Signed
from rayskip.errors import counted, plain
from rayskip.stats import Stats


class LabelReport(BaseModel):
    """How labels compare with the right ones.

    rows: that have both. unknown: rows besides whose right label is none of the task's. accuracy: share of rows
    with the right one; one without a label counts as wrong. calibration_error: expected calibration error of the
    probabilities (arXiv 1706.04599, section 2), calibrated_error of the calibrated ones; None where there are none.
    by_label: rows, precision and recall of each. pairs: rows by right label and label found, "" where there is
    none.
    """

    rows: int
    unknown: int
    accuracy: float
    calibration_error: float | None
    calibrated_error: float | None
    by_label: dict[str, dict[str, int | float | None]]
    pairs: dict[str, dict[str, int]]

    @classmethod
    def of(cls, stats: Stats, task: LabelTask | None) -> LabelReport | None:
        """None where no row has a right label."""
        every = label_pairs(stats.labels)
        if task is None or not (pairs := {gold: own for gold, own in every.items() if gold in task.labels}):
            return None
        rows = sum(sum(own.values()) for own in pairs.values())
        return cls(
            rows=rows,
            unknown=sum(stats.labels.values()) - rows,
            accuracy=accuracy(pairs),
            calibration_error=expected_error(stats.label_bins, "probability"),
            calibrated_error=expected_error(stats.label_bins, "calibrated"),
            by_label=by_label(pairs),
            pairs=pairs,
        )


class Report(Signed):
    """Throughput of the run that finished a job.

    Rows, generations and tokens are the whole job's, seconds and speeds are this run's: shards_resumed says how
    many shards earlier runs had committed.
    rows: of the input; None in reports of before these were told from generations, of which each row has `n`.
    generations_failed, generations_cut: of all generations, those without an answer and those cut off at max_tokens
    or the context's end. errors: those that failed, by error_type, the commonest first. Of shards committed before
    they were counted, the last two have none. prefix: of the output columns' names.
    load_s: seconds a replica took to load (the slowest). generate_s: from the first replica ready to the
    last shard committed. wall_s: the whole run. seconds: per phase, summed over this run's replicas.
    completion_tok_s: completion tokens of this run / generate_s.
    first_token_s: from the start of the run until a replica said that it had generated (they say so once a second).
    idle_share: of the replicas' time within generate_s, what they waited for a shard. driver_cpu_s_per_1000_rows:
    CPU seconds of the driver's process, Ray's client in it included, for each 1,000 input rows of this run; with
    replicas in the same process, theirs too.
    mean_layers: layers run per generated token. layer_tokens, layer_tokens_ideal: layer executions that took place
    and that the skip policy asks for; prompt_layer_tokens of them for prompts. cohort_fill: share of generated
    tokens that ran in their step's largest group of one layer set. kv_bytes_saved: of pages of the KV
    cache that rows did without; kv_fill: share of those in use that tokens filled, over all steps.
    drafted, accepted: tokens that drafters proposed, and of them those that held; drafted_by, accepted_by: the same
    by kind of drafter. mean_accepted: tokens gained per row and verification, 1 without a drafter.
    audits: generations also decoded at full depth; agreement: what both have in common, on average.
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
    rows: int | None
    generations: int
    generations_failed: int
    generations_cut: int
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    first_token_s: float | None
    idle_share: float
    driver_cpu_s_per_1000_rows: float
    completion_tok_s: float
    completion_tok_s_per_replica: float
    batch_fill: float
    skip: str
    mean_layers: float | None
    layer_tokens: int
    layer_tokens_ideal: int
    prompt_layer_tokens: int
    cohort_fill: float | None
    kv_bytes_saved: int
    drafted: int
    accepted: int
    mean_accepted: float | None
    drafted_by: dict[str, int]
    accepted_by: dict[str, int]
    audits: int = Field(validation_alias=AliasChoices("audits", "receipts"))  # the latter in older folders
    agreement: dict[str, float]
    fell_back_to_full_depth: bool
    seconds: dict[str, float]
    prefix: str = ""
    errors: dict[str, RowErrors] = Field(default_factory=dict)
    kv_fill: float | None = None
    labels: LabelReport | None = None

    @property
    def rows_s(self) -> float:
        """Input rows a second of this run, as far as its shards are as large as earlier runs'."""
        ours = (self.rows or 0) * (1 - self.shards_resumed / self.shards if self.shards else 1)
        return ours / self.generate_s if self.generate_s else 0.0

    @property
    def failure(self) -> str | None:
        """Why the finished job is a failure, None for one that is not."""
        return failure(self.generations, self.generations_failed, self.errors)

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Earlier reports called generations rows."""
        if "generations" in values:
            return values
        names = {"rows": "generations", "rows_failed": "generations_failed", "rows_cut": "generations_cut"}
        return values | {"rows": None} | {new: values.get(old, 0) for old, new in names.items()}


def total(commits: Iterable[CommitRecord]) -> Stats:
    """The sum of the records' counters."""
    stats = Stats()
    for commit in commits:
        stats += commit.counters
    return stats


def total_errors(commits: Iterable[CommitRecord]) -> dict[str, RowErrors]:
    """The failed rows of all records by error_type, the commonest first, each with the first record's example."""
    found: dict[str, RowErrors] = {}
    for commit in commits:
        for kind, errors in commit.errors.items():
            first = found.get(kind)
            found[kind] = replace(first, count=first.count + errors.count) if first else errors
    return commonest_first(found)


def commonest_first(errors: dict[str, RowErrors]) -> dict[str, RowErrors]:
    return dict(sorted(errors.items(), key=lambda item: -item[1].count))


def error_lines(errors: dict[str, RowErrors]) -> list[str]:
    """A line for each error_type: how often, and one of them."""
    return [
        plain(f"{kind}: {found.count:,}, such as {found.row_file} row {found.row_index}: {found.message}")
        for kind, found in errors.items()
    ]


def failure(generations: int, failed: int, errors: dict[str, RowErrors]) -> str | None:
    """Why so many generations, with so many failed, are no success: not one has an answer. None if one has."""
    if not generations or failed < generations:
        return None
    return "; the commonest error is ".join(["no row succeeded", *error_lines(errors)[:1]])


def told_generations(generations: int, failed: int, cut: int) -> str:
    """How many there are, and what became of them."""
    return f"{generations:,}, {failed:,} failed, {cut:,} cut off at max_tokens or the context's end"


def _label_lines(labels: LabelReport) -> Iterator[str]:
    errors = {"calibration error": labels.calibration_error, "calibrated": labels.calibrated_error}
    told = "".join(f", {name} {error:.3f}" for name, error in errors.items() if error is not None)
    yield f"{labels.accuracy:.1%} of {counted(labels.rows, 'row')} with a known label right{told}"
    if labels.unknown:
        yield f"{counted(labels.unknown, 'row')} besides have a right label that is none of task.labels"
    for name, own in labels.by_label.items():
        shares = (f"{kind} {_share(own[kind])}" for kind in ("precision", "recall"))
        yield f"{name}: {own['rows']:,} rows, {', '.join(shares)}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _layers(report: Report) -> str:
    mean = "no token" if report.mean_layers is None else f"{report.mean_layers:.1f} a token"
    agreed = ", ".join(f"{name} {value:.2f}" for name, value in report.agreement.items())
    return f"{mean}, skip {report.skip}; {report.audits:,} audits{': ' if agreed else ''}{agreed}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def merged(engines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all replicas' engines say of themselves: the first's facts; where others differ, a list of all.
    Each warning is there once.

    Tokens are batch-invariant over the job only if they are on every replica, by the same kernels.
    """
    if not engines:
        return {}
    facts = {}
    for key, value in engines[0].items():
        every = [engine.get(key) for engine in engines]
        facts[key] = value if all(other == value for other in every) or key == "pages" else every
    if isinstance(facts.get("ops"), list) or isinstance(facts.get("row_rule"), list):
        facts["batch_invariant"] = False
    if "warnings" in facts:
        facts["warnings"] = list(dict.fromkeys(text for own in engines for text in own.get("warnings", [])))
    if isinstance(facts.get("batch_invariant"), list):
        facts["batch_invariant"] = all(facts["batch_invariant"])
    return facts


def format_report(report: Report) -> str:
    """The report on one screen, one aligned line per fact."""
    facts = {
        "job": f"{report.name}  ({report.fingerprint[:12]})",
        "model": report.model + (f" ({report.engine['model']})" if "model" in report.engine else ""),
        "hardware": ", ".join(f"{key} {value}" for key, value in report.hardware.items()),
        "replicas": f"{report.replicas}, {counted(report.retries, 'retry')} of shards",
        "shards": f"{report.shards:,}, {report.shards_resumed:,} from earlier runs",
        "rows": "-" if report.rows is None else f"{report.rows:,}",
        "generations": told_generations(
            report.generations, report.generations_failed, report.generations_cut
        ),
        "prompt tokens": f"{report.prompt_tokens:,}, {report.prefix_tokens:,} from a shared prefix",
        "completion tokens": f"{report.completion_tokens:,}",
        "tokens/s": f"{report.completion_tok_s:,.1f}, {report.completion_tok_s_per_replica:,.1f} a replica",
        "rows/s": f"{report.rows_s:,.1f}",
        "batch fill": f"{report.batch_fill:.0%}",
        "time": f"load {report.load_s:.1f} s, generate {report.generate_s:.1f} s, wall {report.wall_s:.1f} s",
        "waiting": f"first token after {_seconds(report.first_token_s)}, replicas idle {report.idle_share:.1%}, "
        f"driver {report.driver_cpu_s_per_1000_rows:.2f} CPU s per 1,000 rows",
        "phases": ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.seconds.items()),
    }
    if report.errors:
        facts["errors"] = "\n".join(error_lines(report.errors))
    if report.prefix:
        facts["columns"] = f"added ones begin with {report.prefix}, as {report.prefix}text"
    if report.skip != "none":
        facts["layers"] = _layers(report)
    if (labels := report.labels) is not None:
        facts["labels"] = "\n".join(_label_lines(labels))
    if report.drafted:
        kinds = ", ".join(
            f"{kind} {report.accepted_by.get(kind, 0):,} of {n:,}" for kind, n in report.drafted_by.items()
        )
        facts["drafts"] = f"{report.mean_accepted:.2f} tokens a verification; held: {kinds}"
    return aligned(facts)


def aligned(facts: dict[str, str]) -> str:
    """A line for each fact, its values below each other."""
    width = max(map(len, facts)) + 2
    return "\n".join(
        name.ljust(width) + value.replace("\n", "\n" + " " * width) for name, value in facts.items()
    )
