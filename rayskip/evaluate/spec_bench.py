"""`rayskip eval spec-bench`: drafters compared by Spec-Bench's protocol (Xia et al., arXiv 2401.07851).

Six subtasks, MT-Bench's questions in two turns, greedy, one row at a time, prefill included in the time. The
speed-up is the mean over questions of tokens per second over the same mean without a drafter; mean accepted tokens
are per verification, 1 without a drafter. Drafters take turns at every question, so that drift of the machine's
speed hits all, and subtasks too: what is stopped has had equally many questions of each, drawn at random. The same
with more rows at once, which Spec-Bench lacks: all questions of a subtask together.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from rayskip.config import EngineConfig
from rayskip.config.evaluate import SpecBenchConfig, SpecBenchDrafter
from rayskip.engine import Engine
from rayskip.errors import InputError
from rayskip.evaluate.figure import figure
from rayskip.evaluate.table import or_dash
from rayskip.stats import Stats

MT_BENCH = "mt_bench"
TASKS = (MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag")
"""Subtasks; the eight categories of question.jsonl that are none of them are MT-Bench's."""

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Score:
    """A drafter on a subtask ("overall": on all), at one batch size.

    answers: that were timed. tok_s: mean over questions and rounds, or over rounds where questions run together.
    speedup: over the first drafter's, and speedup_error, its standard error; None where that does not run, or
    from one figure alone. identical: share of the answers, token by token, that are the first drafter's at the
    first batch size. prompt_share: of the time, what steps with prompt tokens took; at one row no drafter makes
    them faster.
    """

    drafter: str
    batch_rows: int
    task: str
    answers: int
    tok_s: float
    speedup: float | None
    speedup_error: float | None
    mean_accepted: float
    drafted: int
    accepted: int
    accepted_lengths: dict[int, int]
    identical: float
    prompt_share: float


@dataclass
class _Tally:
    rates: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    answers: list[list[int]] = field(default_factory=list)


