"""Rows whose label is known, in a file of their own, read as the job's input is."""

from __future__ import annotations

from collections.abc import Iterator

from rayskip.config import JobConfig
from rayskip.config.label import LabelledFile, LabelTask
from rayskip.config.messages import closest
from rayskip.data.prompts import Row, check_input, prompt_columns
from rayskip.data.sources import Source, discover, every_row
from rayskip.errors import InputError, shown


def open_labelled(job: JobConfig, file: LabelledFile) -> Source:
    """Raises InputError where it cannot be read, or lacks the label's column or one that a prompt is made of."""
    config = job.input.model_copy(update={"path": file.path, "max_rows": None, "split": None})
    try:
        source = discover(config)
        check_input(config, source.columns)
    except InputError as error:
        raise InputError(str(error).replace("input.path:", "task.calibrate.path:")) from error
    source.require(file.path, "task.calibrate.column", file.column)
    return source


def labelled_rows(
    job: JobConfig, task: LabelTask, file: LabelledFile, source: Source
) -> Iterator[tuple[int, Row, str]]:
    """(index, row, label) of each row. Raises InputError for a label that the task has not."""
    for index, (_, _, row) in enumerate(every_row(source, {*prompt_columns(job.input), file.column}, None)):
        yield index, row, known_label(task, row.get(file.column), f"{file.path}: row {index}: {file.column}")


def known_label(task: LabelTask, value: object, where: str) -> str:
    """A label as the task has it; numbers are their text."""
    label = str(value)
    if label not in task.labels:
        raise InputError(f"{where} is {shown(value)}, which is none of task.labels; {hint(task, label)}")
    return label


def hint(task: LabelTask, label: object) -> str:
    """What was perhaps meant by a label that the task has not."""
    near = closest(str(label), task.names)
    return f"did you mean {near}?" if near else f"labels: {', '.join(task.names)}"


def check_task(job: JobConfig, source: Source) -> Source | None:
    """Refuse a labelling task whose files or columns are not there, or have labels that it has not.

    source: the job's input. Returns the labelled rows' file, if there is one. Raises InputError.
    """
    if (task := job.task) is None:
        return None
    if task.gold is not None:
        source.require(job.input.path, "task.gold", task.gold)
    if task.calibrate is None:
        return None
    labelled = open_labelled(job, task.calibrate)
    for _ in labelled_rows(job, task, task.calibrate, labelled):
        pass
    return labelled
