"""From the config's model.path to a folder of safetensors, and from there to tensors.

Only safetensors and only known families: nothing in a checkpoint is ever executed. Does not know how a
decoder runs. Importing this, and resolving a folder, loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.data.blocks import BLOCK, SAMPLES, blocks, sampled
from rayskip.errors import ModelError, shown
from rayskip.model import embedded, gguf_file, hub
from rayskip.model.adapter import Merged, adapter_files, check_fit, read_adapter
from rayskip.model.config import Config, RotaryModule, read_config, reader
from rayskip.model.families import FAMILIES, family
from rayskip.model.files import (
    FLOATS,
    PACKED,
    SMALL_FILES,
    Header,
    headers_text,
    read_headers,
    read_json,
    weight_files,
)
from rayskip.model.hosted.facts import read_facts
from rayskip.model.quantised import BYTES, Dequantised, dequantised_headers, note
from rayskip.model.refusals import check_configs, check_tensors
from rayskip.model.spec import Dense, Experts
from rayskip.user_cache import recall

if TYPE_CHECKING:
    import torch

    from rayskip.model.hosted.modules import Modules
    from rayskip.model.spec import Family, Spec, Weights

LABEL = "rayskip.json"
"""File beside a checkpoint's weights that says how rayskip trained it."""


SUGGESTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling parameters that a generation_config.json may have under the names of a job's."""


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a model: the embedded default by name, a folder, a GGUF file (converted once), or a hub
    id (downloaded once).

    Raises ModelError when it does not exist or is not something rayskip may or can load.
    """
    if path == embedded.NAME:
        return embedded.folder()
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        folder = gguf_file.folder(folder)
    if not folder.is_dir():
        missing = f"model.path: no folder {path}{_nearest(path)}"
        if not hub.NAME.fullmatch(path):
            raise ModelError(
                f"{missing}; give a folder, a .gguf file, a hub id (owner/name) or {embedded.NAME}"
            )
        folder = hub.download(path, revision, missing)
    check_configs(folder)
    check_tensors(_headers(folder))
    return folder


def check(folder: Path, adapter: Path | None = None) -> Spec:
    """The decoder of a folder that `resolve` gave, if all fits together that can be told without reading a weight:
    its config, the tensors in its files' headers, and the LoRA adapter in the folder `adapter`.

    Raises ModelError.
    """
    return _checked(folder, adapter)[0].spec


def weight_bytes(folder: Path, dtype: str) -> int:
    """Memory that the weights of a folder take in `dtype`, as a config names it. Raises ModelError as `check`."""
    return _checked(folder, None)[1] * BYTES[dtype]


def _checked(folder: Path, adapter: Path | None) -> tuple[_Read, int]:
    """`check`, what it read, and how many weights there are. What was found good once is not checked again: torch,
    which that needs, takes seconds to import."""
    read = _read(folder)
    headers = _headers(folder)
    looked_at: list[bytes | str] = [headers_text(headers), (folder / "config.json").read_bytes()]
    if adapter is not None:
        _check_base(adapter, folder)
        settings, weights = adapter_files(adapter)
        looked_at += [headers_text(read_headers([weights])), settings.read_bytes()]
    count = recall("checks", lambda: [*reader(), *looked_at], lambda: _check(folder, adapter, read, headers))
    return read, count


def _check(folder: Path, adapter: Path | None, read: _Read, headers: Mapping[str, Header]) -> int:
    """How many weights there are; raises ModelError when something does not fit."""

    spec = read.spec
    if spec.heads % spec.kv_heads:
        raise ModelError(
            f"{folder}/config.json: {spec.heads} heads are no multiple of {spec.kv_heads} key-value heads"
        )
    count = _check_tensors(folder, read, headers)
    if adapter is not None:
        check_fit(read_adapter(adapter, read.prefixes), headers, read.prefixes)
    return count


def _check_tensors(folder: Path, read: _Read, headers: Mapping[str, Header]) -> int:
    import torch

    if read.family is None:
        from rayskip.model.hosted.load import check_tensors_fit

        shapes = _Shapes(headers)
        check_tensors_fit(folder, shapes)
        return sum(tensor.numel() for tensor in shapes.values())
    try:
        with torch.device("meta"):
            weights = _weights(folder, read.config, read.family, read.spec, _Shapes(headers), torch.float32)
        _check_shapes(folder, read.spec, weights)
    except (RuntimeError, IndexError) as error:  # of shapes that cannot even be put together
        raise ModelError(f"{folder}: its tensors do not fit each other ({error})") from error
    distinct = {id(tensor): tensor for _, tensor, _ in _shapes(read.spec, weights) if tensor is not None}
    return sum(tensor.numel() for tensor in distinct.values())


def load(
    folder: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None
) -> tuple[Spec, Weights | Modules]:
    """Read a folder that `resolve` gave: its config, and its weights in `dtype` on `device`.

    adapter: folder of a LoRA adapter to merge. Raises ModelError as `check` does, before the first weight is read.
    """
    read, _ = _checked(folder, adapter)
    with ExitStack() as opened:
        stored: Mapping[str, torch.Tensor] = _Stored(weight_files(folder), device, opened)
        stored = Dequantised(stored, _headers(folder), dtype)
        if adapter is not None:
            stored = Merged(stored, read_adapter(adapter, read.prefixes), read.prefixes, opened)
        if read.family is not None:
            return read.spec, _weights(folder, read.config, read.family, read.spec, stored, dtype)
        from rayskip.model.hosted.load import load_modules

        merged = None if adapter is None else stored
        return read.spec, load_modules(folder, read_facts(folder), dtype, device, merged)


def dequantised(folder: Path, dtype: str) -> str | None:
    """What is to be said of a folder that `resolve` gave if its weights are dequantised to a job's `dtype`."""
    return note(_headers(folder), dtype, gguf_file.source(folder))


