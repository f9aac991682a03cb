"""From the config's model.path to a folder of safetensors, and from there to tensors.

Only safetensors and only known families: nothing in a checkpoint is ever executed. Does not know how a
decoder runs. Importing this, and checking a folder, loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError
from rayskip.model import embedded
from rayskip.model.adapter import Merged, adapter_files
from rayskip.model.families import FAMILIES, family

if TYPE_CHECKING:
    import torch

    from rayskip.model.spec import Spec, Weights

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Config, tokenizer and chat template, as a folder's own files."""

LABEL = "rayskip.json"
"""File beside a checkpoint's weights that says how rayskip trained it."""

BLOCK = 1 << 20
SAMPLES = 16


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


def load(
    folder: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None
) -> tuple[Spec, Weights]:
    """Read a folder that `resolve` gave: its config, and its weights in `dtype` on `device`.

    adapter: folder of a LoRA adapter to merge. Raises ModelError when config, weights and adapter do not fit
    together.
    """
    config, spec = _config_and_spec(folder)
    own = family(config.model_type)
    with ExitStack() as opened:
        stored: Mapping[str, torch.Tensor] = _Stored(weight_files(folder), dtype, device, opened)
        if adapter is not None:
            check_base(adapter, folder)
            stored = Merged(stored, adapter, opened)
        weights = own.weights(config, spec, stored)
    _check_shapes(folder, spec, weights)
    return spec, weights


def check_base(adapter: Path, folder: Path) -> None:
    """Refuse an adapter that rayskip trained on another model. Raises ModelError."""
    label = adapter / LABEL
    if not label.exists():
        return
    trained_on = _read_json(label)
    if trained_on["base_tensors"] != tensors_fingerprint(folder):
        raise ModelError(
            f"model.adapter: {adapter} was trained on {trained_on['base']}, {folder} is another model"
        )


def trained_policy(folder: Path) -> str | None:
    """The skip policy that a checkpoint of `rayskip train skip` was trained under; None for any other."""
    label = folder / LABEL
    return str(_read_json(label)["skip"]) if label.exists() else None


def read_spec(folder: Path) -> Spec:
    """The decoder of a folder that `resolve` gave, from its config alone: no weight is read."""
    return _config_and_spec(folder)[1]


def read_layer_count(folder: Path) -> int:
    """How many layers that decoder has."""
    return int(_config_and_spec(folder)[0].num_hidden_layers)


def _config_and_spec(folder: Path) -> tuple[Any, Spec]:
    from dataclasses import replace

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    spec = family(config.model_type).spec(config)
    return config, replace(spec, eos_token_ids=_end_tokens(folder, config))