def run_spec_bench(config: SpecBenchConfig, say: Callable[[str], None] = lambda line: None) -> list[Score]:
    """Run everything; writes spec_bench.json, over and over, then spec_bench.html and its two plots. `say` is told
    what is done."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    questions = _questions(config)
    say(f"loading {config.model.path}")
    loaded = Engine.load(config.model, EngineConfig(max_batch_rows=1))
    first = config.drafters[0].name
    done: list[Score] = []
    expected: dict[str, list[list[int]]] = {}
    for rows in config.batch_rows:
        sizes = config.engine.model_copy(update={"max_batch_rows": rows})
        drafters = [d for d in config.drafters if d.batch_rows is None or rows in d.batch_rows]
        tallies = {(d.name, task): _Tally() for d in drafters for task in questions}
        turn = list(range(len(drafters)))
        for round_index in range(config.rounds):
            # new engines each time: drafters learn from what they have seen, and must not see a question twice
            _warm_up(config, questions, [_engine(loaded, sizes, drafter) for drafter in drafters])
            engines = [_engine(loaded, sizes, drafter) for drafter in drafters]
            for what, portions in _stages(questions, rows):
                for task, together in portions:
                    turn = turn[1:] + turn[:1]  # none is always the first to meet a question
                    for index in turn:
                        _run(config, engines[index], together, tallies[drafters[index].name, task])
                say(f"batch {rows}, round {round_index + 1} of {config.rounds}: {what}")
                ran = {at: tally for at, tally in tallies.items() if tally.rates}
                answers = expected or {at: ran[name, at].answers for name, at in ran if name == first}
                scores = done + _scores(rows, first, ran, answers)
                _save(scores, output)  # hours of work are not lost when the rest is stopped
        done, expected = scores, answers
    _write_page(config, done, output)
    return done


def format_scores(scores: Sequence[Score]) -> str:
    """Tables for a terminal: speed-up and, in brackets, mean accepted tokens; of all, the speed-up's standard error
    too."""
    lines = []
    for rows in dict.fromkeys(score.batch_rows for score in scores):
        own = [score for score in scores if score.batch_rows == rows]
        tasks = list(dict.fromkeys(score.task for score in own))
        lines.append(
            f"batch {rows:<12}"
            + "".join(f"{task:>16}" for task in tasks)
            + f"{'error':>7}{'tok/s':>8}{'same':>6}"
        )
        for name in dict.fromkeys(score.drafter for score in own):
            by_task = {score.task: score for score in own if score.drafter == name}
            cells = [
                f"{or_dash(by_task[task].speedup, '.2f')} ({by_task[task].mean_accepted:.2f})"
                for task in tasks
            ]
            overall = by_task["overall"]
            lines.append(
                f"{name:<18}"
                + "".join(f"{cell:>16}" for cell in cells)
                + f"{or_dash(overall.speedup_error, '.2f'):>7}{overall.tok_s:>8.0f}{overall.identical:>6.0%}"
            )
    return "\n".join(lines)


def _questions(config: SpecBenchConfig) -> dict[str, list[list[str]]]:
    """Subtask -> questions -> turns."""
    path = Path(config.questions)
    if not path.is_file():
        raise InputError(f"questions: {path} is no file; Spec-Bench's question.jsonl is wanted")
    found: dict[str, list[list[str]]] = {task: [] for task in TASKS}
    for number, line in enumerate(path.read_text().splitlines()):
        try:
            row = json.loads(line)
            task = row["category"] if row["category"] in TASKS else MT_BENCH
            found[task].append([str(turn) for turn in row["turns"]])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"questions: {path}: row {number} needs category and turns ({error})") from error
    return {task: _spread(rows, config.per_task or len(rows)) for task, rows in found.items() if rows}


def _spread(questions: list[list[str]], count: int) -> list[list[str]]:
    """`count` of them, evenly spread, since MT-Bench's eight categories stand one after the other; in a random
    order, the same in every run."""
    count = min(count, len(questions))
    spread = [questions[at * len(questions) // count] for at in range(count)]
    random.Random(0).shuffle(spread)
    return spread


def _stages(
    questions: Mapping[str, list[list[str]]], rows: int
) -> Iterator[tuple[str, list[tuple[str, list[list[str]]]]]]:
    """What is run before the next report, and its (subtask, questions that run together)."""
    if rows > 1:
        yield from ((task, [(task, of_task)]) for task, of_task in questions.items())
        return
    most = max(map(len, questions.values()))
    for at in range(most):
        portions = [(task, [of_task[at]]) for task, of_task in questions.items() if at < len(of_task)]
        yield f"question {at + 1} of {most} of every subtask", portions


def _engine(loaded: Engine, sizes: EngineConfig, drafter: SpecBenchDrafter) -> Engine:
    return Engine(loaded.decoder, loaded.tokenizer, sizes, drafter.decode)


def _warm_up(
    config: SpecBenchConfig, questions: dict[str, list[list[str]]], engines: Sequence[Engine]
) -> None:
    every = [question for rows in questions.values() for question in rows]
    for engine in engines:
        for question in every[: config.warmups]:
            _run(config, engine, [question], _Tally())


def _run(config: SpecBenchConfig, engine: Engine, questions: Sequence[list[str]], tally: _Tally) -> None:
    """Answer all turns of questions that run together, one turn after the other."""
    chats: list[Chat] = [[] for _ in questions]
    answers: list[list[int]] = [[] for _ in questions]
    began = time.perf_counter()
    for turn in range(max(map(len, questions))):
        asked = [at for at, question in enumerate(questions) if turn < len(question)]
        for at in asked:
            chats[at].append({"role": "user", "content": questions[at][turn]})
        found = engine.generate([chats[at] for at in asked], config.sampling)
        for at, (generation,) in zip(asked, found, strict=True):
            if generation.error_message is not None:
                raise InputError(f"questions: {generation.error_message}")
            answers[at] += generation.token_ids or []
            chats[at].append({"role": "assistant", "content": generation.text or ""})
    seconds = time.perf_counter() - began
    tally.rates.append(sum(map(len, answers)) / seconds)
    tally.answers += answers
    tally.stats += engine.take_stats()


def _scores(
    rows: int,
    first: str,
    tallies: Mapping[tuple[str, str], _Tally],
    expected: Mapping[str, list[list[int]]],
) -> list[Score]:
    """Of every drafter, its subtasks and all of them together; tallies: of those that ran."""
    names = dict.fromkeys(name for name, _ in tallies)
    return [
        _score(rows, name, first, task, tallies, expected)
        for name in names
        for task in (*(at for own, at in tallies if own == name), "overall")
    ]


def _score(
    rows: int,
    name: str,
    first: str,
    task: str,
    tallies: Mapping[tuple[str, str], _Tally],
    expected: Mapping[str, list[list[int]]],
) -> Score:
    def of(drafter: str) -> dict[str, _Tally]:
        return {
            at: tally for (own, at), tally in tallies.items() if own == drafter and task in (at, "overall")
        }

    own, base = of(name), of(first)
    rates, base_rates = ([rate for tally in some.values() for rate in tally.rates] for some in (own, base))
    stats = sum((tally.stats for tally in own.values()), Stats())
    pairs = [
        (mine, wanted)
        for at, tally in own.items()
        for mine, wanted in zip(tally.answers, expected[at], strict=False)  # that may have more rounds
    ]
    return Score(
        drafter=name,
        batch_rows=rows,
        task=task,
        answers=sum(len(tally.answers) for tally in own.values()),
        tok_s=mean(rates),
        speedup=mean(rates) / mean(base_rates) if base else None,
        speedup_error=error_of_ratio(rates, base_rates) if len(base_rates) > 1 else None,
        mean_accepted=stats.mean_accepted or 1.0,
        drafted=stats.drafted,
        accepted=stats.accepted,
        accepted_lengths=dict(sorted((int(length), rows) for length, rows in stats.accepted_lengths.items())),
        identical=mean(mine == wanted for mine, wanted in pairs),
        prompt_share=stats.seconds["prefill"] / sum(stats.seconds.values()),
    )


def error_of_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Standard error of the ratio of two means over the same questions, to first order."""
    ratio = mean(over) / mean(under)
    left = [mine - ratio * base for mine, base in zip(over, under, strict=True)]
    return stdev(left) / sqrt(len(left)) / mean(under)