def _headers(folder: Path) -> dict[str, Header]:
    """Of the checkpoint's tensors, as they are once it is dequantised."""
    return dequantised_headers(folder, read_headers(weight_files(folder)))


def _weights(
    folder: Path,
    config: Config,
    own: Family,
    spec: Spec,
    stored: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Weights:
    from rayskip.model.families.parts import Tensors

    try:
        named = Tensors(stored, own.prefixes, dtype)
        weights = own.weights(config, spec, named)
        named.check_all_read()
    except ModelError as error:
        raise ModelError(f"model.path: {folder}: {error}") from error
    return weights


def _check_base(adapter: Path, folder: Path) -> None:
    """Refuse an adapter that rayskip trained on another model."""
    label = adapter / LABEL
    if not label.exists():
        return
    trained_on = read_json(label)
    if trained_on.get("base_tensors") != tensors_fingerprint(folder):
        raise ModelError(
            f"model.adapter: {adapter} was trained on {trained_on.get('base')}, {folder} is another model"
        )


def trained_policy(folder: Path) -> str | None:
    """The skip policy that a checkpoint of `rayskip train skip` was trained under; None for any other."""
    label = folder / LABEL
    policy = read_json(label).get("skip") if label.exists() else None
    return None if policy is None else str(policy)


def suggested_sampling(folder: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json suggests to sample by, under a job's names."""
    file = folder / "generation_config.json"
    suggested = read_json(file) if file.is_file() else {}
    greedy = suggested.get("do_sample") is False
    names = ("repetition_penalty",) if greedy else SUGGESTED
    return {name: suggested[name] for name in names if suggested.get(name) is not None}


def read_spec(folder: Path) -> Spec:
    """The decoder of a folder that `resolve` gave, from its config alone: no weight is read."""
    return _read(folder).spec


def read_layer_count(folder: Path) -> int:
    """How many layers that decoder has."""
    read = _read(folder)
    if read.family is None:
        return len(read_facts(folder).windows)
    return int(read.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class _Read:
    """A checkpoint's config. family: None for a decoder that runs through transformers' modules."""

    config: Config
    family: Family | None
    spec: Spec

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of its tensors' names."""
        return () if self.family is None else self.family.prefixes


def _read(folder: Path) -> _Read:
    config = read_config(folder, _rotary)
    own = family(config.model_type) if config.model_type in FAMILIES else None
    if own is None:
        spec = read_facts(folder).spec
    else:
        try:
            spec = own.spec(config)
        except ModelError as error:
            raise ModelError(f"model.path: {folder}: {error}") from error
    return _Read(config, own, replace(spec, eos_token_ids=_end_tokens(folder, config)))


def _rotary(model_type: str) -> RotaryModule | None:
    return family(model_type).rotary(model_type) if model_type in FAMILIES else None


def weights_fingerprint(folder: Path) -> str:
    """Identity of a checkpoint, without reading hundreds of gigabytes: a sha256 hex digest.

    It covers names and sizes of all files, config, tokenizer and chat template whole, and of each
    safetensors file the header (every tensor's name, type, shape and place) and 16 evenly spaced MiB.
    A file of up to 16 MiB is read whole.
    """
    small = sorted(file for pattern in SMALL_FILES for file in folder.glob(pattern))
    return _fingerprint(small, weight_files(folder))


def adapter_fingerprint(folder: Path) -> str:
    """Identity of a LoRA adapter, by the same means. Raises ModelError when the folder holds none."""
    settings, weights = adapter_files(folder)
    return _fingerprint([settings], [weights])


def _fingerprint(small: list[Path], weights: list[Path]) -> str:
    """Of small files whole, and of weights as `_sampled` reads them."""
    digest = hashlib.sha256()
    for file in small + weights:
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        for block in _sampled(file) if file in weights else _whole(file):
            digest.update(block)
    return digest.hexdigest()


def tensors_fingerprint(folder: Path) -> str:
    """Identity of a checkpoint's tensors alone, sampled as in `weights_fingerprint`."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        for block in _sampled(file):
            digest.update(block)
    return digest.hexdigest()


def _whole(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        yield from blocks(source)


def _sampled(file: Path) -> Iterator[bytes]:
    """Of a safetensors file: its header and 16 evenly spaced MiB; all of a small one."""
    size = file.stat().st_size
    with file.open("rb") as source:
        if size > SAMPLES * BLOCK:
            length = source.read(8)
            yield length + source.read(int.from_bytes(length, "little"))
        yield from sampled(source, size, BLOCK)


class _Shapes(Mapping[str, "torch.Tensor"]):
    """Tensors by name as their headers tell them: of their shapes, without any contents."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self._headers = headers

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        header = self._headers[name]
        if header.dtype not in FLOATS | {PACKED}:
            raise ModelError(f"{name} has the type {header.dtype}, which is no weight's")
        dtype = torch.uint8 if header.dtype == PACKED else torch.float32
        return torch.empty(header.shape, dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


class _Stored(Mapping[str, "torch.Tensor"]):
    """The tensors of safetensors files by name. A tensor is read when it is asked for, so that a model never
    lies in memory twice and a part that nobody asks for (a vision tower) never once."""

    def __init__(self, files: list[Path], device: torch.device, opened: ExitStack) -> None:
        from safetensors import safe_open

        self._device = device
        handles = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
        self._handles = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def _end_tokens(folder: Path, config: Config) -> tuple[int, ...]:
    """What ends a text: the generation config's word on it, else the config's: one id, several or none."""
    file = folder / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.is_file() else None
    if eos is None:
        eos = config.get_text_config().eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"{folder}: eos_token_id is {shown(eos)}; a token id, or a list of them, is wanted")
    return tuple(ids)


def _check_shapes(folder: Path, spec: Spec, weights: Weights) -> None:
    """The sizes that config.json promises are those of the weights."""
    for name, tensor, shape in _shapes(spec, weights):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ModelError(f"{folder}: {name} is {tuple(tensor.shape)}, but config.json says {shape}")


def _shapes(spec: Spec, weights: Weights) -> Iterator[tuple[str, torch.Tensor | None, tuple[int, ...]]]:
    """(name, tensor or None where there is none, its shape by the config)."""
    d, queries, keys = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield "embedding", weights.embed, (spec.vocab, d)
    yield "head", weights.head.weight, (spec.vocab, d)
    yield "position table", weights.positions, (spec.max_positions, d)
    yield "last norm", weights.final_norm.weight, (d,)
    for index, layer in enumerate(weights.layers):
        attention = layer.attention
        products: dict[str, tuple[Dense, tuple[int, ...]]] = {
            "qkv": (attention.qkv, (queries + 2 * keys, d)),
            "output": (attention.out, (d, queries)),
        }
        mlp = layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp
        if mlp is not None:
            inner = mlp.down.weight.shape[-1]
            products["MLP up"] = mlp.up, (inner * (2 if mlp.gated else 1), d)
            products["MLP down"] = mlp.down, (d, inner)
        if isinstance(layer.mlp, Experts):
            count, inner = layer.mlp.router.count, layer.mlp.down.weight.shape[-1]
            products["router"] = layer.mlp.router.dense, (count, d)
            products["experts' up"] = layer.mlp.up, (count, 2 * inner, d)
            products["experts' down"] = layer.mlp.down, (count, d, inner)
            yield f"layer {index} router's correction", layer.mlp.router.correction, (count,)
            yield f"layer {index} shared expert's gate", layer.mlp.shared_gate, (1, d)
        yield f"layer {index} sinks", attention.sinks, (spec.heads,)
        for name, (product, shape) in products.items():
            yield f"layer {index} {name}", product.weight, shape
            yield f"layer {index} {name} bias", product.bias, shape[:-1]
        norms = [
            (norm, d) for norm in (layer.attn_norm, layer.post_attn_norm, layer.mlp_norm, layer.post_mlp_norm)
        ]
        for norm, together in ((attention.q_norm, queries), (attention.k_norm, keys)):
            all_heads = norm is not None and len(norm.weight) == together
            norms.append((norm, together if all_heads else spec.head_dim))
        for norm, size in norms:
            if norm is not None:
                yield f"layer {index} norm", norm.weight, (size,)
                yield f"layer {index} norm bias", norm.bias, (size,)


def _nearest(path: str) -> str:
    """' (did you mean …)' from the names beside a missing folder, and the embedded model's."""
    folder = Path(path).expanduser()
    beside = [entry for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    names = {entry.name: str(entry) for entry in beside} | {embedded.NAME: embedded.NAME}
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""
