"""LoRA adapters (arXiv 2106.09685), added to a checkpoint's weights as they are read: decoding costs nothing more.

Reads what peft saves: adapter_config.json and adapter_model.safetensors. What is more than B @ A times a scale is
refused by name. Does not know training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError, shown
from rayskip.model.files import FLOATS, Header, find_key, read_headers, read_json, short_name

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."
_KINDS = (".lora_A.weight", ".lora_B.weight")

PLAIN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
})  # fmt: skip
"""Settings that are read here, or that say how an adapter is trained or where it goes, as its tensors' names do."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Of init_lora_weights: the others (pissa, olora, corda, loftq, ...) change the base model's weights too."""


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """(settings, weights) of the LoRA adapter in the folder. Raises ModelError when there is none."""
    if not folder.is_dir():
        raise ModelError(f"model.adapter: no folder {folder}")
    if missing := [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]:
        raise ModelError(f"model.adapter: {folder} has no {missing[0]}; a folder saved by peft is wanted")
    return folder / SETTINGS, folder / WEIGHTS


@dataclass(frozen=True)
class Pair:
    """The low-rank product of one linear layer, scale * B @ A. a, b: names of A [r, in] and B [out, r]."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as its settings and its header tell it. pairs: by the short name of the weight."""

    file: Path
    headers: Mapping[str, Header]
    pairs: Mapping[str, Pair]


def read_adapter(folder: Path, prefixes: tuple[str, ...]) -> Adapter:
    """Look at the adapter in the folder; reads no tensor. prefixes: those of the model's family.

    Raises ModelError when the folder holds none, a damaged one, or one that is more than a plain LoRA adapter.
    """
    settings_file, file = adapter_files(folder)
    settings = read_json(settings_file)
    _check_settings(settings_file, settings)
    headers = read_headers([file])
    pairs: dict[str, Pair] = {}
    for name, header in headers.items():
        kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
        module = name.removesuffix(kind or "")
        a, b = (module + kind for kind in _KINDS)
        if kind is None or header.dtype not in FLOATS:
            raise ModelError(
                f"model.adapter: {file} is no plain LoRA adapter: it has {name} ({header.dtype})"
            )
        if a not in headers or b not in headers:
            raise ModelError(f"model.adapter: {file} has {name} without the other of lora_A and lora_B")
        inner = module.removeprefix(_PREFIX)
        rank = _of_module(settings_file, settings, "rank_pattern", inner, settings.get("r"))
        alpha = _of_module(settings_file, settings, "alpha_pattern", inner, settings.get("lora_alpha"))
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ModelError(
                f"model.adapter: {settings_file} gives {inner} the rank (r, rank_pattern) {shown(rank)} and the "
                f"alpha (lora_alpha, alpha_pattern) {shown(alpha)}; numbers are wanted"
            )
        if headers[a].shape[:1] != (rank,) or headers[b].shape[1:] != (rank,):
            raise ModelError(
                f"model.adapter: {file} has {a} {list(headers[a].shape)} and {b} {list(headers[b].shape)}, but "
                f"{SETTINGS} says rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        target = f"{short_name(inner, prefixes)}.weight"
        if pairs.setdefault(target, Pair(a, b, scale)).a != a:
            raise ModelError(f"model.adapter: {file} has {target} under two names, {a} and {pairs[target].a}")
    if not pairs:
        raise ModelError(f"model.adapter: {file} has no tensors")
    return Adapter(file, headers, pairs)


def check_fit(adapter: Adapter, model: Mapping[str, Header], prefixes: tuple[str, ...]) -> None:
    """Refuse an adapter whose products are not of the shapes of the model's weights. Raises ModelError."""
    short = {short_name(name, prefixes): header for name, header in model.items()}
    for name, pair in adapter.pairs.items():
        if name not in short:
            raise ModelError(
                f"model.adapter: {adapter.file} does not fit the model: it has {pair.a}, the model has no {name}"
            )
        a, b = adapter.headers[pair.a].shape, adapter.headers[pair.b].shape
        if (b[0], *a[1:]) != short[name].shape:
            raise ModelError(
                f"model.adapter: {adapter.file} does not fit the model: {pair.b} {list(b)} times "
                f"{pair.a} {list(a)} is no {list(short[name].shape)}, which {name} is"
            )


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if find_key(settings, ["auto_map"]):
        raise ModelError(f"model.adapter: {file} names custom code (auto_map); rayskip runs none")
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"model.adapter: {file} has peft_type {shown(settings.get('peft_type'))}; LORA is wanted"
        )
    more = [key for key, value in settings.items() if value and key not in PLAIN]
    if (bias := settings.get("bias", "none")) != "none":
        more.append(f"bias: {shown(bias)}")
    if (start := settings.get("init_lora_weights")) not in PLAIN_STARTS:
        more.append(f"init_lora_weights: {shown(start)}")
    if more:
        raise ModelError(
            f"model.adapter: {file} is more than a plain LoRA adapter ({', '.join(more)}); merge it into its model "
            "with peft (merge_and_unload) and name that in model.path"
        )


def _of_module(file: Path, settings: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """What a module gets by the first pattern that its name, or its end after a dot, matches whole."""
    patterns = settings.get(key) or {}
    try:
        return next(
            (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), default
        )
    except (re.error, AttributeError) as error:
        raise ModelError(f"model.adapter: {file}: {key} is not readable ({error})") from error


class Merged(Mapping[str, "torch.Tensor"]):
    """A checkpoint's tensors by name, with weight + scale * B @ A where the adapter, which fits, has A and B."""

    def __init__(
        self,
        stored: Mapping[str, torch.Tensor],
        adapter: Adapter,
        prefixes: tuple[str, ...],
        opened: ExitStack,
    ) -> None:
        from safetensors import safe_open

        self._stored = stored
        self._pairs = adapter.pairs
        self._prefixes = prefixes
        self._file = opened.enter_context(safe_open(adapter.file, framework="pt"))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        pair = self._pairs.get(short_name(name, self._prefixes))
        if pair is None:
            return tensor
        a, b = (self._file.get_tensor(part).to(tensor.device).float() for part in (pair.a, pair.b))
        merged: torch.Tensor = tensor.float() + b @ a * pair.scale
        return merged.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
