"""linear in plain torch: y = activation(x W^T + bias) + residual, W dense or low-bit."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ramify.reference._math import wide

if TYPE_CHECKING:
    from ramify.quant import QuantizedWeight

INT8_GROUP = 128
"""Inputs that share an activation scale in "int8-group" where the weight has no groups of its own."""


def linear(
    x: Tensor,
    weight: "Tensor | QuantizedWeight",
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    activations: str = "exact",
) -> Tensor:
    """A linear layer with its epilogue, in one rounding.

    x [..., K], weight [N, K], bias [N], residual [..., N]; activation None or "silu". A low-bit weight stands for what its
    `dequantize` returns; with `activations` "int8" or "int8-group" each row of x is rounded first (`quantize_rows`), in the
    weight's own order of inputs, with "bf16" each value of x is. Arithmetic runs in float32 or wider, and only the end result is
    rounded to x's dtype.
    Returns [..., N].
    """
    dtype = wide(x)
    rows = x
    if not isinstance(weight, Tensor):
        perm, group, weight = weight.perm, weight.format.group or INT8_GROUP, weight.dequantize()
        if activations == "bf16":
            rows = x.bfloat16()
        elif activations != "exact":
            if perm is not None:
                rows, weight = rows[..., perm.long()], weight[:, perm.long()]
            size = group if activations == "int8-group" else x.shape[-1]
            codes, scale = quantize_rows(rows, size)
            rows = codes.to(dtype) * scale.to(dtype).repeat_interleave(size, -1)[..., : x.shape[-1]]
    y = rows.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = functional.silu(y)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def quantize_rows(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows as int8 codes and float32 scales: x is about codes * scale.

    x [..., K]; one scale for every `group` inputs (the last group may be shorter), or one for the row. scale = largest
    magnitude / 127, codes = x / scale in float32, to nearest with ties to even, in -127..127. A group of zeros has scale 0 and
    codes 0; one that holds NaN or infinity has scale NaN and codes 0. Returns codes int8 [..., K], scale [..., groups].
    """
    K, x = x.shape[-1], x.float()
    size = group or K
    split = functional.pad(x, (0, -K % size)).unflatten(-1, (-1, size))
    top = split.abs().amax(-1)
    scale = torch.where(top.isfinite(), top / 127, torch.nan)
    codes = (split / scale[..., None]).round().clamp(-127, 127)
    codes = torch.where(scale[..., None] > 0, codes, 0).to(torch.int8)
    return codes.flatten(-2)[..., :K], scale
