"""Output rows: one fixed, nullable schema per job, and the file formats it is written in.

Does not know storage, commits or models. The same rows give the same bytes, on any machine and in any run.
Every input row has as many output rows as it has samples, also when it failed.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count, groupby, starmap
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rayskip.config import InputConfig, JobConfig
from rayskip.data.json_columns import columns_of, values_of
from rayskip.data.openai_lines import CUSTOM_ID, URL, answers, response_line
from rayskip.data.records import BROKEN_ROW, Generation, RowErrors, Shard, TokenLogprob
from rayskip.data.token_bytes import TokenBytes
from rayskip.data.values import whole_rows
from rayskip.errors import ConfigError, InputError

_TOP = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())])
_LOGPROB = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32()), ("top", pa.list_(_TOP))])

# Every column that can follow the input's, in output order.
_COLUMNS: dict[str, pa.DataType] = {
    "row_file": pa.string(),
    "row_index": pa.int64(),
    "sample_index": pa.int32(),
    "text": pa.string(),
    "label": pa.string(),
    "probability": pa.float64(),
    "margin": pa.float64(),
    "calibrated": pa.float64(),
    "probabilities": pa.null(),  # of the job's labels, see `output_columns`
    "token_ids": pa.list_(pa.int32()),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "completion_tokens": pa.int32(),
    "logprobs": pa.list_(_LOGPROB),
    "error_type": pa.string(),
    "error_message": pa.string(),
    "skip_policy": pa.string(),
    "mean_layers": pa.float32(),
}

_LABELLED = ("label", "probability", "margin", "calibrated", "probabilities")

_MESSAGE = 300
"""Most characters of an error's message where it stands for others of its type."""

_IDENTITY = ("row_file", "row_index", "sample_index")

_MODEL = b"rayskip.model"
"""Schema metadata: the job's model.path. Parquet keeps it in its footer, openai lines carry it."""

_BEGUN = b"rayskip.begun"
"""Schema metadata of what becomes openai lines: when the job began, in seconds since 1970."""


def output_columns(job: JobConfig) -> dict[str, pa.DataType]:
    """The columns after the input's: token_ids only if asked, logprobs only if any row may ask, skip_policy and
    mean_layers only if layers may be skipped, those of labels in a task of labelling; last what a schema gives."""
    wanted = set(_COLUMNS)
    if not job.output.token_ids:
        wanted.discard("token_ids")
    if job.sampling.logprobs is None and not _has_row_params(job.input):
        wanted.discard("logprobs")
    if job.decode.skip.kind == "none":
        wanted -= {"skip_policy", "mean_layers"}
    if job.task is None:
        wanted -= set(_LABELLED)
    elif job.task.method == "generate":
        wanted -= set(_LABELLED[1:])
    elif job.task.calibrate is None:
        wanted.discard("calibrated")
    labels = pa.struct([(label, pa.float64()) for label in (job.task.labels if job.task else ())])
    ours = {name: kind for name, kind in (_COLUMNS | {"probabilities": labels}).items() if name in wanted}
    return ours | schema_columns(job)


def schema_columns(job: JobConfig) -> dict[str, pa.DataType]:
    """Those of the JSON Schema, where the job asks for them."""
    constraint = job.sampling.constraint
    if job.output.columns is None or constraint is None or constraint.json_schema is None:
        return {}
    return columns_of(constraint.json_schema)


def _has_row_params(config: InputConfig) -> bool:
    return config.sampling_params is not None or config.format == "openai"


def choose_prefix(job: JobConfig, columns: Iterable[str]) -> str:
    """What all output columns' names begin with, so that none is the name of one of the input's `columns`.

    The job's `output.prefix`; where it has none nothing, generated_, generated2_ and so on, the first that is free.
    Raises InputError where the job's own does not do.
    """
    if job.output.format == "openai":
        return ""  # its lines hold none of the input's columns by their names
    present, ours = set(columns), output_columns(job)
    if taken := [name for name in schema_columns(job) if name in _COLUMNS]:
        raise ConfigError(
            f"output.columns: the schema's {taken[0]!r} is the name of a column that every output has; give the "
            "property another"
        )

    def clash(prefix: str) -> list[str]:
        return [prefix + name for name in ours if prefix + name in present]

    if (given := job.output.prefix) is None:
        more = (f"generated{number}_" for number in count(2))
        return next(prefix for prefix in chain(("", "generated_"), more) if not clash(prefix))
    if taken := clash(given):
        raise InputError(
            f"{job.input.path}: the input has a column {taken[0]!r}, and output.prefix {given!r} makes one of the "
            f"output's the same; leave it out, or choose another"
        )
    return given


