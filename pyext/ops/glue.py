"""rms_norm, rope, silu_mul and embed: what a layer does between its matrix products and attention."""

import math

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import number, show
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INDICES, Results, Shapes, tensor
from ramify.ops._library import Op

_F32 = (torch.float32,)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; with `residual`, of x + residual, which is returned as well.

    x, residual [..., H] of one float dtype; weight [H], any float dtype. Returns [..., H] in x's dtype; with `residual` the
    pair (normed, x + residual), the sum rounded to x's dtype before it is normed. `out` takes the same, a pair for a pair.
    Raises ValueError for shapes, TypeError for dtypes. Source: arXiv 1910.07467.
    """
    if type(eps) is not float:
        eps = float(number("eps", eps, "rms_norm"))
    if residual is None:
        return _rms_norm(x, weight, eps, out=out)
    return _rms_norm_residual(x, weight, residual, eps, out=out)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotate every head by the position of its row: feature i pairs with feature i + R/2, where R = 2 * cos.shape[1].

    x [..., H, D] float; cos, sin [P, R/2] float32, R at most D; positions [...] int32 or int64, one per row, below P.
    Features from R on pass unchanged. Returns [..., H, D] in x's dtype. Raises ValueError for shapes and for a position
    outside the tables, TypeError for dtypes. Source: arXiv 2104.09864, half-rotation form.
    """
    return _rope(x, cos, sin, positions, out=out)


def silu_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last axis and up the second.

    x [..., 2F] float, as one fused gate-and-up product leaves it. Returns [..., F] in x's dtype. Raises ValueError for an
    odd last axis, TypeError for dtypes. Source: arXiv 2002.05202.
    """
    return _silu_mul(x, out=out)


def embed(ids: Tensor, table: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Rows of a table: out[...] = table[ids[...]].

    ids [...] int32 or int64, each in 0 .. V-1; table [V, H] float. Returns [..., H] in `dtype`, the table's own by default.
    Raises ValueError for shapes and, on the CPU, for an id outside the table; TypeError for dtypes.
    """
    wanted = tensor("embed", "table", table).dtype if dtype is None else dtype
    if not isinstance(wanted, torch.dtype):
        raise TypeError(f"embed: dtype is {show(wanted)}; takes a torch.dtype.")
    return _embed(ids, table, wanted, out=out)


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Results:
    check = Shapes("rms_norm")
    check("x", x, "... H", FLOATS)
    check("weight", weight, "H", FLOATS)
    if not 0 <= eps < math.inf:
        raise check.fail(f"eps is {eps}", "a finite number of 0 or more")
    if residual is None:
        return ((x.shape, x.dtype),)
    check("residual", residual, "... H", FLOATS)
    check.same_shape("residual", residual, "x", x.shape)
    check.same_dtype("residual", residual, "x", x.dtype)
    return ((x.shape, x.dtype), (x.shape, x.dtype))


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Results:
    check = Shapes("rope")
    check("x", x, "... H D", FLOATS)
    check("cos", cos, "P R/2", _F32)
    check("sin", sin, "P R/2", _F32)
    check("positions", positions, "...", INDICES, dense=False)
    check.same_shape("positions", positions, "x without its last two axes", x.shape[:-2])
    if cos.shape[0] == 0:
        raise check.fail(f"cos is {list(cos.shape)}", "one position or more")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise check.fail(f"cos has {cos.shape[1]} columns", f"at most D/2 = {x.shape[-1] // 2}")
    return ((x.shape, x.dtype),)


def _check_silu_mul(x: Tensor) -> Results:
    check = Shapes("silu_mul")
    check("x", x, "... 2F", FLOATS)
    if x.shape[-1] % 2:
        raise check.fail(f"x is {list(x.shape)}", "an even last axis, gate and up side by side", "Use torch.cat([gate, up], -1).")
    return (((*x.shape[:-1], x.shape[-1] // 2), x.dtype),)


def _check_embed(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Results:
    check = Shapes("embed")
    check("ids", ids, "...", INDICES, dense=False)
    check("table", table, "V H", FLOATS)
    check.dtype("dtype", dtype, FLOATS)
    return (((*ids.shape, table.shape[1]), dtype),)


def _check_rope_values(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    _in_range("rope", "positions", positions, cos.shape[0], "cos")


def _check_embed_values(ids: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    _in_range("embed", "ids", ids, table.shape[0], "table")


def _in_range(op: str, name: str, index: Tensor, stop: int, of: str) -> None:
    """Indices, one at least, lie in 0 .. stop - 1."""
    low, high = (int(t) for t in index.aminmax())
    if low < 0 or high >= stop:
        raise ValueError(f"{op}: {name} holds {low if low < 0 else high}; takes 0 to {stop - 1}, the rows of {of}.")


_rms_norm = Op(
    "rms_norm",
    "Tensor x, Tensor weight, float eps",
    ["out"],
    check=_check_rms_norm,
    sizes=lambda x, weight, eps: {"dtype": x.dtype, "weight": weight.dtype, "H": x.shape[-1]},
    reference=lambda x, weight, eps: (reference.rms_norm(x, weight, eps=eps),),
    cpu=lambda outs, x, weight, eps: _native.rms_norm(outs, x, weight, None, eps),
    cuda=lambda outs, x, weight, eps: _cuda.rms_norm(outs, x, weight, None, eps),
    triton="rms_norm",
)
_rms_norm_residual = Op(
    "rms_norm.residual",
    "Tensor x, Tensor weight, Tensor residual, float eps",
    ["out", "residual_out"],
    check=lambda x, weight, residual, eps: _check_rms_norm(x, weight, eps, residual),
    sizes=lambda x, weight, residual, eps: {"dtype": x.dtype, "weight": weight.dtype, "H": x.shape[-1]},
    reference=lambda x, weight, residual, eps: reference.rms_norm(x, weight, residual, eps=eps),
    cpu=_native.rms_norm,
    cuda=_cuda.rms_norm,
    triton="rms_norm_residual",
)
_rope = Op(
    "rope",
    "Tensor x, Tensor cos, Tensor sin, Tensor positions",
    ["out"],
    check=_check_rope,
    sizes=lambda x, cos, sin, positions: {"dtype": x.dtype, "rotary": "whole head" if 2 * cos.shape[1] == x.shape[-1] else "part of it"},
    reference=lambda *inputs: (reference.rope(*inputs),),
    cpu=_native.rope,
    cuda=_cuda.rope,
    triton="rope",
    values=_check_rope_values,
)
_silu_mul = Op(
    "silu_mul",
    "Tensor x",
    ["out"],
    check=_check_silu_mul,
    sizes=lambda x: {"dtype": x.dtype},
    reference=lambda x: (reference.silu_mul(x),),
    cpu=_native.silu_mul,
    cuda=_cuda.silu_mul,
    triton="silu_mul",
)
_embed = Op(
    "embed",
    "Tensor ids, Tensor table, ScalarType dtype",
    ["out"],
    check=_check_embed,
    sizes=lambda ids, table, dtype: {"dtype": table.dtype, "out": dtype},
    reference=lambda ids, table, dtype: (reference.embed(ids, table, dtype=dtype),),
    cpu=lambda outs, ids, table, dtype: _native.embed(outs, ids, table),
    cuda=lambda outs, ids, table, dtype: _cuda.embed(outs, ids, table),
    triton="embed",
    values=_check_embed_values,
)
