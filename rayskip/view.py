"""What people see of a run: a live view on a terminal, plain lines elsewhere; a job's state.

Does not know where the numbers come from, and decides nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayskip.data.output import OutputRow
from rayskip.driver.progress import Progress
from rayskip.driver.report import aligned, error_lines, told_generations
from rayskip.driver.status import JobStatus
from rayskip.errors import counted, plain

if TYPE_CHECKING:
    from rayskip.train.loop import Point

LINE_EVERY_S = 5.0
MOST_SHOWN = 10
MOST_CHARACTERS = 1000


@contextmanager
def live_view(name: str, console: Console | None = None) -> Iterator[Callable[[Progress], None]]:
    """What to call with each snapshot of job `name`; shown on stderr, or on `console`."""
    console = console or Console(file=cast(IO[str], _Lasting(sys.stderr)))
    if not console.is_terminal:
        yield PlainLines(name, console)
        return
    clock = _PhaseClock()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield lambda progress: live.update(progress_table(name, progress, clock.seconds(progress)))


class _PhaseClock:
    """How long a run has been in its phase."""

    def __init__(self) -> None:
        self._phase, self._began = "", 0.0

    def seconds(self, progress: Progress) -> float:
        """Since the first snapshot of the phase that this one is in."""
        if progress.phase != self._phase:
            self._phase, self._began = progress.phase, progress.elapsed_s
        return progress.elapsed_s - self._began


class _Lasting:
    """A stream that may close before the job ends, as terminals and pipes do: what it does not take is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PlainLines:
    """One line per snapshot: when the phase changes, and at most every LINE_EVERY_S else."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._phase = ""
        self._clock = _PhaseClock()
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        now, seconds = time.monotonic(), self._clock.seconds(progress)
        if progress.phase == self._phase and now < self._next:
            return
        self._phase, self._next = progress.phase, now + LINE_EVERY_S
        facts = ", ".join(f"{key} {value}" for key, value in _facts(progress).items())
        self._console.print(
            f"{self._name}: {_phase(progress, seconds)}: {facts}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def progress_table(name: str, progress: Progress, phase_s: float = 0.0) -> Table:
    """The live view of one snapshot. phase_s: since its phase began."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(name, style="bold"), _phase(progress, phase_s))  # no markup: a name may hold brackets
    table.add_row("", ProgressBar(total=max(1, progress.rows_total), completed=progress.rows, width=50))
    for key, value in _facts(progress).items():
        table.add_row(key, value)
    return table


def format_status(status: JobStatus) -> str:
    """A job's state, one aligned line per fact."""
    facts = {
        "job": status.name,
        "state": _state(status),
        "shards": f"{status.shards:,} of {status.shards_total:,} committed",
        "rows": f"{status.rows:,} of {status.rows_total:,} committed"
        + (f", {status.rows_done:,} done" if status.rows_done > status.rows else ""),
        "generations": told_generations(
            status.generations, status.generations_failed, status.generations_cut
        ),
        "completion tokens": f"{status.completion_tokens:,}",
    }
    if status.errors:
        facts["errors"] = "\n".join(error_lines(status.errors))
    if status.lost:
        facts["missing or changed"] = _some(status.lost)
    if status.strays:
        facts["of no record"] = f"{_some(status.strays)}; the same run command deletes them"
    if driver := status.driver:
        facts["last driver"] = f"process {driver.pid} on {driver.host}, since {driver.since}"
    return aligned(facts)


def _state(status: JobStatus) -> str:
    match status.state:
        case "running":
            phase = status.driver.phase if status.driver else ""
            return f"running ({phase}), {status.tok_s or 0:,.0f} tokens/s, ETA {_clock(status.eta_s)}"
        case "stale":
            silent = status.driver.silent_s if status.driver else None
            return f"stale: its driver has said nothing for {_clock(silent)}; the same run command resumes"
        case "unfinished":
            return "not finished; the same run command resumes"
    return f"{status.state}: {status.reason}" if status.reason else status.state


def format_rows(rows: Iterable[OutputRow], prompts: Collection[str]) -> str:
    """Output rows below each other: where each is from, its input columns `prompts`, and what came of it."""
    return "\n\n".join(_row(row, prompts) for row in rows)


def _row(row: OutputRow, prompts: Collection[str]) -> str:
    sample = f", sample {row.sample_index}" if row.sample_index else ""
    columns = {name: value for name, value in row.columns.items() if name in prompts} or row.columns
    lines = [plain(f"{row.row_file} row {row.row_index}{sample}: {row.finish_reason}")]
    lines += [_indented(name, _readable(value)) for name, value in columns.items() if value is not None]
    if row.error_type is not None:
        lines.append(_indented(row.error_type, row.error_message or ""))
    else:
        sure = "" if row.probability is None else f" (probability {row.probability:.2f})"
        lines.append(_indented("=>", f"{row.text or ''}{sure}"))
    return "\n".join(lines)


def _readable(value: Any) -> str:
    """Messages as a line each, other values as they are."""
    if isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
        return "\n".join(f"{message['role']}: {message.get('content')}" for message in value)
    return str(value)


def _indented(name: str, text: str) -> str:
    """Cut where it is long; what a terminal would obey is written out."""
    more = len(text) - MOST_CHARACTERS
    text = text[:MOST_CHARACTERS] + (f" ... and {counted(more, 'character')} more" if more > 0 else "")
    lines = plain(f"{name} {text}", keep="\n\t").split("\n")
    return "\n".join([f"  {lines[0]}", *(f"    {line}" for line in lines[1:])])


def as_json(result: object) -> str:
    """A command's result, a dataclass or plain values, as a JSON document."""
    return TypeAdapter(type(result)).dump_json(result, indent=2).decode()


def _some(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _facts(progress: Progress) -> dict[str, str]:
    rows = {"rows": f"{progress.rows:,}/{progress.rows_total:,}"}
    elapsed = {"elapsed": _clock(progress.elapsed_s)}
    replicas = {"replicas": f"{progress.replicas}/{progress.replicas_total}"}
    troubles = {"retries": progress.retries, "failed": progress.failed}
    if not progress.replicas and not progress.tokens:  # nothing has loaded yet, or the last replica is gone
        return rows | elapsed | replicas | {key: f"{count:,}" for key, count in troubles.items() if count}
    speed = {
        "tokens": f"{progress.tokens:,}",
        "tok/s": f"{progress.tok_s_now:,.0f} now {progress.tok_s:,.0f} overall",
    }
    counts = {key: f"{count:,}" for key, count in troubles.items()}
    return rows | speed | elapsed | {"ETA": _clock(progress.eta_s)} | replicas | counts


def _phase(progress: Progress, seconds: float) -> str:
    """What goes on, and for how long where that is told nowhere else."""
    return f"{progress.phase} for {seconds:.0f} s" if seconds >= 1 and not progress.tokens else progress.phase


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; "-" for what is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def show_point(point: Point) -> None:
    """A line per tenth training step and per evaluation."""
    if point.held_out is not None or point.step % 10 == 0:
        held_out = "" if point.held_out is None else f"  held out {point.held_out:.4f}"
        print(f"step {point.step}  {point.seconds:.0f} s  loss {point.loss:.4f}{held_out}", flush=True)