def weight_files(folder: Path) -> list[Path]:
    """The files transformers would read: those that the index names, else model.safetensors.

    Raises ModelError when one is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = {str(name) for name in _read_json(index).get("weight_map", {}).values()}
    files = [folder / name for name in sorted(names)]
    outside = [file for file in files if file.parent != folder]
    missing = [file.name for file in files if not file.is_file()]
    if outside or not files:
        raise ModelError(f"model.path: {index} must name files beside it")
    if missing:
        raise ModelError(f"model.path: {folder} has no {missing[0]}{_other_weights(folder)}")
    return files


def weights_fingerprint(folder: Path) -> str:
    """Identity of a checkpoint, without reading hundreds of gigabytes: a sha256 hex digest.

    It covers names and sizes of all files, config, tokenizer and chat template whole, and of each
    safetensors file the header (every tensor's name, type, shape and place) and 16 evenly spaced MiB.
    A file of up to 16 MiB is read whole.
    """
    small = sorted(file for pattern in SMALL_FILES for file in folder.glob(pattern))
    return _fingerprint([*small, *weight_files(folder)])


def adapter_fingerprint(folder: Path) -> str:
    """Identity of a LoRA adapter, by the same means. Raises ModelError when the folder holds none."""
    return _fingerprint(adapter_files(folder))


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        for block in _sampled(file):
            digest.update(block)
    return digest.hexdigest()


def tensors_fingerprint(folder: Path) -> str:
    """Identity of a checkpoint's tensors alone, sampled as in `weights_fingerprint`."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        for block in _sampled(file):
            digest.update(block)
    return digest.hexdigest()


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as source:
        if size <= SAMPLES * BLOCK:
            yield source.read()
            return
        length = source.read(8)
        yield length + source.read(int.from_bytes(length, "little"))
        for part in range(SAMPLES):
            source.seek((size - BLOCK) * part // (SAMPLES - 1))
            yield source.read(BLOCK)


class _Stored(Mapping[str, "torch.Tensor"]):
    """The tensors of safetensors files by name. A tensor is read when it is asked for, so that a model never
    lies in memory twice and a part that nobody asks for (a vision tower) never once."""

    def __init__(
        self, files: list[Path], dtype: torch.dtype, device: torch.device, opened: ExitStack
    ) -> None:
        from safetensors import safe_open

        self._dtype = dtype
        self._device = device
        handles = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
        self._handles = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor.to(self._device, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def _end_tokens(folder: Path, config: Any) -> tuple[int, ...]:
    """What ends a text: the generation config's word on it, else the config's: one id, several or none."""
    file = folder / "generation_config.json"
    eos = _read_json(file).get("eos_token_id") if file.is_file() else None
    if eos is None:
        eos = config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return content


def _check(folder: Path) -> None:
    """Refuse what may not or cannot be loaded, by its json and its weights' headers alone."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder} has no config.json; give a folder saved by transformers")
    config = _read_json(folder / "config.json")
    if config.get("auto_map"):
        raise ModelError(f"model.path: {folder}/config.json names custom code (auto_map); rayskip runs none")
    if config.get("quantization_config"):
        raise ModelError(f"model.path: {folder} is quantised; give bfloat16, float16 or float32 safetensors")
    if config.get("model_type") not in FAMILIES:
        raise ModelError(
            f"model.path: {folder}/config.json has model_type {config.get('model_type')!r}; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    for file in weight_files(folder):
        _check_whole(file)


def _check_whole(file: Path) -> None:
    """A cut or forged file is refused before anything is allocated for it; the library checks its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error})") from error


def _check_shapes(folder: Path, spec: Spec, weights: Weights) -> None:
    """The sizes that config.json promises are those of the weights."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    expected = [("embedding", weights.embed, (spec.vocab, spec.hidden))]
    for index, layer in enumerate(weights.layers):
        expected.append((f"layer {index} qkv", layer.qkv.weight, (queries + 2 * keys, spec.hidden)))
        expected.append((f"layer {index} output", layer.out.weight, (spec.hidden, queries)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{folder}: {name} is {tuple(tensor.shape)}, but config.json says {shape}")


def _other_weights(folder: Path) -> str:
    """What lies there instead of safetensors, for the error message."""
    others = sorted(
        file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".gguf"}
    )
    return f"; {others[0]} is not read, only safetensors" if others else ""


def _download(path: str, revision: str | None) -> Path:
    """Fetch a hub id's safetensors, config and tokenizer into the hub's own cache."""
    missing = f"model.path: no folder {path}{_nearest(path)}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ModelError(f"{missing}; give a folder, a hub id (owner/name) or {embedded.NAME}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=[*SMALL_FILES, "model*.safetensors"],
                ignore_patterns=["*/*"],
            )
        )
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision: hub model {path} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{missing}, and no hub model of that name that you may read (HF_TOKEN)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(f"{missing}, and the hub cannot be reached") from error


def _nearest(path: str) -> str:
    """' (did you mean …)' from the names beside a missing folder, and the embedded model's."""
    folder = Path(path).expanduser()
    beside = [entry for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    names = {entry.name: str(entry) for entry in beside} | {embedded.NAME: embedded.NAME}
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""
