"""`rayskip bench`: modes of generating timed over the same rows, in interleaved rounds.

Timings on one machine drift by more than what is to be measured, so every mode runs once a round and ratios are
taken inside a round; the table has their medians. Does not know files' commits or Ray: the engine alone is timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from rayskip.config import ModelConfig
from rayskip.data.prompts import PromptBuilder
from rayskip.data.records import Prompt
from rayskip.data.sources import discover, every_row
from rayskip.engine import Engine
from rayskip.engine.sizes import Sizes
from rayskip.evaluate.figure import figure
from rayskip.evaluate.table import or_dash
from rayskip.stats import Stats
from rayskip.tool_config import BenchConfig, BenchMode


@dataclass(frozen=True)
class Timing:
    """One mode at one batch size; medians over rounds, [least, most] in the ranges.

    tok_s: completion tokens per second, prompts included. decode_tok_s: generated tokens per second of the steps
    without prompt tokens; None when no step was. speedup, decode_speedup: over the first mode in the same round.
    allowed_speedup: what the layers skipped leave of the products' work, over full depth (see `allowed_speedup`).
    mean_accepted: tokens per row and verification, 1 without a drafter. identical: share of the rows whose tokens
    are those of the first run of the same model and skip policy, at whatever batch size. layer_tokens_ratio: layer
    executions over those the skip policy asks for.
    """

    mode: str
    skip: str
    batch_rows: int
    rows: int
    completion_tokens: int
    tok_s: float
    tok_s_range: tuple[float, float]
    speedup: float
    decode_tok_s: float | None
    decode_speedup: float | None
    allowed_speedup: float
    mean_layers: float
    mean_accepted: float
    identical: float
    layer_tokens_ratio: float
    cohort_fill: float
    batch_fill: float


@dataclass(frozen=True)
class _Run:
    """A run's figures; its engine, with its cache, is gone."""

    seconds: float
    stats: Stats
    sizes: Sizes
    skip: str
    mean_layers: float
    allowed_speedup: float
    tokens: list[list[int]]

    @property
    def tok_s(self) -> float:
        return self.stats.completion_tokens / self.seconds

    @property
    def decode_tok_s(self) -> float | None:
        """A lane's rate times the lanes: what they would make while all are busy."""
        seconds = self.stats.steady_seconds
        return self.stats.steady_tokens * self.sizes.lanes / seconds if self.stats.steady_tokens else None


