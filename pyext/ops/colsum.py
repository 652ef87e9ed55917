"""attention_colsum: how much attention each slot of a cache received, for policies that decide which slots to keep."""

import math
from typing import Any

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import number
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INT32, INT64, Results, Shapes, check_tree, check_tree_values, slots_of, tensor, window_of
from ramify.ops._library import Op


def attention_colsum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    prefix_len: Tensor,
    *,
    ancestors: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink: int | None = None,
    tail_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention that each committed slot received: exp(scale * q k - lse), summed over rows and the query heads of a group.

    q [B, T, Hq, D], k [B, S, Hkv, D] (or pages with page_table int32 [B, P]), prefix_len int32 [B], scale, window, sink and tail_rows as
    for tree_attention; lse float32 [B, T, Hq] as it returns it with return_lse. Values are not read. With a window, ancestors int64
    [B, T, W] give the rows' positions; without them row t stands t behind the prefix, as in a chain. A slot that a row does not see
    gets nothing from it; a row whose lse is -inf gives nothing; a score or lse that is NaN or beyond float32 makes the slots that the
    row sees NaN.

    A pass of its own over the keys, behind the tree_attention whose lse it takes and no part of it: who scores no slots pays nothing.
    Returns float32 [B, Hkv, S], or [B, Hkv, P * page]: 0 for slots that nobody sees, whatever they hold. With the shares of the rows' own
    tails the slots of a head sum to the number of its rows. Rows are added in one fixed order. Raises ValueError for shapes and values,
    TypeError for dtypes. Source: the accumulated scores of H2O (arXiv 2306.14048) and SnapKV (arXiv 2404.14469).
    """
    tensor("attention_colsum", "q", q)
    D = math.prod(q.shape[-1:]) or 1  # no D, or one of 0, is for the check to refuse
    scale = 1 / math.sqrt(D) if scale is None else float(number("scale", scale, "attention_colsum"))
    bounds = window_of("attention_colsum", window, sink)
    return _attention_colsum(q, k, lse, prefix_len, ancestors, page_table, scale, *bounds, tail_rows, out=out)


def _check(
    q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, ancestors: Tensor | None, page_table: Tensor | None, scale: float, window: int,
    sink: int, tail_rows: Tensor | None,
) -> Results:  # fmt: skip
    check = Shapes("attention_colsum")
    check("q", q, "B T Hq D", FLOATS)
    check("k", k, "B S Hkv D" if page_table is None else "pages page Hkv D", FLOATS)
    check("lse", lse, "B T Hq", (torch.float32,))
    check("prefix_len", prefix_len, "B", INT32)
    if ancestors is not None:
        check("ancestors", ancestors, "B T W", INT64)
    if page_table is not None:
        check("page_table", page_table, "B P", INT32)
    if tail_rows is not None:
        check("tail_rows", tail_rows, "B", INT32)
    B, Hkv = q.shape[0], k.shape[2]
    check_tree(check, q, Hkv, ancestors, scale, window, sink)
    return (((B, Hkv, slots_of(k, page_table)), torch.float32),)


def _check_values(
    q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, ancestors: Tensor | None, page_table: Tensor | None, scale: float, window: int,
    sink: int, tail_rows: Tensor | None,
) -> None:  # fmt: skip
    """Lengths fit their tensors, pages exist, and ancestors are words of a tree."""
    check_tree_values("attention_colsum", q, k, prefix_len, page_table, tail_rows, ancestors)


def _reference(q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, *rest: Any) -> tuple[Tensor]:
    ancestors, page_table, scale, window, sink, tail_rows = rest
    got = reference.attention_colsum(
        q, k, lse, prefix_len, ancestors=ancestors, page_table=page_table, scale=scale, window=window or None, sink=sink,
        tail_rows=tail_rows,
    )  # fmt: skip
    return (got,)


_attention_colsum = Op(
    "attention_colsum",
    "Tensor q, Tensor k, Tensor lse, Tensor prefix_len, Tensor? ancestors, Tensor? page_table, float scale, int window, int sink, "
    "Tensor? tail_rows",
    ["out"],
    check=_check,
    sizes=lambda q, k, *_: {"dtype": q.dtype, "D": q.shape[3], "kv": k.dtype},
    reference=_reference,
    cpu=_native.attention_colsum,
    cuda=_cuda.attention_colsum,
    triton="attention_colsum",
    values=_check_values,
)
