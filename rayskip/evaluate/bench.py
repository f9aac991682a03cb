"""`rayskip bench`: modes of generating, and other libraries, timed over the same rows in interleaved rounds.

Timings on one machine drift by more than what is to be measured, so everything runs once a round, one to its end
after the other or in turns of some seconds, and ratios are taken inside a round; the table has their medians. So is
the share of what the machine allows. Does not know files' commits or Ray: the engine alone is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import mean, median

from rayskip.config import ModelConfig
from rayskip.config.evaluate import BenchConfig, BenchMode
from rayskip.data.prompts import PromptBuilder, check_input, prompt_columns
from rayskip.data.records import Prompt
from rayskip.data.sources import discover, every_row
from rayskip.decode.sampling import Draw
from rayskip.engine import Completion, Engine
from rayskip.engine.sizes import Sizes
from rayskip.errors import ConfigError
from rayskip.evaluate.peer_process import PeerArguments, running_peer
from rayskip.evaluate.roofline import Roofline, measure_roofline
from rayskip.evaluate.timing import Timing, plot
from rayskip.evaluate.turns import EngineRun, PeerRun, run_in_turns
from rayskip.model.checkpoint import resolve
from rayskip.stats import Stats


@dataclass(frozen=True)
class _Run:
    """tokens: of each completion."""

    seconds: float
    tokens: list[list[int]]

    @property
    def completion_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tok_s(self) -> float:
        return self.completion_tokens / self.seconds


@dataclass(frozen=True)
class _ModeRun(_Run):
    """A run's figures; its engine, with its cache, is gone. roofline, limit_tok_s: None with a drafter."""

    stats: Stats
    sizes: Sizes
    skip: str
    mean_layers: float
    allowed_speedup: float
    roofline: Roofline | None
    limit_tok_s: float | None

    @property
    def decode_tok_s(self) -> float | None:
        """A worker's rate times the workers: what they would make while all are busy."""
        seconds = self.stats.steady_seconds
        return self.stats.steady_tokens * self.sizes.workers / seconds if self.stats.steady_tokens else None


@dataclass
class _Rounds:
    """What ran at one batch size, by mode and by peer, a run a round; and how long the peers loaded."""

    modes: dict[str, list[_ModeRun]]
    peers: dict[str, list[_Run]] = field(default_factory=dict)
    load_s: dict[str, float] = field(default_factory=dict)


_Starts = dict[str, Callable[[], EngineRun | PeerRun]]
"""By name, what begins the run of a mode or peer."""


