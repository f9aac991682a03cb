"""Quantised checkpoints read as floating-point ones: a weight is dequantised when it is asked for.

Only weights are meant: activations that a checkpoint would have quantised too stay in the dtype of the job. Knows
no family, and no way of quantising: that is for `schemes`. Looking at configs and headers loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayskip.errors import ModelError, shown
from rayskip.model.files import Header, find_key, read_json
from rayskip.model.schemes import METHODS, NotHonouredError, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WANTED = "give the checkpoint in bfloat16, float16 or float32"

KEYS = ("quantization_config", "compression_config")
"""Of config.json, at any depth."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of a weight, by a job's dtype."""


@dataclass(frozen=True)
class Quantised(Header):
    """A weight as its scheme will give it. parts: names of the tensors that it is made of."""

    scheme: Scheme
    parts: tuple[str, ...]


class Dequantised(Mapping[str, "Tensor"]):
    """A checkpoint's tensors by name; the quantised ones in `dtype`, dequantised when they are asked for.

    stored: the tensors as the files have them. headers: what `dequantised_headers` makes of theirs.
    """

    def __init__(
        self, stored: Mapping[str, Tensor], headers: Mapping[str, Header], dtype: torch.dtype
    ) -> None:
        self._stored = stored
        self._headers = headers
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        header = self._headers[name]
        if isinstance(header, Quantised):
            return header.scheme.unpack(*(self._stored[part] for part in header.parts)).to(self._dtype)
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def read_scheme(folder: Path) -> Scheme | None:
    """How the folder's checkpoint is quantised by its config.json; None where that says nothing of it.

    Raises ModelError for a method that is not known, or settings that are not honoured.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") or None
    found = find_key({**config, "quantization_config": None}, KEYS)
    if found:  # another key, or a part's own
        raise ModelError(f"model.path: {folder} is quantised (config.json: {found[0]}); {WANTED}")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        return None  # its family reads it
    try:
        if not isinstance(method, str) or method not in METHODS:
            raise NotHonouredError(
                f"quant_method {shown(method)}; {', '.join(METHODS)} are known and dequantised"
            )
        return METHODS[method](settings)
    except NotHonouredError as problem:
        raise ModelError(
            f"model.path: {folder} is quantised (config.json: quantization_config has {problem}); {WANTED}"
        ) from problem


def dequantised_headers(folder: Path, headers: Mapping[str, Header]) -> dict[str, Header]:
    """The tensors of the folder's checkpoint once it is dequantised: `Quantised` weights for their parts, and all
    others as in `headers`.

    Raises ModelError where parts are missing or do not fit each other, and as `read_scheme` does.
    """
    scheme = read_scheme(folder)
    if scheme is None:
        return dict(headers)
    found = _quantised(scheme, headers)
    if not found:
        raise ModelError(
            f"model.path: {folder} is quantised by its config.json ({scheme.name}), and has no weight in that form"
        )
    modules = {name.removesuffix("weight") for name in found}
    used = {part for weight in found.values() for part in weight.parts}
    used |= {
        f"{module.removesuffix('.')}{end}" for module in modules for end in scheme.unused
    } & headers.keys()
    plain = {name: header for name, header in headers.items() if name not in used}
    if twice := next((name for name in found if name in plain), None):
        raise ModelError(f"model.path: {plain[twice].file} has {twice} twice, quantised and not")
    return plain | found


def note(headers: Mapping[str, Header], dtype: str, source: str | None) -> str | None:
    """What is to be said of a checkpoint that is dequantised; None for any other.

    headers: dequantised ones. source: what the whole checkpoint was made of before, if of a quantised one.
    """
    name = source or next(
        (each.scheme.name for each in headers.values() if isinstance(each, Quantised)), None
    )
    if name is None:
        return None
    size = sum(math.prod(header.shape) for header in headers.values()) * BYTES[dtype]
    return f"dequantised from {name} to {dtype} ({size / 1e9:.1f} GB)"


def _quantised(scheme: Scheme, headers: Mapping[str, Header]) -> dict[str, Quantised]:
    """The quantised weights by their names."""
    marker = next(iter(scheme.parts))
    found = {}
    for name, header in headers.items():
        if not name.endswith(marker) or header.dtype not in scheme.parts[marker]:
            continue
        module = name.removesuffix(marker)
        parts = tuple(module + end for end in scheme.parts)
        for part, types in zip(parts, scheme.parts.values(), strict=True):
            if part not in headers:
                raise ModelError(f"model.path: {header.file} has {name} ({scheme.name}) without {part}")
            if headers[part].dtype not in types:
                raise ModelError(
                    f"model.path: {headers[part].file}: {part} of a weight in {scheme.name} is of type "
                    f"{headers[part].dtype}; {' or '.join(sorted(types))} is wanted"
                )
        shapes = [headers[part].shape for part in parts]
        shape = scheme.shape(*shapes) if len(shapes[0]) == 2 else None
        if shape is None:
            told = ", ".join(f"{part} {list(own)}" for part, own in zip(parts, shapes, strict=True))
            raise ModelError(f"model.path: {header.file}: {told} do not fit each other as {scheme.name}")
        found[f"{module}.weight"] = Quantised(header.file, "BF16", shape, scheme, parts)
    return found
