"""The one thread that steps an engine, and the door through which other threads hand it rows.

Does not know shards or files.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayskip.data.records import Generation, Prompt
from rayskip.errors import ReplicaLost, RowError
from rayskip.stats import Stats

if TYPE_CHECKING:
    from rayskip.engine import Completion, Engine


@dataclass
class _Batch:
    """The prompts of one call. left: how many the engine still holds."""

    prompts: list[Prompt]
    left: int = 0
    generations: list[Generation] = field(default_factory=list)
    result: Future[tuple[list[Generation], Stats]] = field(default_factory=Future)


class EngineThread:
    """Generates for several callers at once: while one caller's rows run out, the next one's fill the batch.

    rows, tokens: requests finished and tokens generated so far; read them from any thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.rows = 0
        self.tokens = 0
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._requests: dict[int, _Batch] = {}
        self._stats = Stats()
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def generate(self, prompts: list[Prompt]) -> tuple[list[Generation], Stats]:
        """Every sample of every prompt, in no order, and what the engine did since the call before ended.

        Rows that cannot run come back with finish_reason "error". Raises ReplicaLost once the engine is dead.
        """
        batch = _Batch(prompts)
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

    def _add(self, batch: _Batch) -> None:
        """Queue a batch's rows, the longest first, so that like lengths meet."""
        for prompt in sorted(batch.prompts, key=lambda prompt: -len(prompt.token_ids)):
            try:
                request = self._engine.add(prompt)
            except RowError as error:
                self.rows += 1
                batch.generations += failed_row(prompt.row_index, prompt.params.n, error)
            else:
                self._requests[request] = batch
                batch.left += 1
        self._finish_if_done(batch)

    def _complete(self, completion: Completion) -> None:
        batch = self._requests.pop(completion.request_id)
        batch.generations += completion.generations
        batch.left -= 1
        self.rows += 1
        self._finish_if_done(batch)

    def _finish_if_done(self, batch: _Batch) -> None:
        if batch.left == 0:
            stats, self._stats = self._stats, Stats()
            batch.result.set_result((batch.generations, stats))

    def _count(self, stats: Stats) -> None:
        self._stats += stats
        self.tokens += stats.completion_tokens

    def _refuse(self, error: Exception) -> None:
        """Fail every caller, those who come later too."""
        lost = ReplicaLost(f"the engine failed: {type(error).__name__}: {error}")
        lost.__cause__ = error
        for batch in {id(batch): batch for batch in self._requests.values()}.values():
            batch.result.set_exception(lost)
        while True:
            self._inbox.get().result.set_exception(lost)


def failed_row(row_index: int, samples: int, error: RowError) -> list[Generation]:
    """The output rows of an input row that cannot run: one per sample, so that rows out = rows in x n."""
    return [
        Generation(row_index, sample, "error", error_type=error.kind, error_message=str(error))
        for sample in range(samples)
    ]
