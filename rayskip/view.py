"""What people see of a run: a live view on a terminal, plain lines elsewhere; a job's state.

Does not know where the numbers come from, and decides nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayskip.driver.progress import Progress
from rayskip.driver.status import JobStatus

if TYPE_CHECKING:
    from rayskip.train.loop import Point

LINE_EVERY_S = 5.0
MOST_SHOWN = 10


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
        "state": "finished" if status.finished else "not finished; the same run command resumes",
        "shards": f"{status.shards:,} of {status.shards_total:,} committed",
        "rows": f"{status.rows:,} of {status.rows_total:,}, {status.rows_failed:,} failed",
        "completion tokens": f"{status.completion_tokens:,}",
    }
    if status.lost:
        facts["missing or changed"] = _some(status.lost)
    if status.strays:
        facts["of no record"] = f"{_some(status.strays)}; the same run command deletes them"
    if status.driver:
        facts["last driver"] = (
            f"process {status.driver.pid} on {status.driver.host}, since {status.driver.started}"
        )
    return "\n".join(f"{key:<18} {value}" for key, value in facts.items())


def _some(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _facts(progress: Progress) -> dict[str, str]:
    rows = {"rows": f"{progress.rows:,}/{progress.rows_total:,}"}
    elapsed = {"elapsed": _clock(progress.elapsed_s)}
    replicas = {"replicas": f"{progress.replicas}/{progress.replicas_total}"}
    troubles = {"retries": progress.retries, "errors": progress.rows_failed}
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
