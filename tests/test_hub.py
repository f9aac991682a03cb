"""What is asked of the hub, a server of its few endpoints, for models that are taken and that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, sys
from rayskip.errors import ModelError
from rayskip.model.checkpoint import resolve
for name in sys.argv[1:]:
    try:
        print(json.dumps(sorted(path.name for path in resolve(name).iterdir())))
    except ModelError as error:
        print(json.dumps(str(error)))
"""
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
BIG = "model.embed_tokens.weight"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, str, list[tuple[str, str]]]]:
    """(folder of models by owner and name, address, (model/file, range) of every download asked for)."""
    root, asked = tmp_path / "hub", []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/"):
                owner, name, *_ = path.removeprefix("/api/models/").split("/")
                return self._answer_json(root / owner / name, "/tree/" in path)
            owner, name, _, _, file = path.lstrip("/").split("/", 4)
            wanted = root / owner / name / file
            if self.command == "GET":
                asked.append((f"{name}/{file}", self.headers.get("range", "")))
            if not wanted.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = wanted.read_bytes()
            status, part = 200, self.headers.get("range")
            if part is not None:
                start, end = part.removeprefix("bytes=").split("-")
                status, content = 206, content[int(start) : int(end) + 1 if end else None]
            self._answer(status, content, {"ETag": f'"{name}-{file}"', "X-Repo-Commit": COMMIT})

        def _answer_json(self, folder: Path, tree: bool) -> None:
            if not folder.is_dir():
                return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in folder.iterdir()
            ]
            about = {"id": folder.name, "sha": COMMIT, "siblings": []}
            self._answer(200, json.dumps(files if tree else about).encode(), {})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def _publish(root: Path, name: str, dtype: torch.dtype = torch.bfloat16, **files: dict[str, Any]) -> None:
    folder = root / "someone" / name
    folder.mkdir(parents=True)
    for file, content in {"config": LLAMA, **files}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    # large enough that its header is a small part of it
    save_file({BIG: torch.zeros(512, 1024).to(dtype)}, folder / "model.safetensors")


def test_a_refused_model_costs_no_download_of_its_weights(
    hub: tuple[Path, str, list[tuple[str, str]]], tmp_path: Path
) -> None:
    root, address, asked = hub
    _publish(root, "good")
    _publish(root, "family", config={**LLAMA, "model_type": "lama"})
    _publish(root, "alien", config={**LLAMA, "model_type": "bloom"})
    _publish(root, "code", tokenizer_config={"auto_map": {"AutoTokenizer": ["code.Run", None]}})
    _publish(root, "packed", dtype=torch.float8_e4m3fn)
    _publish(root, "pickled")
    (root / "someone/pickled/model.safetensors").rename(root / "someone/pickled/pytorch_model.bin")
    names = ("good", "family", "alien", "code", "packed", "pickled", "missing")

    def resolve(endpoint: str, *names: str) -> list[Any]:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", CODE, *(f"someone/{name}" for name in names)],
            env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    good, family, alien, code, packed, pickled, missing = resolve(address, *names)

    assert good == ["config.json", "model.safetensors"]
    assert "did you mean llama?" in family
    assert "a bloom does not run through transformers' modules" in alien
    assert "custom code (auto_map)" in code
    assert f"quantised ({BIG}, F8_E4M3)" in packed
    assert "pickled lacks some of model.safetensors, and nothing else is read" in pickled
    assert "no hub model of that name" in missing
    whole = {file for file, part in asked if part == ""}
    assert "good/model.safetensors" in whole
    assert not {file for file in whole if file.endswith((".safetensors", ".bin", ".py"))} - {
        "good/model.safetensors"
    }
    first = [file for file, _ in asked if file.startswith("good/")]
    assert first[0] == "good/config.json"

    unreachable = "http://127.0.0.1:9"
    kept, lost = resolve(unreachable, "good", "packed")
    assert kept == good  # what was downloaded needs no network
    assert "hub cannot be reached" in lost
