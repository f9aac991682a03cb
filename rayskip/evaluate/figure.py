"""Plots as files: the one place that knows how matplotlib is used without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """The axes of a figure, which is saved as PNG at the end of the block.

    size: inches. options: of matplotlib's subplots.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=size, **options)
    yield axes
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)
