"""From tensors to the argument structs of the CUDA linear layers, as in _cuda.py: their blocks, and the scratch in which these meet."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from ramify import native_cuda as n
from ramify.backends import invariant
from ramify.ops._cuda import Outputs, _rows, _store, _target
from ramify.quant.formats import BLOCK, Format

PANEL, WINDOW, ROWS, FEW_ROWS = 128, 512, 256, 32  # kLinearPanel, kLinearWindow, kLinearRows, kMostFewRows
VARIANT = "by rows"  # "few rows": one kernel for any number of them, so that a row's bits are its own
BLOCKS = 264
"""Blocks that share the inputs of all panels: two for each of the 132 processors of an H200, all at work at a time. A constant, so that
every chip shares alike and a row's bits are the same on all of them."""
_HELD = (torch.float32, torch.bfloat16, torch.float16)  # what a kernel reads of any tensor beside x


def linear(outs: Outputs, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    """activation(x W^T + bias) + residual over a dense weight of x's dtype, as it lies: torch's own, which is cuBLAS, but where a row's
    bits have to be its own, or a variant is asked for.
    """
    if x.is_cuda and not invariant() and VARIANT == "by rows":
        y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y = functional.silu(y) if activation == "silu" else y
        outs[0].copy_(y if residual is None else y + residual)
        return
    args = n.LinearArgs(N=weight.shape[0], kind=n.WEIGHTS["dense"], weight=weight.data_ptr(), lines=1)
    args.weight_stride = weight.stride(0) * weight.itemsize
    _run_linear(outs[0], args, x, bias, activation, residual, weight)


def linear_low_bit(
    outs: Outputs, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, perm: Tensor | None, panels: Tensor | None, form: str,
    bias: Tensor | None, activation: str | None, residual: Tensor | None, activations: str,
) -> None:  # fmt: skip
    """activation(x W^T + bias) + residual over a low-bit weight in its canonical form; x is not rounded."""
    f = Format.parse(form)
    args = n.LinearArgs(N=codes.shape[0], kind=n.WEIGHTS[f.kind], weight=codes.data_ptr(), weight_stride=codes.stride(0), group=f.group)
    args.scale, args.scale_type, args.scale_stride = scale.data_ptr(), n.TYPES[scale.dtype], scale.stride(0)
    args.lines = BLOCK if f.kind == "fp8" and f.group else 1
    if zero is not None:
        args.zero, args.zero_stride = zero.data_ptr(), zero.stride(0)
    if perm is not None:
        perm = perm.contiguous()
        args.perm = perm.data_ptr()
    _run_linear(outs[0], args, x, bias, activation, residual, codes, scale, zero, perm)


def scratch_of(M: int, N: int, K: int, variant: str) -> tuple[int, int]:
    """Floats of scratch and tickets of a linear layer: at most shares - 1 ends of a share cut panels, each into one part more.

    A kernel for many rows has panels of twice as many outputs and half as many shares, so panels are counted by two where it may run.
    """
    few = variant == "few rows" or (variant == "by rows" and M <= FEW_ROWS)
    tokens = next((most for most in (8, 16) if M <= most), FEW_ROWS) if few else 2 * FEW_ROWS  # rows of a block
    panels = -(-N // PANEL) if few else 2 * -(-N // (2 * PANEL))
    shares, rows = min(BLOCKS, panels * -(-K // WINDOW)), min(-(-M // tokens) * tokens, ROWS)
    cut = min(panels, shares - 1)
    return (cut + shares - 1) * PANEL * rows, cut * -(-rows // FEW_ROWS)


def _run_linear(
    out: Tensor, args: ctypes.Structure, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None,
    *weight: Tensor | None,
) -> None:  # fmt: skip
    """Launch a linear layer; `weight`: what the pointers of args name already."""
    rows, result = _rows(x), _target(out)
    (M, args.K), N = rows.shape, args.N
    args.rows, args.type, args.x, args.x_stride = M, n.TYPES[x.dtype], rows.data_ptr(), rows.stride(0)
    if bias is not None:
        bias = (bias if bias.dtype in _HELD else bias.float()).contiguous()
        args.bias, args.bias_type = bias.data_ptr(), n.TYPES[bias.dtype]
    if residual is not None:
        residual = _rows(residual if residual.dtype in _HELD else residual.float())
        args.residual, args.residual_type, args.residual_stride = residual.data_ptr(), n.TYPES[residual.dtype], residual.stride(0)
    args.silu, args.out, args.out_stride = activation == "silu", result.data_ptr(), result.stride(0)
    variant, scratch, tickets = "few rows" if invariant() else VARIANT, None, None
    args.variant, args.shares = n.VARIANTS[variant], BLOCKS
    floats, counters = scratch_of(M, N, args.K, variant)
    if floats:
        scratch, tickets = torch.empty(floats, dtype=torch.float32, device=x.device), n.tickets(x.device, counters)
        args.scratch, args.tickets = scratch.data_ptr(), tickets.data_ptr()
    n.run(args, rows, result, bias, residual, *weight, scratch, tickets)
    _store(result, out)
