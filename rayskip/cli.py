"""The command line: parse, wire, run. Does not know how anything is done.

Everything heavy is imported inside the commands, so that --help and a wrong option answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from rayskip.errors import ConfigError, Interrupted, JobFailed, OutputError, RayskipError, counted

app = typer.Typer(
    name="rayskip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes as long to import as everything else together
    help="Batch generation over a dataset, on Ray replicas, committed exactly once.",
    epilog="Exit codes: 0 done; 1 the job failed, or no row succeeded; 2 something given is wrong (a line says "
    "what); 3 another run has taken the output folder over; 75 a run was interrupted, the same command resumes.",
)

train_app = typer.Typer(no_args_is_help=True, help="Train what makes decoding faster.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure what decoding costs and what it is worth.")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; paths in it start here, not there.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, such as sampling.max_tokens=64. Repeatable."
    ),
]
Count = Annotated[int, typer.Option("-n", min=1, metavar="ROWS", help="How many rows.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a job: local, s3:// or gs://.")]


Json = Annotated[bool, typer.Option("--json", help="Print a JSON document; the README lists its keys.")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit; without `args`, with this process's own."""
    _open_closed_streams()
    try:
        app(args)
    except Interrupted as stop:
        _say(str(stop))
        raise SystemExit(stop.exit_code) from None
    except RayskipError as error:
        _say(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    finally:
        _drop_unwritten()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import rayskip

        _show(rayskip.__version__)
        raise typer.Exit


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Delete the job that OUT holds and start over. On a terminal, asks if it is finished.",
        ),
    ] = False,
) -> None:
    """Run a job, or go on where it stopped. Prints the report."""
    from rayskip.driver.signals import heeded

    for number in heeded():
        signal.signal(number, _stop)
    from rayskip.config.file import load_config

    job = load_config(config, overrides or ())
    if fresh and sys.stdin.isatty() and sys.stderr.isatty():
        _ask_to_delete(job.output.path)
    from rayskip.driver.report import format_report
    from rayskip.job import run as run_job
    from rayskip.view import live_view

    with live_view(job.name) as on_progress:
        report = run_job(job, fresh=fresh, progress=on_progress)
    _show(format_report(report))
    _show(f"committed to {job.output.path}")
    if report.failure:
        raise JobFailed(report.failure)


def _ask_to_delete(out: str) -> None:
    """Ask before a finished job is lost. Raises OutputError when the answer is no."""
    from rayskip.driver.status import finished_job

    job = finished_job(out)
    if job and not typer.confirm(f"{out} holds {job}. --fresh deletes it. Go on?", err=True):
        raise OutputError(f"{out}: nothing was deleted")


@app.command()
def plan(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Check everything and show what a run would do; loads no weights."""
    from rayskip.config.file import load_config

    job = load_config(config, overrides or ())
    from rayskip.dry_run import dry_run, facts, format_dry_run
    from rayskip.view import as_json

    seen = dry_run(job)
    _show(as_json(facts(seen)) if json else format_dry_run(seen))
    if seen.refused:
        raise seen.refused


@app.command("preview")
def preview_rows(config: Config, overrides: Overrides = None, count: Count = 5) -> None:
    """Answer a job's first rows here and now; writes nothing."""
    from rayskip.config.file import load_config

    job = load_config(config, overrides or ())
    from rayskip.data.prompts import said_columns
    from rayskip.preview import preview
    from rayskip.view import format_rows

    _show(format_rows(preview(job, count), said_columns(job.input)))


@app.command()
def show(
    out: Out,
    count: Count = 5,
    errors: Annotated[bool, typer.Option("--errors", help="Only rows that failed.")] = False,
) -> None:
    """Print rows of a job's output, finished or not."""
    from rayskip.driver.show import show as show_rows
    from rayskip.view import format_rows

    rows, said = show_rows(out, count, errors)
    _show(format_rows(rows, said) or f"no row {'that failed ' if errors else ''}is committed")


@app.command()
def status(out: Out, json: Json = False) -> None:
    """How far the job in OUT is, and whether it runs."""
    from rayskip.driver.status import status as read_status
    from rayskip.view import as_json, format_status

    found = read_status(out)
    _show(as_json(found) if json else format_status(found))


@app.command()
def verify(
    out: Out,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Take damaged shards back instead, so that a run redoes them alone."),
    ] = False,
    json: Json = False,
) -> None:
    """Check a finished job: hashes, row counts, every row exactly once."""
    from rayskip.driver.verify import repair as repair_job
    from rayskip.driver.verify import verify as verify_job
    from rayskip.view import as_json

    if repair:
        problems = repair_job(out)
        if json:
            return _show(as_json({"taken_back": problems}))
        for problem in problems:
            _show(problem)
        _show("taken back; the run command redoes them" if problems else f"{out}: nothing to repair")
        return
    found = verify_job(out)
    if json:
        return _show(as_json(found))
    _show(
        f"{found.name}: whole. {counted(found.rows, 'row')} exactly once in {counted(found.files, 'file')}, "
        f"{counted(found.generations, 'generation')} ({found.generations_failed:,} failed), {found.bytes:,} bytes, "
        f"all hashes match"
    )


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m-instruct, a folder or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Print the safetensors folder of a model, preparing it first."""
    from rayskip.model.checkpoint import resolve

    _show(resolve(name, revision))


@app.command()
def schema(
    command: Annotated[
        str, typer.Argument(metavar="COMMAND", help='Whose config: run, bench, "train skip", ...')
    ] = "run",
) -> None:
    """Print the JSON Schema of a command's config, for editors."""
    import json

    from rayskip.config.commands import CONFIGS

    if command not in CONFIGS:
        raise ConfigError(f"schema: no command {command!r} reads a config; these do: {', '.join(CONFIGS)}")
    _show(json.dumps(CONFIGS[command].model_json_schema(), indent=2))


