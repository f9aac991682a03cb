"""Storage on a real file system and a real S3 endpoint."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import Fault, FaultProxy, s3_server

from rayskip.data.locate import locate
from rayskip.data.storage import LocalStorage, Storage, open_storage, probe, probe_unmade
from rayskip.driver.show import show
from rayskip.errors import InputError, OutputError, StorageBusy
from rayskip.view import format_rows


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "out"))
    return open_storage(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/out")


def test_round_trip(storage: Storage) -> None:
    assert storage.list("") == {}
    assert storage.get("a/b.json") is None
    assert storage.create("a/b.json", b"one")
    assert not storage.create("a/b.json", b"two")
    assert storage.get("a/b.json") == b"one"
    storage.put("a/b.json", b"three")
    storage.put("c.json", b"")
    assert storage.get("a/b.json") == b"three"
    assert storage.list("") == {"a/b.json": 5, "c.json": 0}
    assert storage.list("a") == {"a/b.json": 5}
    storage.delete(["a/b.json", "never-there"])
    assert storage.list("") == {"c.json": 0}


def test_probe_accepts_and_leaves_nothing(storage: Storage) -> None:
    probe(storage)
    assert storage.list("") == {}


def test_a_look_at_a_folder_does_not_make_it(storage: Storage, tmp_path: Path) -> None:
    probe_unmade(storage)
    assert storage.list("") == {}
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"nothing can be written to /proc"):
        probe_unmade(open_storage("/proc/none/out"))


def test_rows_of_an_unfinished_folder_are_shown(storage: Storage) -> None:
    folder = Path(__file__).parent / "fixtures/folders_0.1.0/unfinished"
    for path in folder.rglob("*.json*"):
        storage.put(path.relative_to(folder).as_posix(), path.read_bytes())
    rows, said = show(storage.url, 1)
    assert [(row.row_file, row.row_index, row.sample_index) for row in rows] == [
        ("rows.jsonl", 2, 0),
        ("rows.jsonl", 2, 1),
    ]
    assert said >= {"prompt_token_ids"}
    assert "rows.jsonl row 2: length\n  prompt_token_ids [5, 7, 11]\n  =>" in format_rows(rows, said)
    assert show(storage.url, 5, errors=True)[0] == []
    storage.delete([key for key in storage.list("data") if "shard-00001" in key])
    with pytest.raises(OutputError, match=r"shard-00001-\w+\.jsonl is gone"):
        show(storage.url, 1)


def test_a_profile_serves_input_and_output(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    profiles = tmp_path / "credentials"
    profiles.write_text("[work]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"out: no AWS credentials here: set AWS_ACCESS_KEY_ID"):
        open_storage(f"{bucket}/profile/out")
    with pytest.raises(InputError, match=r"no-such-bucket.*; no AWS credentials here: set AWS_ACCESS_KEY_ID"):
        locate("s3://no-such-bucket/*.jsonl")
    monkeypatch.setenv("AWS_PROFILE", "home")
    with pytest.raises(OutputError, match=r"no AWS credentials here: .*\(home\) could not be found"):
        open_storage(f"{bucket}/profile/out")
    monkeypatch.setenv("AWS_PROFILE", "work")
    open_storage(f"{bucket}/profile").put("in.jsonl", b"{}")
    assert [file.name for file in locate(f"{bucket}/profile/in.jsonl")] == ["in.jsonl"]


def test_exactly_one_racer_creates(storage: Storage) -> None:
    racers = 12
    with ThreadPoolExecutor(racers) as pool:
        for key in (f"race/{i}" for i in range(8)):
            bodies = [f"{key} by {racer}".encode() for racer in range(racers)]
            won = list(pool.map(lambda body, key=key: storage.create(key, body), bodies))
            assert won.count(True) == 1
            assert storage.get(key) == bodies[won.index(True)]


@pytest.mark.parametrize("faults", [["409"], ["503"], ["drop"], ["409", "503", "409"], ["409", "drop"]])
def test_a_create_outlasts_passing_faults(
    bucket: str, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    """Afterwards the object is there, and only a reply that was lost lets its writer take it for another's."""
    monkeypatch.setattr("rayskip.data.storage._BACKOFF_S", 0.01)
    proxy = FaultProxy(os.environ["AWS_ENDPOINT_URL"])
    with proxy.running():
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(f"{bucket}/{uuid.uuid4().hex}")
        proxy.faults = list(faults)
        assert storage.create("k", b"mine") is ("drop" not in faults)
        assert (storage.get("k"), proxy.faults) == (b"mine", [])
        proxy.faults = ["409"]
        assert not storage.create("k", b"other")
        proxy.faults = ["409"] * 9
        with pytest.raises(StorageBusy, match="conflicting write"):
            storage.create("never", b"")


def test_a_store_that_overwrites_is_refused(tmp_path: Path) -> None:
    class Overwriting(LocalStorage):
        def create(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    with pytest.raises(OutputError, match="no conditional put"):
        probe(Overwriting(str(tmp_path)))


def test_user_errors_name_the_place(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(OutputError, match="ftp://host/x"):
        open_storage("ftp://host/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: is a file, not an output folder"):
        open_storage(str(tmp_path / "file")).create("job.json", b"")
    with pytest.raises(OutputError, match="File name too long"):
        open_storage(str(tmp_path / ("x" * 300))).get("job.json")
    with pytest.raises(OutputError, match="File name too long"):
        open_storage(str(tmp_path / ("x" * 300))).list("data")
    for nowhere in ("", "a\0b", "s3://"):
        with pytest.raises(OutputError):
            open_storage(nowhere)
    (tmp_path / "out/manifest.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"manifest\.json"):
        open_storage(str(tmp_path / "out")).delete(["manifest.json"])
    with pytest.raises(OutputError, match="no-such-bucket"):
        open_storage("s3://no-such-bucket/out").create("job.json", b"")


def test_an_endpoint_that_is_gone_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as url:
        storage = open_storage(f"{url}/out")
        storage.put("k", b"")
    monkeypatch.setattr("rayskip.data.storage._BACKOFF_S", 0.01)
    with pytest.raises(StorageBusy):
        storage.get("k")
