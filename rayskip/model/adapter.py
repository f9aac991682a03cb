"""LoRA adapters (arXiv 2106.09685), added to a checkpoint's weights as they are read: decoding costs nothing more.

Reads what peft saves: adapter_config.json and adapter_model.safetensors. Does not know training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rayskip.errors import ModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."
_KINDS = (".lora_A.weight", ".lora_B.weight")


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """(settings, weights) of the LoRA adapter in the folder. Raises ModelError when there is none."""
    if not folder.is_dir():
        raise ModelError(f"model.adapter: no folder {folder}")
    if missing := [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]:
        raise ModelError(f"model.adapter: {folder} has no {missing[0]}; a folder saved by peft is wanted")
    return folder / SETTINGS, folder / WEIGHTS


class Merged(Mapping[str, "torch.Tensor"]):
    """A checkpoint's tensors by name, with weight + alpha / rank * B @ A where the adapter has A and B.

    Raises ModelError when the folder holds no LoRA adapter or one for other tensors.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor], folder: Path, opened: ExitStack) -> None:
        from safetensors import safe_open

        settings_file, weights_file = adapter_files(folder)
        settings = json.loads(settings_file.read_text())
        self._scale = settings["lora_alpha"] / settings["r"]
        self._stored = stored
        self._file = opened.enter_context(safe_open(weights_file, framework="pt"))
        names = [name for name in self._file.keys() if name.endswith(_KINDS)]  # noqa: SIM118
        self._adapted = {
            name.removeprefix(_PREFIX).removesuffix(_KINDS[0]) + ".weight"
            for name in names
            if _KINDS[0] in name
        }
        unknown = sorted(self._adapted - set(stored))
        if unknown or len(names) != len(self._file.keys()) or not self._adapted:
            raise ModelError(
                f"model.adapter: {folder} does not fit the model: "
                + (f"the model has no {unknown[0]}" if unknown else "it is no plain LoRA adapter")
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        if name not in self._adapted:
            return tensor
        module = _PREFIX + name.removesuffix(".weight")
        a, b = (self._file.get_tensor(module + kind).to(tensor.device).float() for kind in _KINDS)
        merged: torch.Tensor = tensor.float() + self._scale * b @ a
        return merged.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
