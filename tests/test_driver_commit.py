"""The output folder's protocol, on a real folder: folds, races, lost replies, takeover, starting over."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayskip.config import JobConfig
from rayskip.data.folder import MANIFEST
from rayskip.data.records import Shard, ShardResult
from rayskip.data.storage import LocalStorage
from rayskip.driver.commit import commit, finish, load_commits
from rayskip.driver.heartbeat import beating
from rayskip.driver.lease import adopt, open_job
from rayskip.driver.record_store import read, read_commits, scan_commits
from rayskip.driver.records import CommitRecord, JobRecord, Manifest, fold, to_commit
from rayskip.driver.report import total
from rayskip.errors import JobFailed, OutputError, TakenOver
from rayskip.stats import Stats

SHARDS = [Shard(i, "/in/a.jsonl", "a.jsonl", i * 10, i * 10 + 10) for i in range(4)]


def job(fingerprint: str = "f1", parts: dict[str, str] | None = None, **sections: Any) -> JobRecord:
    given = {
        "name": "j",
        "model": {"path": "m"},
        "input": {"path": "a"},
        "output": {"path": "out", "shard_rows": 10},
        **sections,
    }
    config = JobConfig.model_validate(given).model_dump(mode="json")
    parts = parts or {"input files": "i", "model": "m"}
    return JobRecord(name="j", fingerprint=fingerprint, parts=parts, shards=4, rows=40, config=config)


def attempt(storage: LocalStorage, shard: int, by: str = "0") -> ShardResult:
    """Write an output file, as a replica does (of an earlier version, with a name for each attempt)."""
    body = f"shard {shard} by {by}".encode()
    path = f"data/shard-{shard:05d}-{hashlib.md5(body).hexdigest()}.jsonl"
    assert storage.create(path, body)
    digest = hashlib.sha256(body).hexdigest()
    return ShardResult(shard, path, digest, len(body), 10, 1, Stats(completion_tokens=100 + shard))


def record(shard: int, nonce: str = "n") -> CommitRecord:
    result = ShardResult(
        shard, f"data/shard-{shard:05d}-ab.jsonl", "aa", 5, 10, shard % 2, Stats(steps=shard)
    )
    made = to_commit(Shard(shard, "f", "f", shard * 10, shard * 10 + 10), result, job(), 1, nonce)
    return made.model_copy(
        update={"rayskip": f"0.{shard % 2}", "written": f"2026-01-0{7 - shard}T00:00:00+00:00"}
    )


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "out"))


@given(st.lists(st.integers(0, 6)), st.randoms())
def test_the_manifest_is_an_idempotent_fold(shards: list[int], random: object) -> None:
    commits = [record(shard) for shard in shards]
    once = fold("j", "f1", "jsonl", {"kind": "none"}, {c.shard: c for c in commits}.values())
    shuffled = commits * 2
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fold("j", "f1", "jsonl", {"kind": "none"}, shuffled) == once
    assert once.rows == 10 * len(set(shards))
    assert once.rayskip == (", ".join(sorted({f"0.{shard % 2}" for shard in shards})) or None)
    assert once.written == (f"2026-01-0{7 - min(shards)}T00:00:00+00:00" if shards else None)
    assert [file.shard for file in once.files] == sorted(set(shards))
    assert Manifest.model_validate_json(once.to_bytes()) == once


def test_a_job_runs_resumes_and_finishes(storage: LocalStorage) -> None:
    lease = open_job(storage, job(), fresh=False)
    for shard in SHARDS[:2]:
        commit(storage, lease, shard, attempt(storage, shard.index))
    attempt(storage, 2, by="a replica that died")

    lease = open_job(storage, job(), fresh=False)
    assert lease.epoch == 2
    commits = load_commits(storage, "f1", SHARDS, 0)
    assert sorted(commits) == [0, 1]
    for shard in SHARDS[2:]:
        commits[shard.index] = commit(storage, lease, shard, attempt(storage, shard.index))
    assert total(commits.values()).completion_tokens == 100 + 101 + 102 + 103
    manifest = fold("j", "f1", "jsonl", {"kind": "none"}, commits.values())
    finish(storage, lease, manifest)
    finish(storage, lease, manifest)
    assert sorted(storage.list("data")) == [file.path for file in manifest.files]


def test_a_later_driver_fences_the_earlier(storage: LocalStorage) -> None:
    first = open_job(storage, job(), fresh=False)
    first.check()
    second = open_job(storage, job(), fresh=False)
    with pytest.raises(TakenOver, match="another driver took this job over"):
        commit(storage, first, SHARDS[0], attempt(storage, 0))
    second.check()


def test_of_racing_commits_one_counts_and_all_learn_which(storage: LocalStorage) -> None:
    lease = open_job(storage, job(), fresh=False)
    attempts = [attempt(storage, 0, by=str(racer)) for racer in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda result: commit(storage, lease, SHARDS[0], result), attempts))
    assert len({record.nonce for record in won}) == 1
    assert load_commits(storage, "f1", SHARDS, 0) == {0: won[0]}


def test_a_lost_reply_is_told_from_a_lost_race(storage: LocalStorage) -> None:
    class LosesReplies(LocalStorage):
        """Every write arrives; the retry that follows the lost reply finds the key taken."""

        def create(self, key: str, data: bytes) -> bool:
            super().create(key, data)
            return False

    lossy = LosesReplies(storage.url)
    lease = open_job(lossy, job(), fresh=False)
    assert lease.epoch == 1
    result = attempt(storage, 0)
    assert commit(lossy, lease, SHARDS[0], result).file == result.path


def test_another_job_is_refused_before_its_driver_is_fenced(storage: LocalStorage) -> None:
    lease = open_job(storage, job("f1"), fresh=False)
    other = {"input files": "i", "model": "n"}
    with pytest.raises(OutputError, match=r"another job, 'j', 0 of 4 .*; different: model\. .*--fresh"):
        open_job(storage, job("f2", other), fresh=False)
    lease.check()


def test_a_job_that_ended_before_anything_was_done_gives_way(storage: LocalStorage) -> None:
    """As of a run that was refused its cluster: the mended config needs no --fresh."""
    lease = open_job(storage, job("f1"), fresh=False)
    other = {"input files": "i", "model": "n"}
    with pytest.raises(JobFailed), beating(storage, lease.epoch, lambda _: None):
        raise JobFailed("no such cluster")
    assert adopt(storage, job("f2", other)).fingerprint == "f2"
    began = open_job(storage, job("f2", other), fresh=False)
    assert began.job.fingerprint == "f2"
    commit(storage, began, SHARDS[0], attempt(storage, 0))
    with pytest.raises(JobFailed), beating(storage, began.epoch, lambda _: None):
        raise JobFailed("later")
    with pytest.raises(OutputError, match="holds another job"):
        open_job(storage, job("f1"), fresh=False)


def test_the_keys_that_differ_are_named_with_both_values_where_they_decide(storage: LocalStorage) -> None:
    there = {
        "input": {"path": "a"},
        "output": {"path": "a", "shard_rows": 8},
        "quality": {"floor": 0.5},
        "retry": {"max_failed_rows": 1},
    }
    here = {
        "input": {"path": "b", "rename": {"q": "prompt"}},
        "output": {"path": "b", "shard_rows": 9},
        "sampling": {"n": 2},
        "decode": {"skip": {"kind": "unified", "speedup": 2}, "draft": {"kind": "lookup"}},
        "engine": {"max_model_len": 64, "max_batch_rows": 3},
        "model": {"path": "m", "dtype": "float32"},
    }
    open_job(storage, job("f1", {"input files": "i", "model": "m"}, **there), fresh=False)

    def differ(**parts: str) -> str:
        with pytest.raises(OutputError) as refused:
            open_job(storage, job("f2", {"input files": "i", "model": "n"} | parts, **here), fresh=False)
        return str(refused.value).split("different: ")[1].split(". Choose")[0]

    values = (
        "model.dtype ('bfloat16' there, 'float32' here), decode.skip.kind ('none' there, 'unified' here), "
        "decode.skip.speedup (null there, 2.0 here), engine.max_model_len (null there, 64 here), "
        "input.rename.q (null there, 'prompt' here), output.shard_rows (8 there, 9 here), "
        "sampling.n (1 there, 2 here)"
    )
    assert differ() == values
    assert differ(**{"input files": "k"}) == f"input.path ('a' there, 'b' here), {values}"


def test_quality_decides_only_where_it_falls_back_to_full_depth(storage: LocalStorage) -> None:
    skip = {"skip": {"kind": "unified", "speedup": 2}}
    open_job(storage, job("f1", decode=skip, quality={"floor": 0.5}), fresh=False)
    open_job(storage, job("f2", decode=skip, quality={"floor": 0.9, "sample": 0.5}), fresh=False)
    with pytest.raises(OutputError, match=r"quality\.below_floor \(null there, 'full_depth' here\)"):
        open_job(
            storage, job("f2", decode=skip, quality={"floor": 0.5, "below_floor": "full_depth"}), fresh=False
        )


def test_fresh_deletes_the_job_and_nothing_else(storage: LocalStorage) -> None:
    old = open_job(storage, job("f1"), fresh=False)
    commit(storage, old, SHARDS[0], attempt(storage, 0))
    storage.put("data/mine.csv", b"precious")
    open_job(storage, job("f2"), fresh=True)
    assert sorted(storage.list("data")) == ["data/mine.csv"]
    assert load_commits(storage, "f2", SHARDS, 0) == {}
    with pytest.raises(TakenOver):
        old.check()


def test_fresh_fences_a_driver_in_the_middle_of_a_write(storage: LocalStorage) -> None:
    """Its writes, of the same job, arrive when the folder is already another driver's."""

    class Late(LocalStorage):
        """Writes of records arrive late."""

        def create(self, key: str, data: bytes) -> bool:
            late.append((key, data))
            return True

    late: list[tuple[str, bytes]] = []
    first = open_job(storage, job(), fresh=False)
    done = [commit(Late(storage.url), first, shard, attempt(storage, shard.index)) for shard in SHARDS]
    finish(Late(storage.url), first, fold("j", "f1", "jsonl", {"kind": "none"}, done))

    second = open_job(storage, job(), fresh=True)
    assert len(late) == 5
    for key, data in late:
        assert storage.create(key, data)
    assert load_commits(storage, "f1", SHARDS, second.since) == {}
    commits = []
    for shard in SHARDS[:3]:
        commits.append(commit(storage, second, shard, attempt(storage, shard.index, by="the second")))
        with pytest.raises(TakenOver, match="another driver took this job over"):
            commit(storage, first, shard, attempt(storage, shard.index, by="the first"))
    manifest = fold("j", "f1", "jsonl", {"kind": "none"}, commits)
    finish(storage, second, manifest)
    assert read(storage, MANIFEST, Manifest) == manifest
    assert read_commits(storage, 0) == commits
    assert sorted(storage.list("data")) == [record.file for record in commits]


