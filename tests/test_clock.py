"""What is kept of measured forwards: the least of each, measured again now and then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayskip.model import clock
from rayskip.model.clock import Timings
from rayskip.model.spec import Spec

SPEC = Spec("llama", 64, 4, 4, 16, 100, 128, 0.25)


def timings(machine: str = "one", threads: int = 2) -> Timings:
    backend, weights = SimpleNamespace(machine=machine), SimpleNamespace(size=1, total=1)
    decoder: Any = SimpleNamespace(spec=SPEC, depth=2, backend=backend, held=weights)
    return Timings(decoder, threads, "steps")


def test_the_least_of_a_forward_counts_whenever_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(clock._chance, "random", lambda: 0.0)  # each is measured again
    for measured, least in ((0.5, 0.5), (0.2, 0.2), (0.9, 0.21), (0.9, 0.2205), (0.1, 0.1), (0.2, 0.105)):
        kept = timings()
        assert kept.seconds(32, lambda measured=measured: measured) == pytest.approx(least)
        kept.keep()
    assert timings("another").seconds(32, lambda: 0.7) == 0.7
    assert timings(threads=1).seconds(32, lambda: 0.6) == 0.6

    for _ in range(20):
        kept = timings()
        kept.seconds(32, lambda: 0.2)
        kept.keep()
    monkeypatch.setattr(clock._chance, "random", lambda: 0.07)
    known = timings()
    assert known.seconds(32, lambda: 0.1) == pytest.approx(0.2)  # not measured: 0.01 / 0.2 < 0.07
    assert known.seconds(64, lambda: 0.1) == 0.1
    assert known.seconds(64, lambda: 0.05) == 0.05  # a short one is
