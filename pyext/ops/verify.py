"""row_stats, topk_logits and verify_greedy: from rows of logits to the path that a step accepts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ramify import reference
from ramify.checks import whole
from ramify.ops import _native
from ramify.ops._checks import FLOATS, INDICES, INT32, Shapes, outputs
from ramify.ops._library import Op


class RowStats(NamedTuple):
    """argmax int32 [R], the lowest column of equal maxima; lse float32 [R], natural logarithm; max float32 [R]."""

    argmax: Tensor
    lse: Tensor
    max: Tensor


def row_stats(logits: Tensor, *, out: RowStats | tuple[Tensor, Tensor, Tensor] | None = None) -> RowStats:
    """Arg-max, log-sum-exp and maximum of each row, in one read of it.

    logits [R, V] float; columns of -inf are masked, a row of nothing else has argmax 0 and lse -inf. Returns RowStats, as
    `out` takes it. Raises ValueError for shapes, TypeError for dtypes. Source: online softmax, arXiv 1805.02867.
    """
    check = Shapes("row_stats")
    check("logits", logits, "R V", FLOATS)
    if logits.shape[1] == 0:
        raise check.fail("logits has no columns", "one or more")
    outs = outputs("row_stats", out, 3)
    for name, o, dtype in zip(RowStats._fields, outs or (), (torch.int32, torch.float32, torch.float32)):
        check.out(f"out.{name}", o, logits.shape[:1], dtype)
    return RowStats(*_row_stats(logits, out=outs))


def topk_logits(logits: Tensor, k: int, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending; of equal values the lower column first.

    logits [R, V] float, k from 1 to V. Returns values [R, k] in the logits' dtype and ids int32 [R, k]; where fewer than k
    columns are above -inf, the rest is -inf with id -1. `out` takes the same pair. Raises ValueError for shapes and k,
    TypeError for dtypes.
    """
    check = Shapes("topk_logits")
    check("logits", logits, "R V", FLOATS)
    k = whole("k", k, 1, "topk_logits")
    if k > logits.shape[1]:
        raise check.fail(f"k is {k}", f"at most {logits.shape[1]}, the columns of logits")
    outs = outputs("topk_logits", out, 2)
    for name, o, dtype in zip(("out[0]", "out[1]"), outs or (), (logits.dtype, torch.int32)):
        check.out(name, o, (logits.shape[0], k), dtype)
    return _topk_logits(logits, k, out=outs)


def verify_greedy(
    tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree from its root to the child whose token is the row's arg-max, as long as there is one.

    tokens, parents, argmax int32 or int64 [B, T]: a row's token, its parent (-1 for row 0, else an earlier row) and what the
    target model would emit after it; n_rows int32 [B], 1 to T: rows in use. Returns path int32 [B, T], ascending, row 0 first,
    -1 after its end; count int32 [B]; bonus int32 [B], the arg-max of the last accepted row. `out` takes the same three. Raises
    ValueError for shapes, and on the CPU for values; TypeError for dtypes.
    """
    check = Shapes("verify_greedy")
    check("tokens", tokens, "B T", INDICES)
    check("parents", parents, "B T", INDICES)
    check("argmax", argmax, "B T", INDICES)
    check("n_rows", n_rows, "B", INT32)
    if tokens.shape[1] == 0:
        raise check.fail("tokens has no rows", "one or more a sequence")
    outs = outputs("verify_greedy", out, 3)
    for name, o, shape in zip(("out[0]", "out[1]", "out[2]"), outs or (), (tokens.shape, n_rows.shape, n_rows.shape)):
        check.out(name, o, shape, torch.int32)
    return _verify_greedy(tokens, parents, argmax, n_rows, out=outs)


def check_tree(op: str, parents: Tensor, n_rows: Tensor) -> None:
    """n_rows and parents make trees. Asked on the CPU only: elsewhere the answer would cost a synchronisation."""
    if parents.device.type != "cpu":
        return
    T = parents.shape[1]
    row = torch.arange(T)
    for b, n in enumerate(n_rows.tolist()):
        if not 1 <= n <= T:
            raise ValueError(f"{op}: n_rows[{b}] is {n}; takes 1 to {T}.")
    used = row < n_rows[:, None]
    wrong = used & torch.where(row == 0, parents != -1, (parents < 0) | (parents >= row))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: parents[{b}, {i}] is {parents[b, i]}; takes {'-1' if i == 0 else f'0 to {i - 1}'}.")


def _walk(tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_tree("verify_greedy", parents, n_rows)
    return reference.verify_greedy(tokens, parents, argmax, n_rows)


_row_stats = Op(
    "row_stats",
    "Tensor logits",
    ["argmax", "lse", "max"],
    allocate=lambda logits: (
        logits.new_empty(logits.shape[:1], dtype=torch.int32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    ),
    sizes=lambda logits: {"dtype": logits.dtype},
    reference=reference.row_stats,
    cpu=_native.row_stats,
    triton="row_stats",
)
_topk_logits = Op(
    "topk_logits",
    "Tensor logits, int k",
    ["values", "ids"],
    allocate=lambda logits, k: (
        logits.new_empty((logits.shape[0], k)),
        logits.new_empty((logits.shape[0], k), dtype=torch.int32),
    ),
    sizes=lambda logits, k: {"dtype": logits.dtype, "k": k},
    reference=reference.topk_logits,
    cpu=_native.topk_logits,
    triton="topk_logits",
)
_verify_greedy = Op(
    "verify_greedy",
    "Tensor tokens, Tensor parents, Tensor argmax, Tensor n_rows",
    ["path", "count", "bonus"],
    allocate=lambda tokens, parents, argmax, n_rows: (
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        n_rows.new_empty(n_rows.shape),
        n_rows.new_empty(n_rows.shape),
    ),
    sizes=lambda tokens, *_: {"dtype": tokens.dtype, "T": tokens.shape[1]},
    reference=_walk,
    triton="verify_greedy",
)