def test_fresh_refuses_a_folder_in_which_no_job_began(storage: LocalStorage) -> None:
    for key in ("job.json", "manifest.json", "report.json", "_commits/shard-00000.json", "data/x.parquet"):
        storage.put(key, b"precious")
    before = storage.list("")
    with pytest.raises(OutputError, match=r"is no job's output folder: .*output\.path"):
        open_job(storage, job(), fresh=True)
    assert storage.list("") == before
    open_job(storage, job(), fresh=False)
    open_job(storage, job(), fresh=True)
    assert storage.list("").items() > before.items()
    hidden = LocalStorage(f"{storage.url}/other")
    hidden.put(".DS_Store", b"")
    open_job(hidden, job(), fresh=True)


@pytest.mark.parametrize("key", ["manifest.json", "report.json", "commits/shard-00000.json"])
@pytest.mark.parametrize("content", [b'{"mine": 1}', b"[1]", b"no json", b'{"fingerprint": "f9"}'])
def test_a_strangers_files_are_refused_and_stay(storage: LocalStorage, key: str, content: bytes) -> None:
    """Fresh or not, and also beside a job.json of ours when they cannot be a job's."""
    key = f".rayskip/{key}"
    storage.put(key, content)
    for fresh in [True] if key.startswith(".rayskip/commits") else [False, True]:
        with pytest.raises(OutputError, match=r"output\.path") as refused:
            open_job(storage, job(), fresh)
        assert key.rsplit("/", 1)[0] in str(refused.value)
    assert storage.list("") == {key: len(content)}
    if not key.startswith(".rayskip/commits") and content in (b'{"mine": 1}', b"[1]"):
        storage.put(".rayskip/job.json", job().to_bytes())
        with pytest.raises(OutputError, match="move it away"):
            open_job(storage, job(), fresh=True)


