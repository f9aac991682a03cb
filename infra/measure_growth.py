"""How cost grows: tokens per second against rows per job, prompt length and output length.

Rows per job are whole jobs, as `rayskip run` runs them, with short prompts and short answers, so that what a job
costs beside the model shows. Prompt and output lengths are the bare engine over token ids drawn at random. Beside
each figure stands the arithmetic done in its seconds, products and attention: where that rate stays, time grows as
the arithmetic does. The last line is all of it as JSON.

    python infra/measure_growth.py --rows 512 5000 50000 --prompts 32 512 4096 --outputs 32 256 1024
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rayskip.config import EngineConfig, JobConfig, SamplingParams
from rayskip.driver.report import Report
from rayskip.engine import Engine
from rayskip.job import run

LINE = "{:8}{:>7}{:>8}{:>8}{:>9}{:>9}{:>9}{:>14}"
ROW_OUTPUT = 8
"""Tokens generated for a row of a job."""


@dataclass(frozen=True)
class Measured:
    """One measurement.

    grows: what differs from the one before. prompt, output: tokens a row. tok_s: generated tokens a second; of a
    job, from the first replica ready to the last commit. gflop_s: of products and attention. wall_s: the whole of
    it; of a job with start, load and report. driver_cpu_s: a job's driver's, per 1,000 rows.
    """

    grows: str
    rows: int
    prompt: int
    output: int
    tok_s: float
    gflop_s: float
    wall_s: float
    driver_cpu_s: float | None = None


def gflop(engine: Engine, prompt: int, output: int) -> float:
    """Arithmetic of a row: products of every token that runs, the head of every one that follows, and attention's
    two products over all positions before."""
    spec, decoder = engine.decoder.spec, engine.decoder
    products = sum(layer.size for layer in decoder.weights.layers)
    ran = prompt + output - 1  # the last token does not run
    attended = ran * (ran + 1) / 2 * decoder.depth * spec.heads * spec.head_dim * 2
    return 2 * (ran * products + output * decoder.weights.head.weight.numel() + attended) / 1e9


def of_engine(grows: str, engine: Engine, rows: int, prompt: int, output: int) -> Measured:
    draw = torch.Generator().manual_seed(prompt)
    prompts = torch.randint(engine.decoder.spec.vocab, (rows, prompt), generator=draw).tolist()
    began = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=output, temperature=0, ignore_eos=True))
    seconds = time.perf_counter() - began
    work = rows * gflop(engine, prompt, output)
    return Measured(grows, rows, prompt, output, rows * output / seconds, work / seconds, seconds)


def of_job(engine: Engine, model: str, rows: int, folder: Path) -> Measured:
    """engine: only for the arithmetic of the model."""
    source = folder / "rows.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"Row number {row} of many:"}) + "\n" for row in range(rows))
    )
    job = JobConfig.model_validate(
        {
            "name": "growth",
            "model": {"path": model},
            "input": {"path": str(source)},
            "sampling": {"max_tokens": ROW_OUTPUT, "temperature": 0, "ignore_eos": True},
            "output": {"path": str(folder / "out")},
        }
    )
    report: Report = run(job)
    prompt = round(report.prompt_tokens / rows)
    work = rows * gflop(engine, prompt, ROW_OUTPUT)
    return Measured(
        "rows",
        rows,
        prompt,
        ROW_OUTPUT,
        report.completion_tok_s,
        work / report.generate_s,
        report.wall_s,
        report.driver_cpu_s_per_1000_rows,
    )


def measure(arguments: argparse.Namespace) -> Iterator[Measured]:
    engine = Engine.load(arguments.model, EngineConfig(max_batch_rows=arguments.batch_rows))
    of_engine("", engine, arguments.batch_rows, 32, 16)  # first touches of memory are nobody's
    for prompt in arguments.prompts:
        yield of_engine("prompt", engine, arguments.batch_rows, prompt, 32)
    for output in arguments.outputs:
        yield of_engine("output", engine, arguments.batch_rows, 32, output)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            yield of_job(engine, arguments.model, rows, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second against rows, prompt and output length.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="*", default=[512, 5000], help="rows of a job")
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 512], help="tokens a prompt")
    parser.add_argument("--outputs", type=int, nargs="*", default=[32, 256], help="tokens an answer")
    parser.add_argument("--batch-rows", type=int, default=16, help="rows that the bare engine runs at once")
    measured = []
    arguments = parser.parse_args()
    print(LINE.format("grows", "rows", "prompt", "output", "tok/s", "GFLOP/s", "wall s", "driver CPU s"))
    for one in measure(arguments):
        measured.append(asdict(one))
        driver = "" if one.driver_cpu_s is None else f"{one.driver_cpu_s:.2f}"
        rates = f"{one.tok_s:.0f}", f"{one.gflop_s:.0f}", f"{one.wall_s:.1f}"
        print(LINE.format(one.grows, one.rows, one.prompt, one.output, *rates, driver), flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
