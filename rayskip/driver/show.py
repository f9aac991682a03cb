"""Rows of a job's output for people to read, finished or not. Knows records, not how rows are shown."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

from pydantic import ValidationError

from rayskip.config import InputConfig
from rayskip.data.folder import JOB, open_folder
from rayskip.data.output import OutputRow, read_rows
from rayskip.data.prompts import said_columns
from rayskip.data.storage import Storage
from rayskip.driver.record_store import REPAIR, read_commits
from rayskip.driver.records import CommitRecord, JobRecord
from rayskip.driver.status import read_job
from rayskip.errors import OutputError


def show(out: str, count: int, errors: bool = False) -> tuple[list[OutputRow], set[str]]:
    """What has come of the first `count` input rows in folder `out`, as far as it is committed, and the columns
    that hold what was said to the model. errors: of those that failed, only what failed.

    Reads no more data files than it takes. Raises OutputError where there is no job, or a file that was committed
    cannot be read.
    """
    storage = open_folder(out)
    job = read_job(storage)
    wanted = (commit for commit in read_commits(storage, job.since) if commit.rows_failed or not errors)
    rows = (row for commit in wanted for row in _read(storage, job, commit))
    chosen = (row for row in rows if row.error_type is not None or not errors)
    by_row = groupby(chosen, key=lambda row: (row.row_file, row.row_index))
    return [row for _, samples in islice(by_row, count) for row in samples], _said(storage, job)


def _said(storage: Storage, job: JobRecord) -> set[str]:
    """The columns that hold what was said to the model."""
    try:
        return said_columns(InputConfig.model_validate(job.config["input"], extra="ignore"))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, ("config.input", *fault["loc"])))
        raise OutputError(f"{storage.place(JOB)} is damaged: {key} {fault['msg']}") from error


def _read(storage: Storage, job: JobRecord, commit: CommitRecord) -> Iterator[OutputRow]:
    data = storage.get(commit.file)
    if data is None:
        raise OutputError(f"{storage.place(commit.file)} is gone; the run command runs its shard again")
    try:
        yield from read_rows(data, job.format, job.prefix)
    except (ValueError, KeyError, TypeError, OSError) as error:  # OSError: pyarrow's, of damaged bytes
        raise OutputError(f"{storage.place(commit.file)} is damaged ({error}); {REPAIR}") from error