def test_a_strangers_job_json_is_refused_and_stays(storage: LocalStorage) -> None:
    storage.put(".rayskip/job.json", b'{"cron": "0 0 * * *"}')
    for fresh in (False, True):
        with pytest.raises(OutputError, match=r"job\.json is damaged"):
            open_job(storage, job(), fresh)
    assert storage.list("") == {".rayskip/job.json": 21}


def test_a_job_whose_job_json_is_deleted_goes_on(storage: LocalStorage) -> None:
    """The way on that is left when it is damaged: everything else still says whose it is."""
    lease = open_job(storage, job(), fresh=False)
    done = commit(storage, lease, SHARDS[0], attempt(storage, 0))
    storage.delete([".rayskip/job.json"])
    again = open_job(storage, job(), fresh=False)
    assert again.nonce != lease.nonce
    assert load_commits(storage, "f1", SHARDS, 0) == {0: done}
    with pytest.raises(OutputError, match="another job"):
        open_job(storage, job(sampling={"seed": 1}), fresh=False)


def test_a_folder_of_an_earlier_version_has_no_nonce_and_goes_on(storage: LocalStorage) -> None:
    storage.create(".rayskip/job.json", job("fe" * 32).to_bytes().replace(b',\n  "nonce": ""', b""))
    assert b"nonce" not in (storage.get(".rayskip/job.json") or b"")
    assert open_job(storage, job("fe" * 32), fresh=False).nonce == "fe" * 16


