"""Systems that generate the same rows, in turns: a machine that is slow for a while is so for all of them.

Does not know what is made of their times.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from rayskip.data.records import Prompt
from rayskip.engine import Completion, Engine
from rayskip.evaluate.peer_process import PeerProcess


class Run(Protocol):
    """seconds: that it has run."""

    seconds: float

    def go_on(self, seconds: float) -> bool:
        """Run for so long, or to the end; whether that was the end."""


class EngineRun:
    """completions: in request order, once it is over."""

    def __init__(self, engine: Engine, prompts: Iterable[Prompt]) -> None:
        """The engine must have nothing else to do."""
        self.seconds = 0.0
        self.completions: list[Completion] = []
        self.engine = engine
        for prompt in prompts:
            engine.add(prompt)
        engine.take_stats()

    def go_on(self, seconds: float) -> bool:
        began = time.perf_counter()
        while self.engine.has_work and time.perf_counter() - began < seconds:
            self.completions += self.engine.step()
        self.completions += self.engine.drain()
        self.seconds += time.perf_counter() - began
        if self.engine.has_work:
            return False
        self.completions.sort(key=lambda completion: completion.request_id)
        return True


class PeerRun:
    """token_ids: of each prompt's completion, once it is over."""

    def __init__(self, peer: PeerProcess, prompts: Sequence[Prompt]) -> None:
        self.seconds = 0.0
        self.token_ids: list[list[int]] = []
        self._peer = peer
        self._prompts: list[list[int]] | None = [prompt.token_ids for prompt in prompts]

    def go_on(self, seconds: float) -> bool:
        began = time.perf_counter()
        if self._prompts is not None:
            self._peer.begin(self._prompts)
            self._prompts = None
        over = self._peer.go_on(max(0.0, seconds - (time.perf_counter() - began)))
        self.seconds += time.perf_counter() - began
        if over:
            self.token_ids = self._peer.token_ids()
        return over


def run_in_turns(runs: Iterable[Run], seconds: float) -> None:
    """Run all to their ends, each for so many seconds at a time."""
    left = list(runs)
    while left:
        left = [run for run in left if not run.go_on(seconds)]
