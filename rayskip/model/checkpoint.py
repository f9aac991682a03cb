"""From the config's model.path to a folder of safetensors, and from there to tensors.

Only safetensors and only known families: nothing in a checkpoint is ever executed. Does not know how a
decoder runs. Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError
from rayskip.model import embedded

if TYPE_CHECKING:
    import torch

    from rayskip.model.spec import Family, Spec, Weights

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
BLOCK = 1 << 20
SAMPLES = 16
HEADER_LIMIT = 100 << 20


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a model: the embedded default by name, a folder, or a hub id (downloaded once).

    Raises ModelError when it does not exist or is not something rayskip may or can load.
    """
    if path == embedded.NAME:
        return embedded.folder()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path, revision)
    _check(folder)
    return folder


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Spec, Weights]:
    """Read a checked folder's config and weights, cast to `dtype` on `device`."""
    from safetensors.torch import load_file

    family, config, spec = _family(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.to(dtype) for name, tensor in load_file(file, device=str(device)).items()}
    return spec, family.weights(config, spec, tensors)


def read_spec(folder: Path) -> Spec:
    """What a checked folder's config says of the decoder; reads no weights."""
    return _family(folder)[2]


def _family(folder: Path) -> tuple[Family, Any, Spec]:
    """A folder's family, transformers config and spec, with the end tokens of its generation config."""
    from dataclasses import replace

    from transformers import AutoConfig

    from rayskip.model.families import FAMILIES
    from rayskip.model.families.parts import end_tokens

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    family = FAMILIES[_model_type(folder)]
    spec = family.spec(config)
    if ends := end_tokens(_Json(folder / "generation_config.json")):
        spec = replace(spec, eos_token_ids=ends)
    return family, config, spec


def weights_fingerprint(folder: Path) -> str:
    """Identity of a checkpoint: sha256 over its json files and, of each safetensors file, its name, size,
    first and last MiB and 14 evenly spaced ones between. A file of under 16 MiB is read whole."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as source:
            for offset in sorted({(size - BLOCK) * part // (SAMPLES - 1) for part in range(SAMPLES)}):
                if size > SAMPLES * BLOCK:
                    source.seek(offset)
                digest.update(source.read(BLOCK))
    return digest.hexdigest()


class _Json:
    """A json file's keys as attributes; without the file there are none."""

    def __init__(self, file: Path) -> None:
        self.__dict__.update(_read_json(file) if file.exists() else {})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return content


def _model_type(folder: Path) -> str:
    return str(_read_json(folder / "config.json").get("model_type"))


def _check(folder: Path) -> None:
    """Refuse what may not or cannot be loaded, by reading json alone."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder} has no config.json; give a folder saved by transformers")
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(f"model.path: {folder}/config.json names custom code (auto_map); rayskip runs none")
    if "quantization_config" in config:
        raise ModelError(f"model.path: {folder} is quantised; give bfloat16, float16 or float32 safetensors")
    from rayskip.model.families import FAMILIES

    if config.get("model_type") not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model.path: {folder} has model_type {config.get('model_type')!r}; known: {known}")
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model.path: {folder} has no *.safetensors; other weight formats are not read")
    for file in files:
        _check_header(file)


def _check_header(file: Path) -> None:
    """A cut or forged file is refused before anything is allocated for it."""
    size = file.stat().st_size
    with file.open("rb") as source:
        header = int.from_bytes(source.read(8), "little")
    if size < 8 or header > min(size - 8, HEADER_LIMIT):
        raise ModelError(
            f"{file}: not a whole safetensors file (header of {header} bytes in a file of {size})"
        )


def _download(path: str, revision: str | None) -> Path:
    """Fetch a hub id's safetensors, config and tokenizer into the hub's own cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ModelError(
            f"model.path: no folder {path}{_nearest(path)}; give a folder, a hub id (owner/name) or {embedded.NAME}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError as error:
        raise ModelError(f"model.path: no folder and no hub model {path}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.path: no folder {path}{_nearest(path)}, and the hub cannot be reached"
        ) from error


def _nearest(path: str) -> str:
    """' (did you mean …)' from the names beside a missing folder, and the embedded model's."""
    missing = Path(path).expanduser()
    beside = (
        [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
        if missing.parent.is_dir()
        else []
    )
    near = difflib.get_close_matches(missing.name, [*beside, embedded.NAME], n=1)
    return f" (did you mean {near[0]}?)" if near else ""
