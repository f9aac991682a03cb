"""The weights of a checkpoint of no family of ours, in transformers' modules. Code of a checkpoint never runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayskip.errors import ModelError, first_line
from rayskip.model.hosted.examine import hf_config, without_contents
from rayskip.model.hosted.facts import Facts, refused
from rayskip.model.hosted.modules import INTERFACE, Modules

BUFFERS = ("rotary_emb.inv_freq", ".bias", ".masked_bias")
"""Ends of names of what older checkpoints hold though it follows from the config."""


def check_tensors_fit(folder: Path, shapes: Mapping[str, Tensor]) -> None:
    """shapes: the checkpoint's tensors by name, on the device "meta".

    Raises ModelError where they are not those of a model as config.json describes it.
    """
    _filled(folder, torch.device("meta"), state_dict=dict(shapes))


def load_modules(
    folder: Path, facts: Facts, dtype: torch.dtype, device: torch.device, merged: Mapping[str, Tensor] | None
) -> Modules:
    """The decoder with its weights, in `dtype` on `device`. merged: its tensors where they are not as they lie in
    the folder.

    Raises ModelError where something does not fit.
    """
    given = {} if merged is None else {"state_dict": dict(merged)}
    model = _filled(folder, device, dtype=dtype, **given)
    try:
        return Modules(model.eval().requires_grad_(False), facts.windows)
    except ModelError as error:
        raise refused(folder, error) from error


def _filled(folder: Path, device: torch.device, **given: Any) -> Any:
    """The model of the folder's config with all of its tensors, on a device. Raises ModelError."""
    config = hf_config(folder)
    kind = type(without_contents(config))
    try:
        model, said = kind.from_pretrained(
            None if "state_dict" in given else folder,
            config=config,
            attn_implementation=INTERFACE,
            device_map={"": device},
            ignore_mismatched_sizes=True,  # they are told below
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    except (RuntimeError, ValueError, KeyError) as error:  # of tensors that cannot even be put together
        raise ModelError(f"{folder}: its tensors do not fit each other ({first_line(error)})") from error
    for name, found, shape in sorted(said["mismatched_keys"]):
        raise ModelError(f"{folder}: {name} is {tuple(found)}, but config.json says {tuple(shape)}")
    if missing := sorted(said["missing_keys"]):
        raise ModelError(f"model.path: {folder}: the checkpoint has no tensor {missing[0]!r}")
    for name in sorted(said["unexpected_keys"]):
        if not name.endswith(BUFFERS):
            raise ModelError(
                f"model.path: {folder}: the checkpoint has {name}, for which there is no place in a model as "
                "config.json describes it"
            )
    return model
