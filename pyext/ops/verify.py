"""row_stats, topk_logits and verify_greedy: from rows of logits to the path that a step accepts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import INT64_MAX, whole
from ramify.ops import _cuda, _native
from ramify.ops._checks import FLOATS, INDICES, INT32, Results, Shapes
from ramify.ops._library import Op
from ramify.tree import MAX_ROWS


class RowStats(NamedTuple):
    """argmax int32 [R], the lowest column of equal maxima; lse float32 [R], natural logarithm; max float32 [R]."""

    argmax: Tensor
    lse: Tensor
    max: Tensor


def row_stats(logits: Tensor, *, out: RowStats | tuple[Tensor, Tensor, Tensor] | None = None) -> RowStats:
    """Arg-max, log-sum-exp and maximum of each row, in one read of it.

    logits [R, V] float; columns of -inf are masked, a row of nothing else has argmax 0 and lse -inf. NaN is larger than every
    number, as in torch: a row that holds one has max and lse NaN, and its first NaN for argmax. Returns RowStats, as `out` takes
    it. Raises ValueError for shapes, TypeError for dtypes. Source: online softmax, arXiv 1805.02867.
    """
    return RowStats(*_row_stats(logits, out=out))


def topk_logits(logits: Tensor, k: int, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending; of equal values the lower column first.

    logits [R, V] float, k from 1 to V. Returns values [R, k] in the logits' dtype and ids int32 [R, k]; where fewer than k
    columns are above -inf, the rest is -inf with id -1. NaN is larger than every number and
    comes first. `out` takes the same pair. Raises ValueError for shapes and k, TypeError for dtypes.
    """
    return _topk_logits(logits, whole("k", k, 1, "topk_logits", INT64_MAX), out=out)


def verify_greedy(
    tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree from its root to the child whose token is the row's arg-max, as long as there is one.

    tokens, parents, argmax int32 or int64 [B, T]: a row's token, its parent (-1 for row 0, else an earlier row) and what the
    target model would emit after it; n_rows int32 [B], 1 to T: rows in use. Returns path int32 [B, T], ascending, row 0 first,
    -1 after its end; count int32 [B]; bonus int32 [B], the arg-max of the last accepted row. `out` takes the same three. Raises
    ValueError for shapes, and on the CPU for values; TypeError for dtypes.
    """
    return _verify_greedy(tokens, parents, argmax, n_rows, out=out)


def _check_row_stats(logits: Tensor) -> Results:
    Shapes("row_stats")("logits", logits, "R V", FLOATS)
    R = logits.shape[:1]
    return ((R, torch.int32), (R, torch.float32), (R, torch.float32))


def _check_topk_logits(logits: Tensor, k: int) -> Results:
    check = Shapes("topk_logits")
    check("logits", logits, "R V", FLOATS)
    R, V = logits.shape
    if not 1 <= k <= V:
        raise check.fail(f"k is {k}", f"1 to {V}, the columns of logits")
    return (((R, k), logits.dtype), ((R, k), torch.int32))


def _check_verify_greedy(tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> Results:
    check = Shapes("verify_greedy")
    check("tokens", tokens, "B T", INDICES)
    check("parents", parents, "B T", INDICES)
    check("argmax", argmax, "B T", INDICES)
    check("n_rows", n_rows, "B", INT32)
    check_rows(check, "tokens", tokens.shape[1])
    return ((tokens.shape, torch.int32), (n_rows.shape, torch.int32), (n_rows.shape, torch.int32))


def check_rows(check: Shapes, name: str, T: int) -> None:
    """A tree has one row or more, and no more than every kernel takes."""
    if not 1 <= T <= MAX_ROWS:
        raise check.fail(f"{name} has {T} rows a sequence", f"1 to {MAX_ROWS}", "Lower the rows of the tree.")


def check_tree(op: str, parents: Tensor, n_rows: Tensor) -> None:
    """n_rows and parents, on the CPU, make trees."""
    T = parents.shape[1]
    row = torch.arange(T, device="cpu")
    for b, n in enumerate(n_rows.tolist()):
        if not 1 <= n <= T:
            raise ValueError(f"{op}: n_rows[{b}] is {n}; takes 1 to {T}.")
    used = row < n_rows[:, None]
    wrong = used & torch.where(row == 0, parents != -1, (parents < 0) | (parents >= row))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: parents[{b}, {i}] is {parents[b, i]}; takes {'-1' if i == 0 else f'0 to {i - 1}'}.")


def _check_greedy_values(tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> None:
    check_tree("verify_greedy", parents, n_rows)
    for far in (int(x) for x in argmax.aminmax()):
        if not -(1 << 31) <= far < 1 << 31:
            raise ValueError(f"verify_greedy: argmax holds {far}; takes what int32 holds, as bonus is.")


_row_stats = Op(
    "row_stats",
    "Tensor logits",
    ["argmax", "lse", "max"],
    check=_check_row_stats,
    sizes=lambda logits: {"dtype": logits.dtype, "V": logits.shape[1]},
    reference=reference.row_stats,
    cpu=_native.row_stats,
    cuda=_cuda.row_stats,
    triton="row_stats",
)
_topk_logits = Op(
    "topk_logits",
    "Tensor logits, int k",
    ["values", "ids"],
    check=_check_topk_logits,
    sizes=lambda logits, k: {"dtype": logits.dtype, "V": logits.shape[1], "k": k},
    reference=reference.topk_logits,
    cpu=_native.topk_logits,
    cuda=_cuda.topk_logits,
    triton="topk_logits",
)
_verify_greedy = Op(
    "verify_greedy",
    "Tensor tokens, Tensor parents, Tensor argmax, Tensor n_rows",
    ["path", "count", "bonus"],
    check=_check_verify_greedy,
    sizes=lambda tokens, *_: {"dtype": tokens.dtype, "T": tokens.shape[1]},
    reference=reference.verify_greedy,
    cpu=_native.verify_greedy,
    cuda=_cuda.verify_greedy,
    triton="verify_greedy",
    values=_check_greedy_values,
)
