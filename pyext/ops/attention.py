"""Attention over the user's own tensors: tree_attention, interval_attention, and merge_states for whoever splits the keys."""

import math
from typing import Any

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import number
from ramify.ops import _cuda as _kernels
from ramify.ops import _native
from ramify.ops._checks import (
    FLOATS,
    INT32,
    INT64,
    Results,
    Shapes,
    check_cache,
    check_heads,
    check_tree,
    check_tree_values,
    outputs,
    tensor,
    window_of,
)
from ramify.ops._library import Op


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    ancestors: Tensor,
    prefix_len: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink: int | None = None,
    tail_rows: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of T tree rows over a committed prefix, without a mask, and over their own ancestors.

    q [B, T, Hq, D] float, T at most 256; k, v [B, S, Hkv, D], or [pages, page, Hkv, D] with page_table int32 [B, P];
    tail_k, tail_v [B, T, Hkv, D]: keys and values of the rows themselves; k, v and the tail share one float dtype.
    ancestors int64 [B, T, W]: bit j & 63 of word j >> 6 of row i is set when row i sees row j; itself always, a later row never.
    prefix_len int32 [B]: slots of k and v that every row sees. scale: 1 / sqrt(D) by default.
    window: a row at position p sees keys above p - window; a row's position is prefix_len + its ancestors without itself.
    sink: the first slots, visible behind the window as well; none is taken without one. tail_rows int32 [B]: rows in use; the others
    give 0 and -inf.

    Sums run in float32. What meets a bfloat16 k or v is rounded to bfloat16 (by 2^-9) where the chip multiplies pairs of them, on a CPU
    with AVX512-BF16 and on a GPU: a wider q, and the weights before they meet v; the lse is of weights that are not rounded.

    Returns o [B, T, Hq, D] in q's dtype (, lse float32 [B, T, Hq], natural logarithm, with return_lse). Slots of the prefix that no row
    sees may hold anything; a value of the tail that is NaN or infinite reaches every row of its sequence. A row that sees a score,
    scale * q k, which is NaN or beyond float32 is NaN, in o and lse. Raises ValueError for shapes and values, lengths and bits included
    where the tensors are on the CPU or under ramify.debug; TypeError for dtypes. Source: arXiv 2305.09781; the softmax is the
    integer-reference one that makes rows independent.
    """
    tensor("tree_attention", "q", q)
    D = math.prod(q.shape[-1:]) or 1  # no D, or one of 0, is for the check to refuse
    scale = 1 / math.sqrt(D) if scale is None else float(number("scale", scale, "tree_attention"))
    if out is not None and not return_lse:
        out = (outputs("tree_attention", out, 1)[0], q.new_empty(q.shape[:3], dtype=torch.float32))
    bounds = window_of("tree_attention", window, sink)
    result = _tree_attention(q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table, scale, *bounds, tail_rows, out=out)
    return result if return_lse else result[0]


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which row t of sequence b sees the slots from start[b, t] up to and without end[b, t].

    One start and one end a row say causal, prefix, window, block-causal, block-diagonal, full and rectangular attention, without a mask.
    q [B, T, Hq, D] float; k, v [B, S, Hkv, D] of one float dtype; start, end int32 [B, T], 0 to S; an end at or below its start sees
    nothing and gives 0 and -inf. scale: 1 / sqrt(D) by default. Slots that no row sees may hold anything. A row that sees a score,
    scale * q k, which is NaN or beyond float32 is NaN, in o and lse.

    Returns o [B, T, Hq, D] in q's dtype (, lse float32 [B, T, Hq], natural logarithm, with return_lse). Raises ValueError for shapes, and
    on the CPU for an interval outside the slots; TypeError for dtypes.
    """
    tensor("interval_attention", "q", q)
    D = math.prod(q.shape[-1:]) or 1  # no D, or one of 0, is for the check to refuse
    scale = 1 / math.sqrt(D) if scale is None else float(number("scale", scale, "interval_attention"))
    if out is not None and not return_lse:
        out = (outputs("interval_attention", out, 1)[0], q.new_empty(q.shape[:3], dtype=torch.float32))
    result = _interval_attention(q, k, v, start, end, scale, out=out)
    return result if return_lse else result[0]


