"""GPT-OSS: experts with a clamped gate, attention sinks, windows on every other layer, biases everywhere.

Its experts are stored as bfloat16 or as MXFP4, which is read as the bfloat16 that it stands for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rayskip.model.families import llama
from rayskip.model.families.parts import Tensors, router
from rayskip.model.spec import Attention, ClampedSwiGLU, Dense, Experts, Family, Spec, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rayskip.model.config import Config

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Numbers of three bits: two of exponent, one of mantissa. A fourth is the sign."""
SCALE_BIAS = 127


def spec(config: Config) -> Spec:
    return replace(llama.spec(config), attn_sinks=True)


def weights(config: Config, spec: Spec, named: Tensors) -> Weights:
    return llama.read(config, spec, named, _Layers)


class _Layers(llama.Layers):
    def attention(self, index: int, window: int | None, rope: str | None) -> Attention:
        own = super().attention(index, window, rope)
        return replace(own, sinks=self.named[f"layers.{index}.self_attn.sinks"].float())

    def mlp(self, index: int) -> Experts:
        return _experts(self.config, self.named, f"layers.{index}.mlp")


def _experts(config: Config, named: Tensors, at: str) -> Experts:
    up, down = (_product(named, f"{at}.experts.{part}_proj") for part in ("gate_up", "down"))
    return Experts(
        router(config, named.dense(f"{at}.router", bias=True)),
        Dense(_gates_first(up.weight), None if up.bias is None else _gates_first(up.bias)),
        down,
        ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit),
    )


def _product(named: Tensors, at: str) -> Dense:
    """Of all experts, [E, out, in]: stored the other way round, or as MXFP4."""
    if f"{at}_blocks" not in named:
        return Dense(named[at].transpose(1, 2), named[f"{at}_bias"])
    blocks, scales = named.as_stored(f"{at}_blocks"), named.as_stored(f"{at}_scales")
    return Dense(dequantised(blocks, scales, named.dtype), named[f"{at}_bias"])


def _gates_first(fused: Tensor) -> Tensor:
    """[E, (f, gate|up), …] as stored -> [E, (gate|up, f), …]."""
    import torch

    return torch.cat((fused[:, ::2], fused[:, 1::2]), dim=1)


def dequantised(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Of MXFP4 (OCP Microscaling Formats 1.0): blocks [E, out, G, 16], of bytes with two numbers each, the lower
    half's first; scales [E, out, G], of powers of two that a block's 32 numbers share -> [E, out, 32 G]."""
    import torch

    numbers = torch.tensor([sign * number for sign in (1, -1) for number in E2M1], device=blocks.device)

    def one(blocks: Tensor, scales: Tensor) -> Tensor:
        places = torch.stack((blocks & 15, blocks >> 4), dim=-1).int()  # [out, G, 16, 2]
        scaled = torch.ldexp(numbers[places].flatten(-2), scales.int().unsqueeze(-1) - SCALE_BIAS)
        return scaled.flatten(-2).to(dtype)

    return torch.stack(
        [one(*own) for own in zip(blocks, scales, strict=True)]
    )  # one by one: indices are large


FAMILY = Family(spec, weights, prefixes=("model.",), rotary=llama.rotary)
