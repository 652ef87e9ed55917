"""rms_norm, rope, rope_append, silu_mul and embed: what a layer does between its matrix products and attention."""

import math
from typing import Any

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import number, show
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INDICES, INT32, Results, Shapes, tensor
from ramify.ops._library import InPlaceOp, Op

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


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Split rows of a fused q, k, v product: rotate queries and keys, and store row m's keys and values in slot slots[m] of the caches.

    qkv [M, (Hq + 2 Hkv) * D] float: heads of q, of k, of v; k_cache, v_cache [S, Hkv, D] of one float dtype, which change in place.
    q_norm, k_norm [D] of one float dtype: each head of q or k is scaled as by rms_norm, with `eps`, before it is rotated. cos, sin
    [P, R/2] float32 and positions int32 or int64 [M] as for rope. slots int32 [M]: a slot of its own for every row, or -1 for a row of
    padding, which stores nothing; its q is computed as any other.

    Returns q [M, Hq, D] in qkv's dtype. Values are rounded once, to the dtype of where they go. Raises ValueError for shapes and, on the
    CPU, for positions outside the tables, slots outside the caches and slots that two rows share; TypeError for dtypes.
    """
    if type(eps) is not float:
        eps = float(number("eps", eps, "rope_append"))
    return _rope_append(qkv, cos, sin, positions, slots, k_cache, v_cache, q_norm, k_norm, eps)


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


def _check_rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Results:  # fmt: skip
    check = Shapes("rope_append")
    check("qkv", qkv, "M (Hq+2Hkv)*D", FLOATS)
    check("cos", cos, "P R/2", _F32)
    check("sin", sin, "P R/2", _F32)
    check("positions", positions, "M", INDICES, dense=False)
    check("slots", slots, "M", INT32, dense=False)
    check("k_cache", k_cache, "S Hkv D", FLOATS)
    check("v_cache", v_cache, "S Hkv D", (k_cache.dtype,))
    norms = [(name, norm) for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)) if norm is not None]
    for name, norm in norms:
        check(name, norm, "D", FLOATS)
        check.same_dtype(name, norm, *(norms[0][0], norms[0][1].dtype))
    _, Hkv, D = k_cache.shape
    Hq = qkv.shape[1] // D - 2 * Hkv
    if Hq < 1 or qkv.shape[1] % D:
        raise check.fail(f"qkv is {list(qkv.shape)} and k_cache {list(k_cache.shape)}", f"[M, (Hq + {2 * Hkv}) * {D}] with Hq of 1 or more")
    if cos.shape[0] == 0:
        raise check.fail(f"cos is {list(cos.shape)}", "one position or more")
    if 2 * cos.shape[1] > D:
        raise check.fail(f"cos has {cos.shape[1]} columns", f"at most D/2 = {D // 2}")
    if not 0 <= eps < math.inf:
        raise check.fail(f"eps is {eps}", "a finite number of 0 or more")
    return (((qkv.shape[0], Hq, D), qkv.dtype),)


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


def _check_rope_append_values(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, *_: Any) -> None:
    _in_range("rope_append", "positions", positions, cos.shape[0], "cos")
    low, high = (int(t) for t in slots.aminmax())
    if low < -1 or high >= k_cache.shape[0]:
        wrong = low if low < -1 else high
        raise ValueError(f"rope_append: slots holds {wrong}; takes 0 to {k_cache.shape[0] - 1}, the slots of k_cache, or -1 for none.")
    used, count = slots[slots >= 0].unique(return_counts=True)
    if (count > 1).any():
        raise ValueError(
            f"rope_append: slots holds {int(used[count > 1][0])} twice; takes a slot of its own for every row, or -1 for none."
        )


def _check_embed_values(ids: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    _in_range("embed", "ids", ids, table.shape[0], "table")


def _in_range(op: str, name: str, index: Tensor, stop: int, of: str) -> None:
    """Indices, one at least, lie in 0 .. stop - 1."""
    low, high = (int(t) for t in index.aminmax())
    if low < 0 or high >= stop:
        raise ValueError(f"{op}: {name} holds {low if low < 0 else high}; takes 0 to {stop - 1}, the rows of {of}.")


def _rope_append_sizes(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, *rest: Any
) -> dict[str, Any]:
    norm = next((norm for norm in rest[1:3] if norm is not None), None)
    return {
        "dtype": qkv.dtype,
        "cache": k_cache.dtype,
        "D": k_cache.shape[2],
        "rotary": "whole head" if 2 * cos.shape[1] == k_cache.shape[2] else "part of it",
        "weight": qkv.dtype if norm is None else norm.dtype,
    }


def _rope_append_reference(q: Tensor, *inputs: Any) -> None:
    q.copy_(reference.rope_append(*inputs[:7], q_norm=inputs[7], k_norm=inputs[8], eps=inputs[9]))


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
_rope_append = InPlaceOp(
    "rope_append",
    "Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q_norm, "
    "Tensor? k_norm, float eps",
    check=_check_rope_append,
    sizes=_rope_append_sizes,
    reference=_rope_append_reference,
    cpu=_native.rope_append,
    cuda=_cuda.rope_append,
    triton="rope_append",
    values=_check_rope_append_values,
    returns=True,
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