@train_app.command("skip")
def train_skip(config: Config, overrides: Overrides = None) -> None:
    """Fine-tune a model under a skip schedule; goes on where it stopped."""
    from rayskip.config.file import load_section
    from rayskip.config.train import TrainSkipConfig

    job = load_section(TrainSkipConfig, config, overrides or ())
    from rayskip.train.run_skip import train_skip as run_training
    from rayskip.view import show_point

    if folder := run_training(job, show_point):
        _show(f"checkpoint in {folder}")


@train_app.command("kangaroo")
def train_kangaroo(config: Config, overrides: Overrides = None) -> None:
    """Train adapters that draft from the model's first layers; goes on where it stopped."""
    from rayskip.config.file import load_section
    from rayskip.config.train import TrainKangarooConfig

    job = load_section(TrainKangarooConfig, config, overrides or ())
    from rayskip.train.run_drafts import format_draft_quality
    from rayskip.train.run_drafts import train_kangaroo as run_training
    from rayskip.view import show_point

    if qualities := run_training(job, show_point):
        _show(format_draft_quality(qualities))


@train_app.command("medusa")
def train_medusa(config: Config, overrides: Overrides = None) -> None:
    """Train heads that draft from the model's last state; goes on where it stopped."""
    from rayskip.config.file import load_section
    from rayskip.config.train import TrainMedusaConfig

    job = load_section(TrainMedusaConfig, config, overrides or ())
    from rayskip.train.run_drafts import format_draft_quality
    from rayskip.train.run_drafts import train_medusa as run_training
    from rayskip.view import show_point

    if qualities := run_training(job, show_point):
        _show(format_draft_quality(qualities))


@eval_app.command("quality")
def eval_quality(config: Config, overrides: Overrides = None) -> None:
    """Compare models and skip policies by their texts and their speed."""
    from rayskip.config.evaluate import EvalQualityConfig
    from rayskip.config.file import load_section

    job = load_section(EvalQualityConfig, config, overrides or ())
    from rayskip.evaluate.quality import evaluate_quality, format_quality

    results = evaluate_quality(job, lambda result: _say(f"{result.name}: BLEU {result.bleu:.1f}"))
    _show(format_quality(results))


@eval_app.command("spec-bench")
def eval_spec_bench(config: Config, overrides: Overrides = None) -> None:
    """Compare drafters by Spec-Bench's protocol."""
    from rayskip.config.evaluate import SpecBenchConfig
    from rayskip.config.file import load_section

    job = load_section(SpecBenchConfig, config, overrides or ())
    from rayskip.evaluate.spec_bench import format_scores, run_spec_bench

    _show(format_scores(run_spec_bench(job, _say)))


@app.command()
def bench(config: Config, overrides: Overrides = None) -> None:
    """Time several modes over the same rows, in turns."""
    from rayskip.config.evaluate import BenchConfig
    from rayskip.config.file import load_section

    job = load_section(BenchConfig, config, overrides or ())
    from rayskip.evaluate.bench import run_bench
    from rayskip.evaluate.timing import format_timings

    _show(format_timings(run_bench(job, _say)))


def _say(line: str) -> None:
    """How far a long command is, or why it ends; its result goes to stdout."""
    with suppress(OSError):  # nobody reads it any more
        print(line, file=sys.stderr)


def _show(result: object) -> None:
    """Print a command's result. That its reader has gone, as `head` goes, is no failure of the command."""
    try:
        with suppress(BrokenPipeError):
            print(result, flush=True)
    except OSError as error:
        raise RayskipError(f"the result cannot be written: {error.strerror}") from error


def _drop_unwritten() -> None:
    """Drop what standard streams did not take, or Python fails at its last flush, with an exit code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """Open standard streams that are closed (`2>&-`): the next file opened would get their numbers, and what native
    code prints would go into it."""
    for number, mode in enumerate("rww"):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            name = ("stdin", "stdout", "stderr")[number]
            setattr(sys, name, open(number, mode))  # noqa: SIM115  (for the process's life)


def _stop(number: int, frame: FrameType | None) -> None:
    """Before and after the driver listens to signals itself."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}; the same command resumes")