def output_table(table: pa.Table, rows: Sequence[Generation], shard: Shard, job: JobConfig) -> pa.Table:
    """The shard's input columns, repeated per sample, beside its generations.

    table: the shard's rows, from `read_shard`. rows: sorted by (row_index, sample_index), at least one per
    input row. job: its `output.prefix` is chosen. Raises ValueError when a row is missing: no output may lose one.
    """
    if sorted({row.row_index for row in rows}) != list(range(shard.start, shard.stop)):
        raise ValueError(f"shard {shard.index}: generations do not cover rows {shard.start} to {shard.stop}")
    carried = set(table.column_names) - {BROKEN_ROW}
    if job.output.format == "openai":
        carried &= {CUSTOM_ID, URL}
    kept = table.select([name for name in table.column_names if name in carried])
    repeated = kept.take(pa.array([row.row_index - shard.start for row in rows], pa.int64()))
    columns = {field.name: repeated[field.name] for field in kept.schema}
    fields = [field.with_nullable(True) for field in kept.schema]
    parsed = schema_columns(job)
    said = [values_of(row.text, parsed) for row in rows] if parsed else []
    for name, kind in output_columns(job).items():
        full_name = (job.output.prefix or "") + name
        values = [own[name] for own in said] if name in parsed else [_value(row, name, shard) for row in rows]
        columns[full_name] = pa.array(values, kind)
        fields.append(pa.field(full_name, kind))
    begun = {_BEGUN: str(shard.begun).encode()} if job.output.format == "openai" else {}
    schema = pa.schema(fields, {_MODEL: job.model.path.encode()} | begun)
    return pa.table(list(columns.values()), schema=schema)


def _value(row: Generation, column: str, shard: Shard) -> Any:
    if column == "logprobs":
        return None if row.logprobs is None else [_logprob(token) for token in row.logprobs]
    if column in _LABELLED:
        return None if row.labelled is None else getattr(row.labelled, column)
    value = shard.name if column == "row_file" else getattr(row, column)
    return _utf8(value) if isinstance(value, str) else value


def _utf8(text: str) -> str:
    """An error may quote what was wrong with the row, and that may be what no UTF-8 file can hold."""
    return text.encode(errors="backslashreplace").decode()


def errors_by_type(rows: Iterable[Generation], shard: Shard) -> dict[str, RowErrors]:
    """Those of a shard's output rows that failed, by error_type; messages are cut short."""
    found: dict[str, RowErrors] = {}
    for row in rows:
        if row.error_type is not None:
            count_error(found, row.error_type, shard.name, row.row_index, row.error_message or "")
    return found


def count_error(found: dict[str, RowErrors], kind: str, row_file: str, row_index: int, message: str) -> None:
    """One more error of type `kind`; the first of a type is its example, with its message cut short."""
    first = found.get(kind) or RowErrors(0, _utf8(row_file), row_index, _utf8(message)[:_MESSAGE])
    found[kind] = replace(first, count=first.count + 1)


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top]
    return {"token_id": token.token_id, "logprob": token.logprob, "top": top}


def to_parquet(table: pa.Table) -> bytes:
    """zstd; one row group per file, since a shard is small. How the input was chunked leaves no trace."""
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", row_group_size=max(1, table.num_rows))
    return sink.getvalue()


def to_jsonl(table: pa.Table) -> bytes:
    """One object per row, every column in every object; bytes as base64, NaN and infinities as null."""
    return b"".join(_line(row) for row in whole_rows(table))


def to_openai(table: pa.Table, token_bytes: TokenBytes | None = None) -> bytes:
    """One line of the OpenAI batch output format per input row; its samples are the choices.

    custom_id is the input's, or "FILE:ROW". created is when the job began: every attempt writes the same.
    token_bytes: None where there is no tokenizer; then a token of the log-probabilities is written "token_id:ID".
    Beside OpenAI's own keys a line has the row's identity, row_file and row_index, and its number of samples.
    """
    told = table.schema.metadata or {}
    head = {"created": int(told.get(_BEGUN, b"0")), "model": told.get(_MODEL, b"").decode()}
    by_row = groupby(whole_rows(table), key=lambda row: row["row_index"])
    return b"".join(_line(response_line(list(samples), head, token_bytes)) for _, samples in by_row)


def _line(value: Any) -> bytes:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON can hold of an Arrow value."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case datetime.date() | datetime.time():
            return value.isoformat() if value == value else None  # pandas' "not a time", of nanoseconds
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal():
            return str(value)
    return str(value)


