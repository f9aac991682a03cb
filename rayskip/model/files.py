"""Reading what a checkpoint says of itself: its json files, and the headers of its safetensors.

Everything here is bounded, so that a damaged or hostile file costs one line and no memory. Loads no tensor and
neither torch nor transformers; does not know which keys and names are good ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayskip.errors import ModelError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Config, tokenizer and chat template, as a folder's own files."""

MOST_JSON_BYTES = 64 << 20
"""An index of a hundred thousand tensors has some 10 MB."""

DEEPEST_JSON = 64
"""Levels of nesting; transformers walks through a config by recursion."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""What safetensors calls the types of weights that can be read as they are."""

PACKED = "U8"
"""And of bytes, in which MXFP4 is packed."""


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file. dtype: as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a json file. Raises ModelError for any other content, and when it is too big or too deep."""
    try:
        if (size := file.stat().st_size) > MOST_JSON_BYTES:
            raise ModelError(f"{file}: {size:,} bytes are no config; at most {MOST_JSON_BYTES:,} are read")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise ModelError(f"{file}: nested more than {DEEPEST_JSON} levels deep") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    if any(depth > DEEPEST_JSON for depth, _, _ in _walk(content)):
        raise ModelError(f"{file}: nested more than {DEEPEST_JSON} levels deep")
    return content


def find_key(content: dict[str, Any], keys: Iterable[str]) -> tuple[str, Any] | None:
    """The first of `keys`, at any depth, that has a value other than null, false and empty ones."""
    wanted = set(keys)
    return next(((key, value) for _, key, value in _walk(content) if key in wanted and value), None)


def _walk(content: Any) -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of everything inside; an item of a list has no key."""
    left = [(1, "", content)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if isinstance(value, dict):
            left += [(depth + 1, *pair) for pair in value.items()]
        elif isinstance(value, list):
            left += [(depth + 1, "", item) for item in value]


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """All tensors of safetensors files by name, from their headers; the library bounds and checks those.

    Raises ModelError for a cut or forged file, and for a name that two files have.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in headers:
                        raise ModelError(f"{file}: {name} is in {headers[name].file.name} too")
                    part = opened.get_slice(name)
                    headers[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a whole safetensors file ({error})") from error
    return headers


def headers_text(headers: dict[str, Header]) -> str:
    """All that they tell of the tensors, but for the files' names."""
    return json.dumps(sorted((name, each.dtype, each.shape) for name, each in headers.items()))


def short_name(name: str, prefixes: Iterable[str]) -> str:
    """A tensor's name without the first of `prefixes` that fits: a base model's and a causal LM's are alike."""
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def weight_names(folder: Path) -> list[str]:
    """Names of the files transformers would read: those that the index names, else model.safetensors.

    Raises ModelError for an index that names none, or one that does not lie beside it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    places = read_json(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and _are_texts(places.values()) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ModelError(f"model.path: {index} must name safetensors files beside it, as its weight_map")
    return sorted(names)


def weight_files(folder: Path) -> list[Path]:
    """Those files. Raises ModelError when one is missing."""
    files = [folder / name for name in weight_names(folder)]
    if missing := next((file.name for file in files if not file.is_file()), None):
        raise ModelError(f"model.path: {folder} has no {missing}{_other_weights(folder)}")
    return files


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _other_weights(folder: Path) -> str:
    """What lies there instead of safetensors, for the error message."""
    others = sorted(
        file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".gguf"}
    )
    if not others:
        return ""
    way = "read if model.path names the file" if others[0].endswith(".gguf") else "not read, only safetensors"
    return f"; {others[0]} is {way}"