def run_bench(config: BenchConfig, say: Callable[[str], None] = lambda line: None) -> list[Timing]:
    """Time every mode and peer at every batch size; writes bench.json and bench.png. `say` is told what loads and
    each run's tok/s. Raises ConfigError when a peer cannot run."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    loaded: dict[ModelConfig, Engine] = {}
    timings: list[Timing] = []
    limits: list[dict[str, object]] = []
    expected: dict[tuple[ModelConfig, str], list[list[int]]] = {}
    for batch_rows in config.batch_rows:
        sized = _engine(config, config.modes[0], batch_rows, loaded, say)
        places = sized.sizes.batch_rows * sized.sizes.workers
        prompts = _prompts(config, sized, places)
        rounds = _run_rounds(config, batch_rows, places, prompts, sized.max_model_len, loaded, say)
        first = rounds.modes[config.modes[0].name]
        for mode, own in zip(config.modes, rounds.modes.values(), strict=True):
            wanted = expected.setdefault((mode.model or config.model, own[0].skip), own[0].tokens)
            timings.append(_mode_timing(mode.name, len(prompts), own, first, wanted))
            limits += _limits(mode.name, own)
        wanted = expected[config.modes[0].model or config.model, first[0].skip]
        for name, runs in rounds.peers.items():
            timing = _timing(name, places, len(prompts), runs, first, wanted)
            timings.append(replace(timing, load_s=rounds.load_s[name]))
        described = {"limits": limits, "timings": [asdict(timing) for timing in timings]}
        (output / "bench.json").write_text(json.dumps(described, indent=2) + "\n")
    plot(timings, output / "bench.png")
    return timings


def _run_rounds(
    config: BenchConfig,
    batch_rows: int | None,
    places: int,
    prompts: Sequence[Prompt],
    max_model_len: int,
    loaded: dict[ModelConfig, Engine],
    say: Callable[[str], None],
) -> _Rounds:
    """Modes and peers in turns. A peer loads once, before the first round, and ends after the last one."""
    rounds = _Rounds({mode.name: [] for mode in config.modes})
    longest = max(len(prompt.token_ids) for prompt in prompts) + config.sampling.max_tokens
    if config.peers and longest > max_model_len:
        raise ConfigError(
            f"peers: the longest row needs {longest} positions with sampling.max_tokens, "
            f"the model has {max_model_len}"
        )
    with ExitStack() as running:
        peers = {}
        for peer in config.peers:
            if peer.batch_rows is None or batch_rows in peer.batch_rows:
                folder = str(resolve(config.model.path, config.model.revision))
                say(f"loading {peer.name}")
                dtype = peer.dtype or config.model.dtype
                sampling = config.sampling
                job = PeerArguments(
                    folder,
                    dtype,
                    places,
                    sampling.max_tokens,
                    sampling.ignore_eos,
                    longest,
                    sampling.n,
                    sampling.temperature,
                )
                peers[peer.name] = running.enter_context(running_peer(peer, job))
                rounds.load_s[peer.name] = peers[peer.name].load_s
                rounds.peers[peer.name] = []
        for round_index in range(config.rounds):
            at = f"{places} rows, round {round_index + 1}"
            starts: _Starts = {
                mode.name: partial(_start, config, mode, places, loaded, say, prompts)
                for mode in config.modes
            }
            starts |= {name: partial(PeerRun, process, prompts) for name, process in peers.items()}
            groups = [starts] if config.turn_s else [{name: start} for name, start in starts.items()]
            for group in groups:
                for name, run in _run_group(group, config.turn_s or inf, prompts).items():
                    if isinstance(run, _ModeRun):
                        rounds.modes[name].append(run)
                    else:
                        rounds.peers[name].append(run)
                    say(f"{name}, {at}: {run.tok_s:.0f} tok/s")
    return rounds


def _start(
    config: BenchConfig,
    mode: BenchMode,
    places: int,
    loaded: dict[ModelConfig, Engine],
    say: Callable[[str], None],
    prompts: Sequence[Prompt],
) -> EngineRun:
    """By a new engine each time: drafters learn from what they have seen."""
    return EngineRun(_engine(config, mode, places, loaded, say), prompts)


def _run_group(starts: _Starts, turn_s: float, prompts: Sequence[Prompt]) -> dict[str, _Run]:
    """Run modes and peers in turns, by name; their engines, with their caches, are gone then."""
    runs = {name: start() for name, start in starts.items()}
    run_in_turns(runs.values(), turn_s)
    return {
        name: _mode_run(run, prompts) if isinstance(run, EngineRun) else _Run(run.seconds, run.token_ids)
        for name, run in runs.items()
    }


def allowed_speedup(engine: Engine, mean_layers: float) -> float:
    """How much faster a generated token's products are when `mean_layers` of the layers run and the head always
    does: their work is proportional to their parameters."""
    decoder = engine.decoder
    layers, head = decoder.held.size, decoder.head.linear.size
    return (layers + head) / (layers * mean_layers / decoder.depth + head)


def _engine(
    config: BenchConfig,
    mode: BenchMode,
    batch_rows: int | None,
    loaded: dict[ModelConfig, Engine],
    say: Callable[[str], None],
) -> Engine:
    """An engine of its own for the mode, over weights that modes of one model share."""
    model = mode.model or config.model
    sizes = config.engine.model_copy(update={"max_batch_rows": batch_rows})
    if mode.cohort is not None:
        sizes = sizes.model_copy(update={"cohort": mode.cohort})
    if model not in loaded:
        say(f"loading {model.path}")
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
    check_input(config.input, source.columns)
    rows = every_row(source, prompt_columns(config.input), wanted)
    return [builder.build(row, index, shard.name) for shard, index, row in rows]


def _mode_run(run: EngineRun, prompts: Sequence[Prompt]) -> _ModeRun:
    engine, done, stats = run.engine, run.completions, run.engine.take_stats()
    mean_layers = stats.mean_layers or float(engine.decoder.depth)
    roofline, limit = None, None
    if engine.decode.draft.kind == "none":
        greedy = not any(
            Draw(prompt.params, 0.0, ()).needs_logits or prompt.params.constraint for prompt in prompts
        )
        roofline = measure_roofline(engine.decoder, engine.sizes.batch_rows * engine.sizes.workers, greedy)
        limit = roofline.tok_s(engine.decoder, _mean_length(prompts, done), mean_layers)
    return _ModeRun(
        seconds=run.seconds,
        tokens=[generation.token_ids or [] for completion in done for generation in completion.generations],
        stats=stats,
        sizes=engine.sizes,
        skip=engine.policy.name,
        mean_layers=mean_layers,
        allowed_speedup=allowed_speedup(engine, mean_layers),
        roofline=roofline,
        limit_tok_s=limit,
    )


def _mean_length(prompts: Sequence[Prompt], done: Sequence[Completion]) -> float:
    """Positions that a generated token attends to, mean over all: its prompt's and half of its completion's."""
    lengths = [
        (generation.completion_tokens, len(prompt.token_ids) + generation.completion_tokens / 2)
        for prompt, completion in zip(prompts, done, strict=True)
        for generation in completion.generations
    ]
    return sum(tokens * length for tokens, length in lengths) / max(1, sum(tokens for tokens, _ in lengths))


def _timing(
    name: str,
    batch_rows: int,
    rows: int,
    runs: Sequence[_Run],
    first: Sequence[_Run],
    expected: Sequence[list[int]],
) -> Timing:
    """What modes and peers have in common."""
    rates = [run.tok_s for run in runs]
    return Timing(
        mode=name,
        batch_rows=batch_rows,
        rows=rows,
        completion_tokens=runs[0].completion_tokens,
        tok_s=median(rates),
        tok_s_range=(min(rates), max(rates)),
        speedup=median(run.tok_s / other.tok_s for run, other in zip(runs, first, strict=True)),
        # another batch size may have more rows or fewer
        identical=mean(
            own == wanted for run in runs for own, wanted in zip(run.tokens, expected, strict=False)
        ),
    )


def _mode_timing(
    mode: str,
    rows: int,
    runs: Sequence[_ModeRun],
    first: Sequence[_ModeRun],
    expected: Sequence[list[int]],
) -> Timing:
    run, stats = runs[0], runs[0].stats
    places = run.sizes.batch_rows * run.sizes.workers
    total = sum((run.stats for run in runs), Stats()).seconds
    every_phase = sum(total.values())
    pairs = [(run.decode_tok_s, other.decode_tok_s) for run, other in zip(runs, first, strict=True)]
    return replace(
        _timing(mode, places, rows, runs, first, expected),
        skip=run.skip,
        decode_tok_s=_median(run.decode_tok_s for run in runs),
        decode_speedup=_median(_ratio(own, base) for own, base in pairs),
        limit_tok_s=_median(run.limit_tok_s for run in runs),
        limit_share=_median(_ratio(run.decode_tok_s, run.limit_tok_s) for run in runs),
        allowed_speedup=run.allowed_speedup,
        mean_layers=run.mean_layers,
        mean_accepted=stats.mean_accepted or 1.0,
        layer_tokens_ratio=stats.layer_tokens / stats.layer_tokens_ideal if stats.layer_tokens_ideal else 1.0,
        cohort_fill=stats.cohort_fill or 1.0,
        batch_fill=stats.batch_fill,
        kv_mb_per_row=stats.kv_bytes_held / stats.step_rows / 1e6 if stats.step_rows else None,
        kv_fill=stats.kv_fill,
        seconds={phase: (spent / len(runs), spent / every_phase) for phase, spent in total.items() if spent},
    )


def _limits(mode: str, runs: Sequence[_ModeRun]) -> list[dict[str, object]]:
    """What the mode's limit rests on, medians over the rounds; nothing where it has none."""
    measured = [asdict(run.roofline) for run in runs if run.roofline is not None]
    return (
        [{"mode": mode, **{key: median(one[key] for one in measured) for key in measured[0]}}]
        if measured
        else []
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
