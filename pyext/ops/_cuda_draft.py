"""As _cuda.py, for the draft table: nothing waits for the device, so both can be part of a CUDA graph."""

from torch import Tensor

from ramify import native_cuda as n
from ramify.ops._cuda import Outputs, _run
from ramify.ops._memory import apart, ids32


def table_draft(outs: Outputs, table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor) -> None:
    """Tokens of each sequence's tree."""
    (V, W), (B, T) = table.shape, outs[0].shape
    args = n.TableDraftArgs(B=B, T=T, V=V, W=W, table_stride=table.stride(0), out_stride=outs[0].stride(0))
    _run(args, table=table, roots=ids32(roots), parents=parents.contiguous(), ranks=ranks.contiguous(), out=outs[0])


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> None:
    """Rows of the table whose tokens are here."""
    (V, W), likely = table.shape, apart(likely, table)
    args = n.TableLearnArgs(M=tokens.shape[0], V=V, W=W, table_stride=table.stride(0), likely_stride=likely.stride(0))
    _run(args, table=table, tokens=apart(tokens.contiguous(), table), likely=likely)
