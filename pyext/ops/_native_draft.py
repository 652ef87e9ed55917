"""As _native.py, for the draft table."""

from torch import Tensor

from ramify.backends import native
from ramify.ops._memory import apart, ids32

Outputs = tuple[Tensor, ...]


def table_draft(outs: Outputs, table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> None:
    """Tokens of each sequence's tree."""
    n, out = native(), outs[0]
    roots, parents, ranks = ids32(roots), parents.contiguous(), ranks.contiguous()
    args = n.TableDraftArgs(B=out.shape[0], T=out.shape[1], V=table.shape[0], W=table.shape[1])
    args.table, args.table_stride, args.roots = table.data_ptr(), table.stride(0), roots.data_ptr()
    args.parents, args.ranks = parents.data_ptr(), ranks.data_ptr()
    args.out, args.out_stride = out.data_ptr(), out.stride(0)
    n.run(args)


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    """Rows of the table whose tokens are here."""
    n, tokens, likely = native(), apart(tokens.contiguous(), table), apart(likely, table)
    args = n.TableLearnArgs(M=tokens.shape[0], V=table.shape[0], W=table.shape[1])
    args.table, args.table_stride, args.tokens = table.data_ptr(), table.stride(0), tokens.data_ptr()
    args.likely, args.likely_stride = likely.data_ptr(), likely.stride(0)
    n.run(args)