def test_what_cannot_be_read_is_not_taken_for_damaged(storage: LocalStorage) -> None:
    """Repair deletes what is damaged, and a store that refuses says nothing about what it holds."""

    class Refuses(LocalStorage):
        def get(self, key: str) -> bytes | None:
            raise OutputError(f"{key}: Permission denied")

    lease = open_job(storage, job(), fresh=False)
    commit(storage, lease, SHARDS[0], attempt(storage, 0))
    storage.put(".rayskip/commits/shard-00001.json", b"{")
    commits, damaged = scan_commits(storage)
    assert [record.shard for record in commits] == [0]
    assert list(damaged) == [".rayskip/commits/shard-00001.json"]
    with pytest.raises(OutputError, match="Permission denied"):
        scan_commits(Refuses(storage.url))


def test_damage_is_refused_by_name(storage: LocalStorage) -> None:
    lease = open_job(storage, job(), fresh=False)
    done = commit(storage, lease, SHARDS[0], attempt(storage, 0))
    with pytest.raises(OutputError, match=r".rayskip/commits/shard-00000\.json is not of this job"):
        load_commits(storage, "f1", SHARDS[1:], 0)
    storage.put(done.file, b"cut")
    with pytest.raises(OutputError, match=f"{done.file} has 3 bytes, 12 were committed; .*--repair"):
        finish(storage, lease, fold("j", "f1", "jsonl", {"kind": "none"}, [done]))
    escape = done.to_bytes().replace(done.file.encode(), b"../../etc/passwd")
    storage.put(".rayskip/commits/shard-00000.json", escape)
    with pytest.raises(OutputError, match=r".rayskip/commits/shard-00000\.json is damaged: file"):
        load_commits(storage, "f1", SHARDS, 0)


def test_data_files_without_their_records_are_not_taken_for_a_dead_attempts(tmp_path: Path) -> None:
    """As of a folder that was copied without what is hidden: the run would delete them in the end."""
    storage = LocalStorage(str(tmp_path))
    storage.put(f"data/shard-00000-{'ab' * 16}.parquet", b"precious")
    with pytest.raises(OutputError, match=r"holds data/shard-00000-\w+\.parquet and no \.rayskip/job\.json"):
        open_job(storage, job("f1"), fresh=False)
