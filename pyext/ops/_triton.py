"""From tensors to the Triton kernels of ramify.kernels.

The kernels take rows with a dense last axis; a layout that is no view of rows is copied here. Checked tensors only. Importing
this module imports triton, so nothing but the first launch does.
"""

import torch
from torch import Tensor

from ramify.kernels import glue

Outputs = tuple[Tensor, ...]


def rms_norm(outs: Outputs, x: Tensor, weight: Tensor, eps: float) -> None:
    """Normed rows into outs[0]."""
    out = _target(outs[0])
    glue.rms_norm(_rows(x), weight, None, out, None, eps)
    _store(out, outs[0])


def rms_norm_residual(outs: Outputs, x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> None:
    """Normed rows of x + residual into outs[0], the sum into outs[1]."""
    out, summed = map(_target, outs)
    glue.rms_norm(_rows(x), weight, _rows(residual), out, summed, eps)
    _store(out, outs[0])
    _store(summed, outs[1])


def rope(outs: Outputs, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """x [..., H, D] rotated into outs[0]."""
    heads, D = x.shape[-2:]
    out = _viewed(outs[0], (-1, heads, D))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    glue.rope(x.reshape(-1, heads, D), cos, sin, positions.reshape(-1), out)
    _store(out, outs[0])


def silu_mul(outs: Outputs, x: Tensor) -> None:
    """silu(gate) * up of rows that hold both."""
    out = _target(outs[0])
    glue.silu_mul(_rows(x), out)
    _store(out, outs[0])


def embed(outs: Outputs, ids: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """Rows of the table."""
    out = _target(outs[0])
    glue.embed(ids.reshape(-1), table, out)
    _store(out, outs[0])


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K]; a view where strides allow."""
    return x.reshape(-1, x.shape[-1])


def _target(out: Tensor) -> Tensor:
    """Rows [M, N] for a kernel to write: a view of `out` where there is one, else a buffer."""
    return _viewed(out, (-1, out.shape[-1]))


def _viewed(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return out.view(shape)
    except RuntimeError:  # its strides allow no such view
        return torch.empty_like(out, memory_format=torch.contiguous_format).view(shape)


def _store(rows: Tensor, out: Tensor) -> None:
    """What a kernel wrote into the buffer of `_target(out)` is in `out` afterwards."""
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
