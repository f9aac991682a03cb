"""What `rayskip bench` found of a mode or peer, as a table and a plot. Does not know how it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rayskip.evaluate.figure import figure
from rayskip.evaluate.table import or_dash


@dataclass(frozen=True)
class Timing:
    """One mode or peer at one batch size; medians over rounds, [least, most] in the ranges.

    tok_s: completion tokens per second, prompts included. speedup, decode_speedup: over the first mode in the same
    round. identical: share of the rows whose tokens are those of the first run of the same model and skip policy,
    at whatever batch size; of a peer's rows, those of the first mode's.

    None for peers, which do not tell: skip; kv_mb_per_row and kv_fill; decode_tok_s: generated tokens per second of
    the steps without prompt tokens (None too when no step was). allowed_speedup: what the layers skipped leave of
    the products' work, over full depth (see `allowed_speedup` in bench.py). mean_accepted: tokens per row and
    verification, 1 without a drafter. layer_tokens_ratio: layer executions over those the skip policy asks for.
    limit_tok_s: what the machine allows full steps of batch_rows rows (see `Roofline`) at the mean length that a
    generated token finds before it; limit_share: decode_tok_s over it in the same round, so empty places count
    against it. Both None with a drafter: a verification gives several tokens.
    kv_mb_per_row: KV cache, in 10^6 bytes, that a row in flight needs on average, what rows share counted once;
    kv_fill: share of that with a token's keys and values.
    seconds: [seconds, share of all phases' seconds] by phase, mean of the rounds, summed over the engine's workers.
    load_s: of a peer, until it was ready; None for modes.
    """

    mode: str
    batch_rows: int
    rows: int
    completion_tokens: int
    tok_s: float
    tok_s_range: tuple[float, float]
    speedup: float
    identical: float
    skip: str | None = None
    decode_tok_s: float | None = None
    decode_speedup: float | None = None
    limit_tok_s: float | None = None
    limit_share: float | None = None
    allowed_speedup: float | None = None
    mean_layers: float | None = None
    mean_accepted: float | None = None
    layer_tokens_ratio: float | None = None
    cohort_fill: float | None = None
    batch_fill: float | None = None
    kv_mb_per_row: float | None = None
    kv_fill: float | None = None
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    load_s: float | None = None


def format_timings(timings: Sequence[Timing]) -> str:
    """A table for a terminal."""
    head = (
        f"{'mode':<24}{'batch':>6}{'rows':>6}{'tok/s':>8}{'range':>12}{'speed-up':>10}{'decode tok/s':>14}"
        f"{'speed-up':>10}{'limit':>7}{'allowed':>9}{'layers':>8}{'accepted':>10}{'same':>6}{'fill':>6}{'KV MB':>7}"
    )
    lines = [
        f"{t.mode:<24}{t.batch_rows:>6}{t.rows:>6}{t.tok_s:>8.0f}"
        f"{f'{t.tok_s_range[0]:.0f}-{t.tok_s_range[1]:.0f}':>12}{t.speedup:>10.2f}"
        f"{or_dash(t.decode_tok_s, '.0f'):>14}{or_dash(t.decode_speedup, '.2f'):>10}"
        f"{or_dash(t.limit_share, '.0%'):>7}{or_dash(t.allowed_speedup, '.2f'):>9}"
        f"{or_dash(t.mean_layers, '.1f'):>8}{or_dash(t.mean_accepted, '.2f'):>10}{t.identical:>6.0%}"
        f"{or_dash(t.batch_fill, '.2f'):>6}{or_dash(t.kv_mb_per_row, '.2f'):>7}"
        for t in timings
    ]
    return "\n".join([head, *lines])


def plot(timings: Sequence[Timing], path: Path) -> None:
    """Tokens per second against batch size, one line a mode or peer; dashed, what the machine allows a mode's
    decode steps."""
    with figure(path, (6, 4)) as axis:
        for mode in dict.fromkeys(timing.mode for timing in timings):
            own = sorted((t for t in timings if t.mode == mode), key=lambda timing: timing.batch_rows)
            (line,) = axis.plot([t.batch_rows for t in own], [t.tok_s for t in own], "o-", label=mode)
            if limits := [(t.batch_rows, t.limit_tok_s) for t in own if t.limit_tok_s is not None]:
                color = line.get_color()
                axis.plot(
                    *zip(*limits, strict=True), "x--", color=color, label=f"{mode}: limit of decode steps"
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("rows in flight")
        axis.set_ylabel("completion tokens per second")
        axis.legend()
