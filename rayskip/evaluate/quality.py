"""`rayskip eval quality`: texts of several models and skip policies against references, and what they cost.

BLEU is sacrebleu's over the corpus, ROUGE-L rouge-score's F-measure against the best reference, on average. Does
not know how models were trained.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rayskip.config import DecodeConfig
from rayskip.config.evaluate import EvalQualityConfig, QualityRun
from rayskip.data.prompts import PromptBuilder, check_input, prompt_columns
from rayskip.data.sources import discover, every_row
from rayskip.data.values import text_of
from rayskip.engine import Engine
from rayskip.evaluate.figure import figure


@dataclass(frozen=True)
class Quality:
    """One run's result. bleu: 0 to 100. rouge_l: 0 to 1. mean_layers: run per generated token.

    tok_s: completion tokens per second of generation, prompts included. speedup: tok_s over the first run's.
    """

    name: str
    model: str
    skip: str
    bleu: float
    rouge_l: float
    mean_layers: float
    tok_s: float
    speedup: float
    inputs: int
    completion_tokens: int


@dataclass(frozen=True)
class _Case:
    row: dict[str, Any]
    references: list[str]


def evaluate_quality(
    config: EvalQualityConfig, on_result: Callable[[Quality], None] = lambda quality: None
) -> list[Quality]:
    """Run every entry of config.runs over every distinct input; writes quality.json, quality.png and texts."""
    cases = _cases(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    results: list[Quality] = []
    for run in config.runs:
        texts, facts = _generate(config, run, cases)
        (output / f"{run.name}.jsonl").write_text(
            "".join(
                json.dumps({"row": case.row, "text": text}) + "\n"
                for case, text in zip(cases, texts, strict=True)
            )
        )
        bleu, rouge = score(texts, [case.references for case in cases], config.lowercase)
        first = results[0].tok_s if results else facts["tok_s"]
        results.append(
            Quality(
                name=run.name,
                model=run.model.path,
                bleu=bleu,
                rouge_l=rouge,
                speedup=facts["tok_s"] / first,
                inputs=len(cases),
                **facts,
            )
        )
        on_result(results[-1])
        (output / "quality.json").write_text(
            json.dumps([asdict(result) for result in results], indent=2) + "\n"
        )
    plot(results, output / "quality.png")
    return results


def score(texts: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool) -> tuple[float, float]:
    """(BLEU of the corpus, mean ROUGE-L) of one text per input against any number of references each."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    columns = [list(column) for column in zip_longest(*references)]
    bleu = BLEU(lowercase=lowercase).corpus_score(list(texts), columns).score
    scorer = RougeScorer(["rougeL"])  # lower-cases always
    rouge = [
        scorer.score_multi(own, text)["rougeL"].fmeasure for text, own in zip(texts, references, strict=True)
    ]
    return bleu, sum(rouge) / len(rouge)


def plot(results: Sequence[Quality], path: Path) -> None:
    """Quality against layers run and against measured speed."""
    with figure(path, (10, 4), ncols=2, sharey=True) as axes:
        for axis, key, label in zip(
            axes, ("mean_layers", "speedup"), ("layers run per token", "measured speed-up"), strict=True
        ):
            for result in results:
                axis.plot(getattr(result, key), result.bleu, "o")
                axis.annotate(result.name, (getattr(result, key), result.bleu))
            axis.set_xlabel(label)
        axes[0].set_ylabel("BLEU")


def format_quality(results: Sequence[Quality]) -> str:
    """A table for a terminal."""
    head = f"{'run':<24}{'BLEU':>7}{'ROUGE-L':>9}{'layers':>8}{'tok/s':>9}{'speed-up':>10}"
    rows = [
        f"{result.name:<24}{result.bleu:>7.1f}{result.rouge_l:>9.3f}{result.mean_layers:>8.1f}"
        f"{result.tok_s:>9.0f}{result.speedup:>10.2f}"
        for result in results
    ]
    return "\n".join([head, *rows])


def _cases(config: EvalQualityConfig) -> list[_Case]:
    """The distinct inputs in order, each with all its references."""
    source = discover(config.input, {config.references, config.group})
    for key in ("references", "group"):
        source.require(config.input.path, key, getattr(config, key))
    check_input(config.input, source.columns)
    columns = prompt_columns(config.input) | {config.references, config.group}
    cases: dict[str, _Case] = {}
    for _, _, row in every_row(source, columns, config.input.max_rows):
        case = cases.setdefault(text_of(row[config.group]), _Case(row, []))
        case.references.append(text_of(row[config.references]))
    return list(cases.values())


def _generate(
    config: EvalQualityConfig, run: QualityRun, cases: Sequence[_Case]
) -> tuple[list[str], dict[str, Any]]:
    """The run's texts, and what they took."""
    engine = Engine.load(run.model, config.engine, DecodeConfig(skip=run.skip))
    builder = PromptBuilder(config.input, config.sampling, engine.tokenizer, engine.max_model_len)
    prompts = [builder.build(case.row, index, "").token_ids for index, case in enumerate(cases)]
    began = time.perf_counter()
    generations = engine.generate(prompts, config.sampling)
    seconds = time.perf_counter() - began
    stats = engine.take_stats()
    facts = {
        "skip": engine.policy.name,
        "mean_layers": stats.mean_layers or float(engine.decoder.depth),
        "tok_s": stats.completion_tokens / seconds,
        "completion_tokens": stats.completion_tokens,
    }
    texts = [(samples[0].text or "").strip() for samples in generations]
    del engine
    gc.collect()
    return texts, facts