ENCODERS: dict[str, Callable[[pa.Table], bytes]] = {
    "parquet": to_parquet,
    "jsonl": to_jsonl,
}

SUFFIXES: dict[str, str] = {"parquet": "parquet", "jsonl": "jsonl", "openai": "jsonl"}


def encode(format: str, table: pa.Table, token_bytes: TokenBytes | None = None) -> bytes:
    """The whole file of an output table. token_bytes: see `to_openai`."""
    return to_openai(table, token_bytes) if format == "openai" else ENCODERS[format](table)


def read_output(format: str, files: Iterable[bytes]) -> pa.Table:
    """The rows of a finished job's data files, in the order given. openai: one row per line."""
    if format == "parquet":
        return pa.concat_tables([_read_parquet(data) for data in files])
    return pa.Table.from_pylist([line for data in files for line in _lines(data)])


def _read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    # One thread: pyarrow 26's pool aborts one in four processes that end soon after a threaded read.
    return pq.read_table(pa.BufferReader(data), columns=columns, use_threads=False)


@dataclass(frozen=True)
class OutputRow:
    """An output row for people to read. columns: the input's, as far as the format carries them. probability: of
    its label, the calibrated one where there is one."""

    row_file: str
    row_index: int
    sample_index: int
    finish_reason: str
    text: str | None
    error_type: str | None
    error_message: str | None
    columns: dict[str, Any]
    probability: float | None = None


class Outcome(NamedTuple):
    """Which sample of which input row an output row is, and whether it failed."""

    row_file: str
    row_index: int
    sample_index: int
    failed: bool


_SHOWN = tuple(field.name for field in fields(OutputRow))[:-2]


def read_rows(data: bytes, format: str, prefix: str) -> Iterator[OutputRow]:
    """The output rows in a data file, in its order. prefix: of the job's output columns."""
    if format == "openai":
        for line in _lines(data):
            identity, columns = (line["row_file"], line["row_index"]), {CUSTOM_ID: line["custom_id"]}
            yield from (OutputRow(*identity, columns=columns, **answer) for answer in answers(line))
        return
    ours = {prefix + name for name in _COLUMNS}
    for row in whole_rows(_read_parquet(data)) if format == "parquet" else _lines(data):
        columns = {name: value for name, value in row.items() if name not in ours}
        sure = row.get(f"{prefix}calibrated", row.get(f"{prefix}probability"))
        yield OutputRow(**{name: row[prefix + name] for name in _SHOWN}, columns=columns, probability=sure)


def read_outcomes(data: bytes, format: str, prefix: str) -> list[Outcome]:
    """What became of every sample in a data file, in its order. prefix: of the job's output columns."""
    file, row, sample, error = (prefix + name for name in (*_IDENTITY, "error_type"))
    if format == "parquet":
        table = _read_parquet(data, [file, row, sample, error])
        failed = table[error].is_valid()
        columns = (table[file], table[row], table[sample], failed)
        return list(starmap(Outcome, zip(*(column.to_pylist() for column in columns), strict=True)))
    if format == "openai":
        return [
            Outcome(line["row_file"], line["row_index"], sample, line["error"] is not None)
            for line in _lines(data)
            for sample in range(line["samples"])
        ]
    return [Outcome(line[file], line[row], line[sample], line[error] is not None) for line in _lines(data)]


def identity_problems(outcomes: list[Outcome], name: str, start: int, stop: int) -> Iterator[str]:
    """What keeps them from being rows [start, stop) of input file `name`, each with each of its samples once."""
    samples = Counter((one.row_file, one.row_index) for one in outcomes)
    if samples.keys() != {(name, row) for row in range(start, stop)}:
        yield f"does not hold exactly rows {start} to {stop - 1} of {name}"
    wanted = {(file, row, sample) for (file, row), count in samples.items() for sample in range(count)}
    if {one[:3] for one in outcomes} != wanted:
        yield "holds a sample twice or lacks one"


def count_rows(data: bytes, format: str, prefix: str, shard: Shard) -> tuple[int, int, int]:
    """Output rows of a shard's data file, how many of them failed, and of how many input rows. Raises ValueError if
    it is not one."""
    try:
        outcomes = read_outcomes(data, format, prefix)
    except (ValueError, KeyError, TypeError, OSError) as error:  # OSError: pyarrow's, of damaged bytes
        raise ValueError(f"is no output of this job ({error})") from error
    for problem in identity_problems(outcomes, shard.name, shard.start, shard.stop):
        raise ValueError(problem)
    failed = [one.row_index for one in outcomes if one.failed]
    return len(outcomes), len(failed), len(set(failed))


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    return map(json.loads, data.splitlines())
