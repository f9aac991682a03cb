"""What a driver says of itself while it runs, in a file beside its epoch, and how that is read.

For people: nothing decides by when it was written, so that clocks which disagree cost at most a wrong word.
Does not know what runs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Literal

import psutil

from rayskip.data.folder import EPOCHS
from rayskip.data.storage import Storage
from rayskip.driver.progress import Progress
from rayskip.driver.record_store import Damaged, epoch_keys, read
from rayskip.driver.records import Document, EpochRecord, Moment
from rayskip.errors import Interrupted, RayskipError, TakenOver

BEAT_S = 10.0
STALE_S = 120.0
"""A driver silent for so long is taken for gone. Starting Ray takes up to a minute, without a word."""

Ending = Literal["finished", "interrupted", "failed"]


class Heartbeat(Document):
    """A driver's last word. seen: when (UTC, ISO 8601). phase: what goes on, or how it ended, with the reason then.

    rows: of the input, done, the uncommitted ones too. tok_s: completion tokens per second over the last seconds.
    eta_s: seconds to go.
    """

    seen: Moment
    phase: str
    ended: Ending | None = None
    reason: str | None = None
    rows: int = 0
    tok_s: float = 0.0
    eta_s: float | None = None


@contextmanager
def beating(
    storage: Storage, epoch: int, on_progress: Callable[[Progress], None]
) -> Iterator[Callable[[Progress], None]]:
    """What to call with each snapshot of a run, in place of `on_progress`: it writes the driver's heartbeats too,
    at most every BEAT_S, and the last when the block ends."""
    last = Heartbeat(seen=_now(), phase="starting")
    due = time.monotonic() + BEAT_S

    def write() -> None:
        with suppress(RayskipError):  # people can wait for the next; the job need not fail
            storage.put(_key(epoch), last.to_bytes())

    def show(progress: Progress) -> None:
        nonlocal last, due
        last = Heartbeat(
            seen=_now(),
            phase=progress.phase,
            rows=progress.rows,
            tok_s=progress.tok_s_now,
            eta_s=progress.eta_s,
        )
        if time.monotonic() >= due:
            due = time.monotonic() + BEAT_S
            write()
        on_progress(progress)

    def end(how: Ending, reason: str | None) -> None:
        nonlocal last
        last = last.model_copy(update={"seen": _now(), "ended": how, "reason": reason})
        write()

    write()
    try:
        yield show
    except TakenOver:
        raise  # the folder is another's
    except RayskipError as error:
        end("interrupted" if isinstance(error, Interrupted) else "failed", str(error))
        raise
    end("finished", None)


def last_driver(storage: Storage) -> tuple[EpochRecord | None, Heartbeat | None]:
    """The last driver to claim the folder, and its last word; None of a folder of before drivers said any, and of
    what is damaged."""
    driver = heartbeat = None
    with suppress(Damaged):
        last = max(epoch_keys(storage), default=None)
        driver = read(storage, last, EpochRecord) if last else None
        heartbeat = read(storage, _key(driver.epoch), Heartbeat) if driver else None
    return driver, heartbeat


def silent_s(heartbeat: Heartbeat) -> float:
    """Seconds since, by this machine's clock."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(heartbeat.seen)).total_seconds())


def is_alive(driver: EpochRecord, heartbeat: Heartbeat) -> bool:
    """Whether the driver may be taken to run: it spoke lately, and if on this machine its process is there."""
    here = driver.host == socket.gethostname()
    return silent_s(heartbeat) < STALE_S and not (here and not psutil.pid_exists(driver.pid))


def _key(epoch: int) -> str:
    return f"{EPOCHS}/{epoch:06d}-heartbeat.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