def run_bench(
    config: BenchConfig, on_run: Callable[[str, float], None] = lambda run, tok_s: None
) -> list[Timing]:
    """Time every mode at every batch size; writes bench.json and bench.png. `on_run` is given each run's tok/s."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    loaded: dict[ModelConfig, Engine] = {}
    timings: list[Timing] = []
    expected: dict[tuple[ModelConfig, str], list[list[int]]] = {}
    for batch_rows in config.batch_rows:
        first = _engine(config, config.modes[0], batch_rows, loaded)
        places = first.sizes.batch_rows * first.sizes.lanes
        prompts = _prompts(config, first, places)
        runs: dict[str, list[_Run]] = {mode.name: [] for mode in config.modes}
        for round_index in range(config.rounds):
            for mode in config.modes:  # a new engine each time: drafters learn from what they have seen
                run = _time(_engine(config, mode, places, loaded), prompts)
                runs[mode.name].append(run)
                on_run(f"{mode.name}, {places} rows, round {round_index + 1}", run.tok_s)
        for mode, own in zip(config.modes, runs.values(), strict=True):
            wanted = expected.setdefault((mode.model or config.model, own[0].skip), own[0].tokens)
            timings.append(_timing(mode.name, len(prompts), own, runs[config.modes[0].name], wanted))
        (output / "bench.json").write_text(
            json.dumps([asdict(timing) for timing in timings], indent=2) + "\n"
        )
    plot(timings, output / "bench.png")
    return timings


def allowed_speedup(engine: Engine, mean_layers: float) -> float:
    """How much faster a generated token's products are when `mean_layers` of the layers run and the head always
    does: their work is proportional to their parameters."""
    layers = sum(
        linear.in_features * linear.out_features
        for layer in engine.decoder.layers
        for linear in layer.linears
    )
    head = engine.decoder.head.in_features * engine.decoder.head.out_features
    return (layers + head) / (layers * mean_layers / len(engine.decoder.layers) + head)


def format_timings(timings: Sequence[Timing]) -> str:
    """A table for a terminal."""
    head = (
        f"{'mode':<24}{'batch':>6}{'rows':>6}{'tok/s':>8}{'speed-up':>10}{'decode tok/s':>14}"
        f"{'speed-up':>10}{'allowed':>9}{'layers':>8}{'accepted':>10}{'same':>6}{'fill':>6}"
    )
    lines = [
        f"{t.mode:<24}{t.batch_rows:>6}{t.rows:>6}{t.tok_s:>8.0f}{t.speedup:>10.2f}"
        f"{or_dash(t.decode_tok_s, '.0f'):>14}{or_dash(t.decode_speedup, '.2f'):>10}"
        f"{t.allowed_speedup:>9.2f}{t.mean_layers:>8.1f}{t.mean_accepted:>10.2f}{t.identical:>6.0%}{t.batch_fill:>6.2f}"
        for t in timings
    ]
    return "\n".join([head, *lines])


def plot(timings: Sequence[Timing], path: Path) -> None:
    """Tokens per second against batch size, one line a mode."""
    with figure(path, (6, 4)) as axis:
        for mode in dict.fromkeys(timing.mode for timing in timings):
            own = sorted((t.batch_rows, t.tok_s) for t in timings if t.mode == mode)
            axis.plot(*zip(*own, strict=True), "o-", label=mode)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("rows in flight")
        axis.set_ylabel("completion tokens per second")
        axis.legend()


def _engine(
    config: BenchConfig, mode: BenchMode, batch_rows: int | None, loaded: dict[ModelConfig, Engine]
) -> Engine:
    """An engine of its own for the mode, over weights that modes of one model share."""
    model = mode.model or config.model
    sizes = config.engine.model_copy(update={"max_batch_rows": batch_rows})
    if mode.cohort is not None:
        sizes = sizes.model_copy(update={"cohort": mode.cohort})
    if model not in loaded:
        loaded[model] = Engine.load(model, sizes, mode.decode)
        return loaded[model]
    return Engine(loaded[model].decoder, loaded[model].tokenizer, sizes, mode.decode)


def _prompts(config: BenchConfig, engine: Engine, places: int) -> list[Prompt]:
    """The first rows of the input; raises RowError naming a row that has no prompt."""
    builder = PromptBuilder(config.input, config.sampling, engine.tokenizer, engine.max_model_len)
    wanted = config.input.max_rows
    if config.rows_per_place is not None:
        wanted = max(config.min_rows, round(places * config.rows_per_place))
    source = discover(config.input)
    return [builder.build(row, index, shard.name) for shard, index, row in every_row(source, wanted)]


def _time(engine: Engine, prompts: Sequence[Prompt]) -> _Run:
    for prompt in prompts:
        engine.add(prompt)
    engine.take_stats()
    began = time.perf_counter()
    done = sorted(engine.run(), key=lambda completion: completion.request_id)
    seconds = time.perf_counter() - began
    stats = engine.take_stats()
    mean_layers = stats.mean_layers or float(len(engine.decoder.layers))
    allowed = allowed_speedup(engine, mean_layers)
    tokens = [generation.token_ids or [] for completion in done for generation in completion.generations]
    return _Run(seconds, stats, engine.sizes, engine.policy.name, mean_layers, allowed, tokens)


def _timing(
    mode: str, rows: int, runs: Sequence[_Run], first: Sequence[_Run], expected: Sequence[list[int]]
) -> Timing:
    run, stats = runs[0], runs[0].stats
    rates = [run.tok_s for run in runs]
    decode = [rate for own in runs if (rate := own.decode_tok_s)]
    ratios = [
        own / base
        for run, other in zip(runs, first, strict=True)
        if (own := run.decode_tok_s) and (base := other.decode_tok_s)
    ]
    return Timing(
        mode=mode,
        skip=run.skip,
        batch_rows=run.sizes.batch_rows * run.sizes.lanes,
        rows=rows,
        completion_tokens=stats.completion_tokens,
        tok_s=median(rates),
        tok_s_range=(min(rates), max(rates)),
        speedup=median(run.tok_s / other.tok_s for run, other in zip(runs, first, strict=True)),
        decode_tok_s=median(decode) if decode else None,
        decode_speedup=median(ratios) if ratios else None,
        allowed_speedup=run.allowed_speedup,
        mean_layers=run.mean_layers,
        mean_accepted=stats.mean_accepted or 1.0,
        # another batch size may have more rows or fewer
        identical=mean(
            own == wanted for run in runs for own, wanted in zip(run.tokens, expected, strict=False)
        ),
        layer_tokens_ratio=stats.layer_tokens / stats.layer_tokens_ideal if stats.layer_tokens_ideal else 1.0,
        cohort_fill=stats.cohort_fill or 1.0,
        batch_fill=stats.batch_fill,
    )
