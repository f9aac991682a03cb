"""How quantised weights are stored, by what a checkpoint's config.json says of it, and what they are dequantised.

METHODS has a reader for each quant_method. What settings say beyond what their reader honours is a NotHonouredError
that names it. Knows neither files nor names of models' parts; reading settings loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rayskip.errors import ModelError, shown
from rayskip.model.files import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

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


class NotHonouredError(Exception):
    """What of a checkpoint's settings no reader honours."""


def _check_settings(settings: Mapping[str, Any], honoured: Mapping[str, Any]) -> None:
    """honoured: ANY, or the values that are honoured beside unset ones, by key."""
    for key, value in settings.items():
        known = honoured.get(key, ())
        if known is not ANY and value not in UNSET and value not in known:
            wanted = f"; {' or '.join(map(str, known))} is honoured" if known else ", which is not honoured"
            raise NotHonouredError(f"{key} {shown(value)}{wanted}")


def _size(settings: Mapping[str, Any], key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise NotHonouredError(f"{key} {shown(value)}; a whole number from 1 is wanted")
    return value


def _blocks(settings: Mapping[str, Any], key: str, value: Any) -> Block:
    if not isinstance(value, list) or len(value) != 2:
        raise NotHonouredError(f"{key} {shown(value)}; two whole numbers are wanted")
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
        raise NotHonouredError(f"format {shown(settings.get('format'))}; {', '.join(stored)} are honoured")
    weights = _ct_weights(settings)
    return stored[settings["format"]](weights, _ct_block(weights))


def _ct_weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config_groups say of weights, which must be the same of all: no group's targets are looked at."""
    groups = settings.get("config_groups")
    each = list(groups.values()) if isinstance(groups, dict) else []
    if not each or not all(
        isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in each
    ):
        raise NotHonouredError(
            f"config_groups {shown(groups)}; groups that say how weights are stored are wanted"
        )
    for group in each:
        _check_settings(
            group, {"targets": ANY, "weights": ANY, "input_activations": ANY, "format": (settings["format"],)}
        )
    kept = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure"}
    same = [{key: group["weights"].get(key) for key in kept} for group in each]
    if any(weights != same[0] for weights in same):
        raise NotHonouredError("config_groups that store weights in several ways")
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
    raise NotHonouredError(
        f"strategy {shown(weights['strategy'])}; tensor, channel, group or block is honoured"
    )


def _ct_float(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("float",), "num_bits": (8,)})
    if not weights["symmetric"]:
        raise NotHonouredError("symmetric false for floats")
    return _scaled("FP8", "F8_E4M3", ".weight_scale", block)


def _ct_int(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("int",), "num_bits": (8,)})
    return _scaled("INT8", "I8", ".weight_scale", block, zero_points=not weights["symmetric"])


def _ct_packed(weights: Mapping[str, Any], block: Block) -> Scheme:
    _check_settings(weights, dict.fromkeys(weights, ANY) | {"type": ("int",), "num_bits": (4, 8)})
    if weights["strategy"] not in ("channel", "group"):
        raise NotHonouredError(f"strategy {weights['strategy']} for packed weights")
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


# GPTQ and AWQ: values packed by columns of [in, out], zero points and scales of [groups, out].


CALIBRATION = dict.fromkeys(
    (
        "act_group_aware", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent", "dataset",
        "desc_act", "disable_exllama", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head",
        "max_input_length", "meta", "method", "model_file_base_name", "model_name_or_path", "model_seqlen",
        "modules_in_block_to_quantize", "modules_to_fuse", "modules_to_not_convert",
        "module_name_preceding_first_block", "offload_to_disk", "pad_token_id", "quant_method", "quantizer",
        "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "zero_point",
    ),
    ANY,
)  # fmt: skip
"""Settings of a GPTQ or AWQ checkpoint that say how it was made, or how another library is to run it."""


