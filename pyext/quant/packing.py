"""From the canonical low-bit weight to the bytes that the CPU kernels read: the "low bit" rows of csrc/common/layouts.h."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from ramify.memory import on_huge_pages
from ramify.quant.formats import BLOCK, Format
from ramify.quant.weight import QuantizedWeight

PANEL = 16
"""Features of a panel; the outputs are padded to two of them, with zeros."""

UNIT = 16
"""The inputs of int8 and fp8 are padded to a multiple of this, with zeros."""


def packed(weight: QuantizedWeight) -> Tensor:
    """The weight's bytes for the CPU kernels, uint8, flat; kept with the weight until one of its tensors is replaced or changed.

    A graph of torch.compile keeps the bytes that it was made with.
    """
    tensors = weight.codes, weight.scale, weight.zero
    compiling = torch.compiler.is_compiling()
    marks = None if compiling else [_mark(tensor) for tensor in tensors]
    if weight._packed is None or (not compiling and weight._packed[1] != marks):
        panels = pack_panels(weight.format, *tensors)
        real = not compiling and panels.device.type == "cpu" and not isinstance(panels, FakeTensor)
        weight._packed = tensors, marks, on_huge_pages(panels) if real else panels
    return weight._packed[2]


def packed_bytes(form: Format, N: int, K: int, scale_dtype: torch.dtype) -> int:
    """How many bytes `pack_panels` makes of a weight [N, K]."""
    groups = form.scale_shape(N, K)[1]
    codes = K // 2 if form.kind == "int4" else K + -K % UNIT
    return -(-N // (2 * PANEL)) * 2 * PANEL * (codes + groups * (scale_dtype.itemsize + 2 * form.zero_point))


def pack_panels(form: Format, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Tensors of a QuantizedWeight [N, K] -> uint8, flat: panels of 16 outputs, each group's codes, then its scales, then its zeros.

    Scales keep their dtype. A NaN code of fp8 becomes a NaN scale of its row's group, so that the kernel need not look for one.
    """
    rows = -codes.shape[0] % (2 * PANEL)
    if form.kind == "int4":
        parts = [_int4_codes(codes, form.group, rows)]
        parts += [_by_panel(per_group, rows) for per_group in (scale, zero) if per_group is not None]
        return torch.cat(parts, -1).flatten()
    if form.kind == "fp8":
        scale = _poisoned(codes, scale, form.group)
    columns = -codes.shape[1] % UNIT
    wide = functional.pad(codes.view(torch.uint8), (0, columns, 0, rows))
    panels = wide.reshape(-1, PANEL, wide.shape[1] // 4, 4).transpose(1, 2).reshape(-1, wide.shape[1] * PANEL)
    scales = _by_panel(scale, rows)
    size = (form.group or wide.shape[1]) * PANEL
    both = [part for g in range(scale.shape[1]) for part in (panels[:, g * size : (g + 1) * size], scales[:, g])]
    return torch.cat(both, 1).flatten()


def _int4_codes(codes: Tensor, group: int, rows: int) -> Tensor:
    """uint8 [N, K / 2] -> [panels, groups, 8 * group]: lines of 16 outputs x (4 inputs low, 4 inputs half a group later high)."""
    codes = functional.pad(codes, (0, 0, 0, rows))
    both = torch.stack([codes & 15, codes >> 4], -1).view(-1, PANEL, 2 * codes.shape[1] // group, 2, group // 8, 4)
    lines = both[:, :, :, 0] | both[:, :, :, 1] << 4
    return lines.permute(0, 2, 3, 1, 4).reshape(-1, lines.shape[2], 8 * group)


def _by_panel(per_group: Tensor, rows: int) -> Tensor:
    """[N, groups] of 2 or 4 bytes each -> uint8 [panels, groups, bytes of 16 outputs]."""
    per_group = functional.pad(per_group, (0, 0, 0, rows))
    return per_group.reshape(-1, PANEL, per_group.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def _poisoned(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """One scale for each row and group of fp8 codes, NaN where a code of it is."""
    nan = (codes.view(torch.uint8) & 127) == 127
    if not group:
        return scale.masked_fill(nan.any(1, keepdim=True), torch.nan)
    scale = scale.repeat_interleave(BLOCK, 0)[: len(codes)]
    nan = functional.pad(nan, (0, -nan.shape[1] % BLOCK)).view(len(codes), -1, BLOCK).any(-1)
    return scale.masked_fill(nan, torch.nan)


def _mark(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Unequal once a tensor that still exists is replaced or changed in place; always for one of inference mode, which counts none."""
    if tensor is None:
        return None
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    return id(tensor), address, object() if tensor.is_inference() else tensor._version
