"""The one thread that steps an engine, and the door through which other threads hand it rows.

Does not know shards or files.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayskip.data.records import Generation, Prompt, failed_row
from rayskip.errors import ReplicaLost, RowError
from rayskip.stats import Stats

if TYPE_CHECKING:
    from rayskip.engine import Completion, Engine


@dataclass
class Generated:
    """rows: every sample of every prompt. again: those decoded again at full depth. stats: what the engine did
    since the call before ended."""

    rows: list[Generation]
    again: list[Generation]
    stats: Stats


@dataclass
class _Call:
    """One call's prompts, and those to decode again at full depth. left: how many the engine still holds."""

    prompts: list[Prompt]
    again: list[Prompt]
    full_depth: bool
    left: int = 0
    generated: Generated = field(default_factory=lambda: Generated([], [], Stats()))
    result: Future[Generated] = field(default_factory=Future)


class EngineThread:
    """Generates for several callers at once: while one caller's rows run out, the next one's fill the batch.

    rows, tokens: requests finished and tokens generated so far; read them from any thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.rows = 0
        self.tokens = 0
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._requests: dict[int, tuple[_Call, list[Generation]]] = {}  # and where its rows go
        self._stats = Stats()
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def generate(self, prompts: list[Prompt], again: list[Prompt], full_depth: bool) -> Generated:
        """Generate every sample of every prompt, and those of `again` a second time at full depth; in no order.

        full_depth: skip no layer in the first place. Rows that cannot run come back with finish_reason "error".
        Raises ReplicaLost once the engine is dead.
        """
        batch = _Call(prompts, again, full_depth)
        self._inbox.put(batch)
        return batch.result.result()

    def _serve(self) -> None:
        try:
            while True:
                self._take_new()
                completions = self._engine.step()
                self._count(self._engine.take_stats())
                for completion in completions:
                    self._complete(completion)
        except Exception as error:  # whatever broke it, no caller may wait for ever
            self._refuse(error)

    def _take_new(self) -> None:
        """Add the rows that have arrived; when the engine has nothing to do, wait for some."""
        while not self._engine.has_work:
            with self._stats.timed("idle"):
                batch = self._inbox.get()
            self._add(batch)
        while not self._inbox.empty():
            self._add(self._inbox.get())

    def _add(self, batch: _Call) -> None:
        """Queue a batch's rows, the longest first, so that like lengths meet."""
        for prompt in _longest_first(batch.prompts):
            try:
                self._request(prompt, batch, batch.full_depth, batch.generated.rows)
            except RowError as error:
                self.rows += 1
                batch.generated.rows += failed_row(prompt.row_index, prompt.samples, error)
        for prompt in _longest_first(batch.again):
            with suppress(RowError):  # it failed the first time too
                self._request(prompt, batch, True, batch.generated.again)
        self._finish_if_done(batch)

    def _request(self, prompt: Prompt, batch: _Call, full_depth: bool, rows: list[Generation]) -> None:
        self._requests[self._engine.add(prompt, full_depth=full_depth)] = batch, rows
        batch.left += 1

    def _complete(self, completion: Completion) -> None:
        batch, rows = self._requests.pop(completion.request_id)
        rows += completion.generations
        batch.left -= 1
        self.rows += rows is batch.generated.rows
        self._finish_if_done(batch)

    def _finish_if_done(self, batch: _Call) -> None:
        if batch.left == 0:
            batch.generated.stats, self._stats = self._stats, Stats()
            batch.result.set_result(batch.generated)

    def _count(self, stats: Stats) -> None:
        self._stats += stats
        self.tokens += stats.completion_tokens

    def _refuse(self, error: Exception) -> None:
        """Fail every caller, those who come later too."""
        lost = ReplicaLost(f"the engine failed: {type(error).__name__}: {error}")
        lost.__cause__ = error
        for batch in {id(batch): batch for batch, _ in self._requests.values()}.values():
            batch.result.set_exception(lost)
        while True:
            self._inbox.get().result.set_exception(lost)


def _longest_first(prompts: list[Prompt]) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