def _gptq(settings: Mapping[str, Any]) -> Scheme:
    honoured = {"bits": (4, 8), "group_size": ANY, "pack_dtype": ("int32",), "backend": ANY}
    formats = ("gptq", "gptq_v2")
    _check_settings(settings, {**CALIBRATION, **honoured, "checkpoint_format": formats, "format": formats})
    said = {settings.get(key) for key in ("checkpoint_format", "format")} - {None}
    if len(said) > 1:
        raise NotHonouredError(f"checkpoint_format {settings['checkpoint_format']} and another format")
    bits = _size(settings, "bits", settings.get("bits"))
    group = _group(settings, settings.get("group_size"))
    parts = {".qweight": INT32, ".qzeros": INT32, ".scales": FLOATS, ".g_idx": INT32}
    shape = partial(_gptq_shape, bits, group)
    return Scheme(f"GPTQ INT{bits}", parts, shape, partial(_unpack_gptq, bits, "gptq_v2" not in said))


def _group(settings: Mapping[str, Any], size: Any) -> int | None:
    """Values of a row that share a scale; None for all of them."""
    return None if size == -1 else _size(settings, "group_size", size)


def _gptq_shape(
    bits: int, group: int | None, weight: Shape, zeros: Shape, scales: Shape, groups_of: Shape
) -> Shape | None:
    each = 32 // bits
    shape = weight[1], weight[0] * each
    groups = _grid(shape, (None, group))[1]
    fits = scales == (groups, shape[0]) and groups_of == shape[1:]
    return shape if fits and zeros == (groups, shape[0] // each) and shape[0] % each == 0 else None


def _unpack_gptq(
    bits: int, less_one: bool, weight: Tensor, zeros: Tensor, scales: Tensor, groups_of: Tensor
) -> Tensor:
    """groups_of: the group of each column, which calibration by importance (desc_act) mixes. less_one: zero points
    are stored less one, as the format's first version has them."""
    zero = _words_values(zeros, bits)  # [groups, out]
    if less_one:
        if int(zero.max()) == (1 << bits) - 1:
            raise ModelError(
                "model.path: GPTQ weights with zero points of 0, which libraries store differently in the "
                "format's first version; give a checkpoint of checkpoint_format gptq_v2, or floats"
            )
        zero = zero + 1
    groups = groups_of.long()
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise ModelError(
            f"model.path: GPTQ weights with a g_idx that names groups other than the {len(scales)} there"
        )
    values = _words_values(weight.T, bits)  # [out, in]
    return (values - zero.T[:, groups]) * scales.float().T[:, groups]


def _awq(settings: Mapping[str, Any]) -> Scheme:
    gemm = ("gemm", "GEMM")
    honoured = {
        "bits": (4,),
        "w_bit": (4,),
        "group_size": ANY,
        "q_group_size": ANY,
        "backend": ("auto", "autoawq"),
    }
    _check_settings(settings, {**CALIBRATION, **honoured, "version": gemm, "format": gemm})
    if settings.get("zero_point", True) is not True:
        raise NotHonouredError(f"zero_point {shown(settings['zero_point'])}; true is honoured")
    group = _group(settings, settings.get("group_size", settings.get("q_group_size")))
    parts = {".qweight": INT32, ".qzeros": INT32, ".scales": FLOATS}
    return Scheme("AWQ INT4", parts, partial(_awq_shape, group), partial(_unpack_awq, group))


AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight columns lies, in units of 4 bits."""


def _awq_shape(group: int | None, weight: Shape, zeros: Shape, scales: Shape) -> Shape | None:
    shape = weight[1] * len(AWQ_PLACES), weight[0]
    groups = _grid(shape, (None, group))[1]
    return shape if scales == (groups, shape[0]) and zeros == (groups, weight[1]) else None


def _unpack_awq(group: int | None, weight: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    def columns(words: Tensor) -> Tensor:
        each = _words_values(words, 4).view(*words.shape, len(AWQ_PLACES))
        return each[..., list(AWQ_PLACES)].flatten(-2).T

    return _dequantise(columns(weight), scales.T, columns(zeros), (1, group))


def _words_values(words: Tensor, bits: int) -> Tensor:
    """The values in words of 32 bits, lowest bits first: [..., n] to [..., n * 32 / bits]."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
"""By quant_method. What is not here is refused."""
