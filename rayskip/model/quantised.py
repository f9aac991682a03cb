"""Quantised checkpoints read as floating-point ones: a weight is dequantised when it is asked for.

METHODS has a reader for each quant_method of config.json; what a checkpoint says beyond what its reader honours is
refused by name. Only weights are meant: activations that a checkpoint would have quantised too stay in the job's
dtype. Knows no family. Looking at configs and headers loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError, shown
from rayskip.model.files import FLOATS, Header, find_key, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WANTED = "give the checkpoint in bfloat16, float16 or float32"

KEYS = ("quantization_config", "compression_config")
"""Of config.json, at any depth."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of a weight, by a job's dtype."""

Shape = tuple[int, ...]
Block = tuple[int | None, int | None]
"""Rows and columns of a weight that share a scale; None for all of them."""

INT32 = frozenset({"I32"})
ANY = object()
"""Of a setting: it says how the weights were quantised, not how they are stored."""

UNSET: tuple[Any, ...] = (None, False, {}, [])
ACTIVATION_SCALES = (".input_scale", ".input_zero_point", ".output_scale", ".activation_scale")


@dataclass(frozen=True)
class Scheme:
    """How the quantised weights of a checkpoint are stored.

    name: for messages. parts: of a weight, the types that safetensors may have it in, by the end of its name; the
    first tells a quantised weight from others. unused: ends of names of what else it may have, that a weight does
    not depend on. shape: the weight's [out, in] from the shapes of its parts, or None where they do not fit each
    other. unpack: the weight in float32 from its parts.
    """

    name: str
    parts: Mapping[str, frozenset[str]]
    shape: Callable[..., Shape | None]
    unpack: Callable[..., Tensor]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised(Header):
    """A weight as its scheme will give it. parts: names of the tensors that it is made of."""

    scheme: Scheme
    parts: tuple[str, ...]


class Dequantised(Mapping[str, "Tensor"]):
    """A checkpoint's tensors by name, in `dtype`, each dequantised when it is asked for. stored: the tensors as the
    files have them. headers: what `dequantised_headers` makes of theirs."""

    def __init__(
        self, stored: Mapping[str, Tensor], headers: Mapping[str, Header], dtype: torch.dtype
    ) -> None:
        self._stored = stored
        self._headers = headers
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        header = self._headers[name]
        if isinstance(header, Quantised):
            tensor = header.scheme.unpack(*(self._stored[part] for part in header.parts))
        else:
            tensor = self._stored[name]
        return tensor.to(self._dtype)

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
    try:
        if not isinstance(method, str) or method not in METHODS:
            raise _NotHonouredError(
                f"quant_method {shown(method)}; {', '.join(METHODS)} are known and dequantised"
            )
        return METHODS[method](settings)
    except _NotHonouredError as problem:
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


def note(headers: Mapping[str, Header], dtype: str) -> str | None:
    """What is to be said of a checkpoint that is dequantised; None for any other. headers: dequantised ones."""
    scheme = next((header.scheme for header in headers.values() if isinstance(header, Quantised)), None)
    if scheme is None:
        return None
    size = sum(math.prod(header.shape) for header in headers.values()) * BYTES[dtype]
    return f"dequantised from {scheme.name} to {dtype} ({size / 1e9:.1f} GB)"


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


class _NotHonouredError(Exception):
    """What of the settings no reader honours."""


def _check_settings(settings: Mapping[str, Any], honoured: Mapping[str, Any]) -> None:
    """honoured: ANY, or the values that are honoured beside unset ones, by key."""
    for key, value in settings.items():
        known = honoured.get(key, ())
        if known is not ANY and value not in UNSET and value not in known:
            wanted = f"; {' or '.join(map(str, known))} is honoured" if known else ", which is not honoured"
            raise _NotHonouredError(f"{key} {shown(value)}{wanted}")


