"""table_draft and table_learn: a step's guesses from a table of likely successors, and what the step teaches that table."""

import torch
from torch import Tensor

from ramify import reference
from ramify.ops import _cuda_draft, _native_draft
from ramify.ops._checks import INDICES, INT32, Results, Shapes
from ramify.ops._library import InPlaceOp, Op
from ramify.ops.verify import check_rows


def table_draft(table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Fill a static tree from a table of likely successors: row t holds the successor of rank ranks[t] of its parent's token.

    table int32 [V, W], the likeliest successor of each token first, negative where nothing was seen; roots int32 or int64 [B], the token
    of row 0 of each sequence; parents, ranks int32 [T], the tree that all sequences share: a row's parent is an earlier row, or -1 for
    row 0 and for a row that is not in use, whose ranks are not read. Returns tokens int32 [B, T], as `out` takes it: -1 for ids outside
    0 to V - 1, roots among them, for all that would follow a -1, and for rows that are not in use. Raises ValueError for shapes, on the
    CPU for values of parents and ranks; TypeError for dtypes. Source: Token Recycling, Luo et al. 2024.
    """
    return _table_draft(table, roots, parents, ranks, out=out)


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    """Replace rows of a table of likely successors: table[tokens[m]] = likely[m, :W], of rows with one token the last one.

    table int32 [V, W] changes in place; tokens int32 [M], where one outside 0 to V - 1, as table_draft marks a row without a token,
    teaches nothing; likely int32 [M, K], K at least W, as topk_logits returns ids. The table may share memory with the others: they are
    read first. Raises ValueError for shapes, TypeError for dtypes. Source: Token Recycling, Luo et al. 2024.
    """
    _table_learn(table, tokens, likely)


def _check_table(check: Shapes, table: Tensor) -> None:
    check("table", table, "V W", INT32)
    if table.shape[1] == 0:
        raise check.fail(f"table is {list(table.shape)}", "[V, W] with W of 1 or more")


def _check_draft(table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> Results:
    check = Shapes("table_draft")
    _check_table(check, table)
    check("roots", roots, "B", INDICES)
    check("parents", parents, "T", INT32)
    check("ranks", ranks, "T", INT32)
    check_rows(check, "parents", len(parents))
    return (((len(roots), len(parents)), torch.int32),)


def _check_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    check = Shapes("table_learn")
    _check_table(check, table)
    check("tokens", tokens, "M", INT32)
    check("likely", likely, "M K", INT32)
    if likely.shape[1] < table.shape[1]:
        raise check.fail(f"likely has {likely.shape[1]} columns", f"{table.shape[1]} or more, the columns of table")


def _check_draft_values(table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> None:
    row = torch.arange(len(parents), device="cpu")
    wrong = (parents < -1) | (parents >= row) | ((row == 0) & (parents != -1))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"table_draft: parents[{t}] is {parents[t]}; takes -1{f' to {t - 1}' if t else ''}.")
    W = table.shape[1]
    wrong = (parents >= 0) & ((ranks < 0) | (ranks >= W))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"table_draft: ranks[{t}] is {ranks[t]}; takes 0 to {W - 1}, the columns of table.")


_table_draft = Op(
    "table_draft",
    "Tensor table, Tensor roots, Tensor parents, Tensor ranks",
    ["tokens"],
    check=_check_draft,
    sizes=lambda table, *_: {"dtype": table.dtype},
    reference=lambda *inputs: (reference.table_draft(*inputs),),
    cpu=_native_draft.table_draft,
    cuda=_cuda_draft.table_draft,
    triton="table_draft",
    values=_check_draft_values,
)
_table_learn = InPlaceOp(
    "table_learn",
    "Tensor(a!) table, Tensor tokens, Tensor likely",
    _check_learn,
    lambda table, *_: {"dtype": table.dtype},
    reference.table_learn,
    cpu=_native_draft.table_learn,
    cuda=_cuda_draft.table_learn,
    triton="table_learn",
)
