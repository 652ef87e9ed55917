"""GPTQ (Frantar et al. 2023): round one input after the other, and let the inputs still to come make up for the error.

What counts is the layer's output on calibration text. With X its inputs [tokens, K] and H = 2 X^T X, the error of a row is e H e^T;
the best correction of the later inputs for an error in one is a row of the Cholesky factor of H's inverse.
"""

import torch
from torch import Tensor

from ramify.checks import show
from ramify.quant import grid
from ramify.quant.formats import BLOCK, Format
from ramify.quant.weight import QuantizedWeight

COLUMNS = 128
"""Inputs whose corrections are applied at once; a multiple of every group."""


def quantize(w: Tensor, format: Format, hessian: Tensor | None = None, act_order: bool = True, damp: float = 0.01) -> QuantizedWeight:
    """w f32 [N, K] in any format, with the least error on inputs whose H f32 [K, K] is `hessian` (any multiple of it does).

    act_order: inputs with the largest diagonal of H first, which also share groups; int4 then has a perm. Whole rows need none, and
    square blocks keep the inputs' own order.
    damp: share of the mean diagonal that is added to it. An input that calibration never used keeps its weights, rounded to nearest.
    Raises ValueError without a Hessian, for one of another shape, and for one that is not finite.
    """
    N, K = w.shape
    if hessian is None:
        raise ValueError('quantize_weight: hessian is None; method "gptq" takes 2 X^T X of calibration inputs. Or take method "rtn".')
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        raise TypeError(f"quantize_weight: hessian is {show(hessian)}; takes a float tensor [{K}, {K}].")
    if tuple(hessian.shape) != (K, K) or not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"quantize_weight: hessian is {list(hessian.shape)}; takes [{K}, {K}] of finite numbers.")
    hessian, perm = hessian.to(w.device, torch.float32), None
    if act_order and (format.kind == "int4" or not format.group):
        perm = hessian.diagonal().argsort(descending=True, stable=True)
        w, hessian = w[:, perm], hessian[perm][:, perm]
    dtype = grid.scale_dtype(w, format)
    q, scale, zero = _rounded(w, format, _inverse_factor(hessian, damp), dtype)
    if perm is not None and not format.group:
        q, perm = torch.empty_like(q).index_copy_(1, perm, q), None
    return grid.packed(q, scale, zero, format, None if perm is None else perm.int())


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper U with U^T U = (H + damp mean(diag H))^-1; damp grows tenfold while H is not positive in float32."""
    mean = float(hessian.diagonal().mean()) or 1.0
    for _ in range(6):
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp *= 10
    raise ValueError("quantize_weight: hessian is not positive semidefinite; takes 2 X^T X of calibration inputs.")


def _rounded(w: Tensor, format: Format, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K], scales, zeros. Works on the transpose, so that an input's weights lie together."""
    N, K = w.shape
    left = w.t().clone(memory_format=torch.contiguous_format)  # the weights, corrected so far
    q = torch.empty_like(left)
    group = format.group or K
    found = [] if format.group else [grid.fit(w, format, dtype)]
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        errors = left.new_empty(end - start, N)
        for k in range(start, end):
            if format.group and k % group == 0:
                found.append(grid.fit(left[k : k + group].t(), format, dtype))
            if k % group == 0:
                scale, zero = found[-1]
                s, z = _by_row(scale, format, N), None if zero is None else _by_row(zero, format, N)
            q[k] = grid.codes(left[k], s, z, format)
            errors[k - start] = (left[k] - grid.values(q[k], s, z, format)) / upper[k, k]
            left[k + 1 : end] -= upper[k, k + 1 : end, None] * errors[k - start]
        left[end:] -= upper[start:end, end:].t() @ errors
    zeros = [zero for _, zero in found if zero is not None]
    return q.t().contiguous(), torch.cat([scale for scale, _ in found], 1), torch.cat(zeros, 1) if zeros else None


def _by_row(parameter: Tensor, format: Format, N: int) -> Tensor:
    """One group's scale or zero as float32 [N]."""
    parameter = parameter.float()[:, 0]
    return parameter.repeat_interleave(BLOCK)[:N] if format.kind == "fp8" and format.group else parameter
