"""table_draft and table_learn on Triton: guesses from a table of likely successors, and what a step teaches it.

Meaning: reference/draft.py. Status: interpreted and compiled, not yet run on hardware.

A program drafts one sequence: its tokens stay in registers, and each round looks up every row whose parent's token is there by now, so
there are as many rounds as the tree is deep. A program learns one row: it reads the tokens behind its own until one is equal, and so no two
write one row of the table. Traffic: 8 bytes a row drafted; 8 W a row learned, and up to 4 M to find out, mostly from the cache. A parent
that is no earlier row, a rank outside the table and an id outside the vocabulary are as what was never seen.
"""

import triton
import triton.language as tl

from ramify.kernels.verify import narrow

BEHIND, WIDE = 1024, 1024  # tokens that are compared at a time, successors that are copied at a time

_OPEN = tl.constexpr(-2)  # a row whose token is yet to be looked up


@triton.jit
def _draft(
    table, roots, parents, ranks, out, table_stride, out_stride, V, W, T,
    BLOCK: tl.constexpr,  # rows of a tree, rounded up to a power of two
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    parent = tl.load(parents + t, mask=t < T, other=-1)
    rank = tl.load(ranks + t, mask=t < T, other=-1)
    used = (parent >= 0) & (parent < t) & (rank >= 0) & (rank < W)
    parent = tl.where(used, parent, 0)
    root = narrow(tl.load(roots + b))
    root = tl.where((root >= 0) & (root < V), root, -1)
    tokens = tl.where(used, _OPEN, tl.where(t == 0, root, -1))
    left = tl.max(used.to(tl.int32), 0)
    while left > 0:  # a parent stands before its child, so the first open row is looked up and this ends
        above = tl.gather(tokens, parent, 0)
        ready = (tokens == _OPEN) & (above != _OPEN)
        found = tl.load(table + above.to(tl.int64) * table_stride + rank, mask=ready & (above >= 0), other=-1)
        tokens = tl.where(ready, tl.where((found >= 0) & (found < V), found, -1), tokens)
        left = tl.max((tokens == _OPEN).to(tl.int32), 0)
    tl.store(out + b * out_stride + t, tokens, mask=t < T)


@triton.jit
def _learn(
    table, tokens, likely, table_stride, likely_stride, V, W, M,
    BLOCK: tl.constexpr,  # tokens that are compared at a time
    WIDTH: tl.constexpr,  # successors that are copied at a time
):  # fmt: skip
    m = tl.program_id(0)
    token = tl.load(tokens + m)
    if (token >= 0) & (token < V):
        first, later = m // BLOCK * BLOCK, 0
        while (first < M) & (later == 0):
            r = first + tl.arange(0, BLOCK)
            behind = tl.load(tokens + r, mask=(r > m) & (r < M), other=-1)
            later = tl.max((behind == token).to(tl.int32), 0)
            first += BLOCK
        if later == 0:
            for w in range(0, W, WIDTH):
                at = w + tl.arange(0, WIDTH)
                found = tl.load(likely + m.to(tl.int64) * likely_stride + at, mask=at < W)
                tl.store(table + token.to(tl.int64) * table_stride + at, found, mask=at < W)


def table_draft(table, roots, parents, ranks, out):
    """Tokens int32 [B, T] of the tree parents, ranks [T] that B sequences share, from the successors in table [V, W]."""
    (V, W), (B, T) = table.shape, out.shape
    _draft[(B,)](
        table, roots, parents, ranks, out, table.stride(0), out.stride(0), V, W, T, BLOCK=triton.next_power_of_2(T), num_warps=1,
    )  # fmt: skip


def table_learn(table, tokens, likely):
    """Row tokens[m] of table [V, W] becomes the first W of row m of likely, where no later row holds the same token."""
    (V, W), M = table.shape, tokens.shape[0]
    width = min(triton.next_power_of_2(W), WIDE)
    _learn[(M,)](table, tokens, likely, table.stride(0), likely.stride(0), V, W, M, BLOCK=BEHIND, WIDTH=width, num_warps=4)