def _check_interval(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> Results:
    check = Shapes("interval_attention")
    check("q", q, "B T Hq D", FLOATS)
    check("k", k, "B S Hkv D", FLOATS)
    check("v", v, "B S Hkv D", (k.dtype,))
    check("start", start, "B T", INT32)
    check("end", end, "B T", INT32)
    check_heads("interval_attention", q.shape[2], k.shape[2])
    return (q.shape, q.dtype), (q.shape[:3], torch.float32)


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """One attention over two disjoint sets of keys, from the attention over each.

    o1, o2 [..., D] of one float dtype; lse1, lse2 [...] float32, natural logarithm. A side that saw no key has a lse of -inf, and its
    o may be anything. Returns o [..., D] in o1's dtype and lse float32 [...]; `out` takes the same pair. Raises ValueError for
    shapes, TypeError for dtypes. Source: arXiv 1805.02867.
    """
    return _merge_states(o1, lse1, o2, lse2, out=out)


def _check_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    ancestors: Tensor,
    prefix_len: Tensor,
    page_table: Tensor | None,
    scale: float,
    window: int,
    sink: int,
    tail_rows: Tensor | None,
) -> Results:
    check = Shapes("tree_attention")
    check("q", q, "B T Hq D", FLOATS)
    check("tail_k", tail_k, "B T Hkv D", FLOATS)
    check("tail_v", tail_v, "B T Hkv D", (tail_k.dtype,))
    check_cache(check, "k", k, "v", v, page_table)
    check.same_dtype("k", k, "tail_k", tail_k.dtype)
    check("ancestors", ancestors, "B T W", INT64)
    check("prefix_len", prefix_len, "B", INT32)
    if tail_rows is not None:
        check("tail_rows", tail_rows, "B", INT32)
    check_tree(check, q, tail_k.shape[2], ancestors, scale, window, sink)
    return ((q.shape, q.dtype), (q.shape[:3], torch.float32))


def _check_merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Results:
    check = Shapes("merge_states")
    check("o1", o1, "... D", FLOATS)
    check("o2", o2, "... D", (o1.dtype,))
    check.same_shape("o2", o2, "o1", o1.shape)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        check(name, lse, "...", (torch.float32,), dense=False)
        check.same_shape(name, lse, "o1 without its last axis", o1.shape[:-1])
    return ((o1.shape, o1.dtype), (lse1.shape, torch.float32))


def _check_values(q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table, scale, window, sink, tail_rows) -> None:
    """Lengths fit their tensors and every used row sees itself and no later row."""
    check_tree_values("tree_attention", q, k, prefix_len, page_table, tail_rows, ancestors)


def _reference(q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table, scale, window, sink, tail_rows):
    return reference.tree_attention(
        q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table=page_table, scale=scale, window=window or None, sink=sink,
        tail_rows=tail_rows, return_lse=True,
    )  # fmt: skip


_tree_attention = Op(
    "tree_attention",
    "Tensor q, Tensor k, Tensor v, Tensor tail_k, Tensor tail_v, Tensor ancestors, Tensor prefix_len, "
    "Tensor? page_table, float scale, int window, int sink, Tensor? tail_rows",
    ["out", "lse_out"],
    check=_check_tree_attention,
    sizes=lambda q, k, *_: {"dtype": q.dtype, "D": q.shape[3], "kv": k.dtype},
    reference=_reference,
    cpu=_native.tree_attention,
    cuda=_kernels.tree_attention,
    triton="tree_attention",
    values=_check_values,
)


def _check_bounds(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> None:
    """Intervals lie within the slots."""
    for name, bound in (("start", start), ("end", end)):
        low, high = (int(x) for x in bound.aminmax())
        if low < 0 or high > k.shape[1]:
            raise ValueError(f"interval_attention: {name} holds {low if low < 0 else high}; takes 0 to {k.shape[1]}, the slots of k.")


def _interval_reference(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> Any:
    return reference.interval_attention(q, k, v, start, end, scale=scale, return_lse=True)


_interval_attention = Op(
    "interval_attention",
    "Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, float scale",
    ["out", "lse_out"],
    check=_check_interval,
    sizes=lambda q, k, *_: {"dtype": q.dtype, "D": q.shape[3], "kv": k.dtype},
    reference=_interval_reference,
    cpu=_native.interval_attention,
    cuda=_kernels.interval_attention,
    triton="interval_attention",
    values=_check_bounds,
)
_merge_states = Op(
    "merge_states",
    "Tensor o1, Tensor lse1, Tensor o2, Tensor lse2",
    ["out", "lse_out"],
    check=_check_merge_states,
    sizes=lambda o1, *_: {"dtype": o1.dtype},
    reference=reference.merge_states,
    cpu=_native.merge_states,
    cuda=_kernels.merge_states,
    triton="merge_states",
)