def _size(settings: Mapping[str, Any], key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _NotHonouredError(f"{key} {shown(value)}; a whole number from 1 is wanted")
    return value


def _blocks(settings: Mapping[str, Any], key: str, value: Any) -> Block:
    if not isinstance(value, list) or len(value) != 2:
        raise _NotHonouredError(f"{key} {shown(value)}; two whole numbers are wanted")
    return _size(settings, key, value[0]), _size(settings, key, value[1])


# FP8 and INT8: a weight of one byte a value, and its scales.


def _fp8(settings: Mapping[str, Any]) -> Scheme:
    honoured = {
        "quant_method": ANY,
        "activation_scheme": ANY,
        "modules_to_not_convert": ANY,
        "fmt": ("e4m3",),
    }
    _check_settings(settings, {**honoured, "weight_block_size": ANY, "dequantize": ANY})
    size = settings.get("weight_block_size", [128, 128])
    block: Block = (None, None) if size is None else _blocks(settings, "weight_block_size", size)
    return _scaled("FP8", "F8_E4M3", ".weight_scale_inv", block)


def _scaled(name: str, dtype: str, scale: str, block: Block, zero_points: bool = False) -> Scheme:
    parts = {".weight": frozenset({dtype}), scale: FLOATS}
    if zero_points:
        parts[".weight_zero_point"] = frozenset({dtype})
    return Scheme(
        name, parts, partial(_scaled_shape, block), partial(_unpack_scaled, block), ACTIVATION_SCALES
    )


def _scaled_shape(block: Block, weight: Shape, *scales: Shape) -> Shape | None:
    grid = _grid(weight, block)
    fits = all(scale == grid or (grid == (1, 1) and scale in ((), (1,))) for scale in scales)
    return weight if fits else None


def _unpack_scaled(block: Block, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    return _dequantise(weight, scale, zero_point, block)


def _grid(shape: Shape, block: Block) -> Shape:
    """How many scales a weight has down and across."""
    return tuple(1 if size is None else -(-of // size) for of, size in zip(shape, block, strict=True))


def _dequantise(values: Tensor, scale: Tensor, zero_point: Tensor | None, block: Block) -> Tensor:
    """(values - zero point) * scale, where each block of the values has its own."""
    rows, columns = values.shape
    down, across = _grid((rows, columns), block)

    def spread(each: Tensor) -> Tensor:
        each = each.float().reshape(down, across)
        each = each if down == 1 else each.repeat_interleave(block[0] or rows, 0)[:rows]
        return each if across == 1 else each.repeat_interleave(block[1] or columns, 1)[:, :columns]

    whole = values.float()
    if zero_point is not None:
        whole = whole - spread(zero_point)
    return whole * spread(scale)


# compressed-tensors: the same, and weights of 4 or 8 bits packed into words of 32.


def _compressed_tensors(settings: Mapping[str, Any]) -> Scheme:
    stored: dict[Any, Callable[[Mapping[str, Any], Block], Scheme]] = {
        "float-quantized": _ct_float,
        "int-quantized": _ct_int,
        "pack-quantized": _ct_packed,
    }
    honoured = {"quant_method": ANY, "config_groups": ANY, "global_compression_ratio": ANY, "ignore": ANY}
    honoured |= {"format": tuple(stored), "quantization_status": ("compressed",), "version": ANY}
    _check_settings(settings, {**honoured, "sparsity_config": ({"format": "dense"},)})
    if settings.get("format") not in stored:
        raise _NotHonouredError(f"format {shown(settings.get('format'))}; {', '.join(stored)} are honoured")
    weights = _ct_weights(settings)
    return stored[settings["format"]](weights, _ct_block(weights))


def _ct_weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config_groups say of weights, which must be the same of all: no group's targets are looked at."""
    groups = settings.get("config_groups")
    each = list(groups.values()) if isinstance(groups, dict) else []
    if not each or not all(
        isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in each
    ):
        raise _NotHonouredError(
            f"config_groups {shown(groups)}; groups that say how weights are stored are wanted"
        )
    for group in each:
        _check_settings(
            group, {"targets": ANY, "weights": ANY, "input_activations": ANY, "format": (settings["format"],)}
        )
    kept = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure"}
    same = [{key: group["weights"].get(key) for key in kept} for group in each]
    if any(weights != same[0] for weights in same):
        raise _NotHonouredError("config_groups that store weights in several ways")
    for group in each:
        honoured: dict[str, Any] = dict.fromkeys(kept, ANY) | {"actorder": ("weight", "static")}
        informative = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
        _check_settings(group["weights"], {**honoured, **dict.fromkeys(informative, ANY)})
    return same[0]


def _ct_block(weights: Mapping[str, Any]) -> Block:
    match weights["strategy"]:
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, _size(weights, "group_size", weights["group_size"])
        case "block":
            return _blocks(weights, "block_structure", weights["block_structure"])
    raise _NotHonouredError(
        f"strategy {shown(weights['strategy'])}; tensor, channel, group or block is honoured"
    )


def _ct_float(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("float",), "num_bits": (8,)})
    if not weights["symmetric"]:
        raise _NotHonouredError("symmetric false for floats")
    return _scaled("FP8", "F8_E4M3", ".weight_scale", block)


def _ct_int(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("int",), "num_bits": (8,)})
    return _scaled("INT8", "I8", ".weight_scale", block, zero_points=not weights["symmetric"])


def _ct_packed(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("int",), "num_bits": (4, 8)})
    if weights["strategy"] not in ("channel", "group"):
        raise _NotHonouredError(f"strategy {weights['strategy']} for packed weights")
    bits = _size(weights, "num_bits", weights["num_bits"])
    parts = {".weight_packed": INT32, ".weight_scale": FLOATS}
    if not weights["symmetric"]:
        parts[".weight_zero_point"] = INT32
    return Scheme(
        f"INT{bits}",
        parts,
        partial(_ct_packed_shape, bits, block),
        partial(_unpack_ct, bits, block),
        (*ACTIVATION_SCALES, ".weight_shape"),
    )


def _ct_packed_shape(bits: int, block: Block, packed: Shape, scale: Shape, *zero: Shape) -> Shape | None:
    shape = packed[0], packed[1] * (32 // bits)
    down, across = _grid(shape, block)
    fits = scale == (down, across) and all(each == (-(-down * bits // 32), across) for each in zero)
    return shape if fits else None


def _unpack_ct(bits: int, block: Block, packed: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Values and zero points are stored with half their range added; zero points are packed along the rows."""
    values = _words_values(packed, bits) - (1 << bits - 1)
    if zero is not None:
        zero = _words_values(zero.T, bits).T[: values.shape[0]] - (1 << bits - 1)
    return _dequantise(values, scale, zero, block)


def _words_values(words: Tensor, bits: int) -> Tensor:
    """The values in words of 32 bits, lowest bits first: [..., n] to [..., n * 32 / bits]."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
"""By quant_method. What is not here is refused."""
