"""A shard's output that another attempt wrote first: found, read back, and committed as what it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayskip.cluster.replica import Replica
from rayskip.config import JobConfig, ModelConfig
from rayskip.data.attempt import data_key, write_attempt
from rayskip.data.folder import JOB
from rayskip.data.output import SUFFIXES, count_rows, encode, output_table
from rayskip.data.records import Generation, Shard
from rayskip.data.storage import LocalStorage
from rayskip.driver.plan import make_plan
from rayskip.errors import InputError, ModelError, OutputError, TakenOver
from rayskip.pool import ReplicaProgress

NONCE = "ab" * 16


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(str(tmp_path / "out"))
    storage.create(JOB, json.dumps({"nonce": NONCE}).encode())
    return storage


def test_the_first_to_write_is_the_only_one(storage: LocalStorage) -> None:
    key = data_key(7, NONCE, "jsonl")
    assert write_attempt(storage, key, b"first") == b"first"
    assert write_attempt(storage, key, b"second") == b"first"
    assert storage.list("data") == {f"data/shard-00007-{NONCE}.jsonl": 5}


def test_what_belongs_to_a_job_that_was_deleted_is_gone_again(storage: LocalStorage) -> None:
    old = data_key(7, "cd" * 16, "jsonl")
    with pytest.raises(TakenOver, match=r"job\.json is gone or another job's"):
        write_attempt(storage, old, b"late")
    assert storage.list("data") == {}


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Callable[..., Path]) -> JobConfig:
    lines = [{"prompt_token_ids": [3, 5, 7]}, {"prompt_token_ids": None}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JobConfig.model_validate(
        {
            "name": "attempts",
            "model": {"path": str(tiny_llama("attempts", 0, vocab_size=64))},
            "input": {"path": str(tmp_path / "in.jsonl")},
            "sampling": {"max_tokens": 2, "n": 2},
            "output": {"path": str(tmp_path / "out"), "format": "openai"},
        }
    )


def test_a_replica_tells_of_the_file_that_is_there_not_of_its_own(
    storage: LocalStorage, job: JobConfig
) -> None:
    """Two engines that are not batch-invariant may differ: the record must be of what readers get."""
    plan = make_plan(job)
    shard = Shard(**{**vars(plan.shards[0]), "output": data_key(0, NONCE, "jsonl")})
    replica = Replica(job, plan.source)
    assert replica.progress() == ReplicaProgress(0, 0, "starting")
    replica.ready()
    assert replica.progress() == ReplicaProgress(0, 0)
    first = replica.run(shard)
    assert (first.rows, first.rows_failed, first.input_rows_failed) == (4, 2, 1)

    other = storage.get(shard.output)
    assert other is not None
    other = other.replace(b'"error": null', b'"error": {"code": "x", "message": "y"}')
    storage.put(shard.output, other)
    told = replica.run(shard)
    assert (told.rows, told.rows_failed, told.input_rows_failed) == (4, 4, 2)
    assert told.bytes == len(other)
    assert told.sha256 == hashlib.sha256(other).hexdigest()

    storage.put(shard.output, other.splitlines(keepends=True)[0])
    with pytest.raises(OutputError, match=r"does not hold exactly rows 0 to 1 of in\.jsonl; delete it"):
        replica.run(shard)
    storage.put(shard.output, b"{")
    with pytest.raises(OutputError, match="is no output of this job"):
        replica.run(shard)


def test_a_replica_on_a_node_without_the_drivers_folders_loads_nothing(
    storage: LocalStorage, job: JobConfig
) -> None:
    """The model is no model: whoever loaded it would say so."""
    replica = Replica(job.model_copy(update={"model": ModelConfig(path="none")}), make_plan(job).source)
    with pytest.raises(ModelError, match="no folder none"):
        replica.ready()
    os.unlink(job.input.path)
    with pytest.raises(InputError, match=f"input.path: {job.input.path} is not here; name a folder that all"):
        replica.ready()
    storage.delete([JOB])
    with pytest.raises(
        OutputError, match=f"output.path: {storage.url} is not the folder that the driver sees"
    ):
        replica.ready()


@pytest.mark.parametrize("format", SUFFIXES)
def test_rows_are_counted_in_every_format(format: str) -> None:
    import pyarrow as pa

    config: dict[str, Any] = {"name": "j", "model": {"path": "m"}, "input": {"path": "in"}}
    job = JobConfig.model_validate({**config, "output": {"path": "out", "format": format}})
    shard = Shard(0, "f", "f", 5, 7)
    failed = [Generation(6, sample, "error", error_type="x", error_message="y") for sample in range(2)]
    rows = [Generation(5, 0, "stop", "a"), *failed]
    data = encode(format, output_table(pa.table({"id": [1, 2]}), rows, shard, job))
    assert count_rows(data, format, "", shard) == (3, 2, 1)
    assert SUFFIXES[format] in data_key(0, NONCE, SUFFIXES[format])
    with pytest.raises(ValueError, match="rows 5 to 7 of f"):
        count_rows(data, format, "", Shard(0, "f", "f", 5, 8))
    with pytest.raises(ValueError, match="is no output"):
        count_rows(data[:-3], format, "", shard)