def _save(scores: Sequence[Score], output: Path) -> None:
    described = json.dumps([asdict(score) for score in scores], indent=2)
    (output / "spec_bench.json").write_text(described + "\n")


def _write_page(config: SpecBenchConfig, scores: Sequence[Score], output: Path) -> None:
    first = [score for score in scores if score.batch_rows == config.batch_rows[0]]
    _plot_acceptance(first, output / "acceptance.png")
    _plot_speedups(first, output / "speedup.png")
    (output / "spec_bench.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>{escape(config.name)}</title>"
        f"<h1>{escape(config.name)}</h1><p>{escape(config.model.path)}: speed-up over "
        f"{escape(config.drafters[0].name)} (mean accepted tokens)</p>"
        f"<pre>{escape(format_scores(scores))}</pre>"
        "<img src=speedup.png alt='speed-up by subtask'><img src=acceptance.png alt='acceptance by position'>"
    )


def _plot_acceptance(scores: Sequence[Score], path: Path) -> None:
    """Share of verifications with at least so many accepted drafts."""
    with figure(path, (6, 4)) as axis:
        for score in scores:
            lengths = Counter(score.accepted_lengths)
            if score.task == "overall" and score.drafted:
                most = max(lengths)
                shares = [
                    sum(count for length, count in lengths.items() if length >= least) / lengths.total()
                    for least in range(1, most + 1)
                ]
                axis.plot(range(1, most + 1), shares, "o-", label=score.drafter)
        axis.set_xlabel("drafted position")
        axis.set_ylabel("share of verifications that accept it")
        axis.legend()


def _plot_speedups(scores: Sequence[Score], path: Path) -> None:
    """End-to-end bars, one group a subtask."""
    names = list(dict.fromkeys(score.drafter for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    with figure(path, (10, 4)) as axis:
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            heights = [score.speedup or 0.0 for score in scores if score.drafter == name]
            axis.bar([at + place * width for at in range(len(tasks))], heights, width, label=name)
        axis.set_xticks([at + 0.4 - width / 2 for at in range(len(tasks))], tasks)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_ylabel("speed-up")
        axis.legend()
