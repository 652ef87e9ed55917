"""Row r of a call with many rows has the bits of the call with that row alone, on every kernel that the table calls row-invariant.

tests/gates/test_row_invariant.py has tree attention, and the emulated kernels.
"""

import pytest
import torch

import ramify
from ramify import backends, ops
from ramify.testing.tensors import running

BF16, M = torch.bfloat16, 7
WHOLE = {
    "tree_attention",
    "kv_append",
    "kv_commit",
    "verify_greedy",
    "verify_sample",
    "table_draft",
    "table_learn",
}  # a row more is another tree; or nothing is summed


def ops_of(*names):
    """Ops of which these backends have a row-invariant kernel, but for those that take trees or only copy."""
    return sorted({row.op for row in backends.TABLE if row.backend in names and row.row_invariant} - WHOLE)


def rows_of(g, *shape, dtype=BF16):
    return torch.randn(*shape, generator=g).to(dtype)


def calls(op, g):
    """A call of an op on those of M rows that a slice names: it returns tensors of rows."""
    x, weight, at = rows_of(g, M, 200), rows_of(g, 200), torch.arange(M)
    heads, angle, logits = rows_of(g, M, 3, 64), torch.rand(20, 32, generator=g), 4 * rows_of(g, M, 9000)
    qkv, slots, lse = rows_of(g, M, 4 * 64), torch.arange(M).int(), torch.randn(2, M, generator=g)
    p, u = torch.rand(2, M, 5000, generator=g), torch.rand(M, generator=g).double()
    matrix = rows_of(g, 48, 200)

    def appended(r):
        caches = torch.zeros(2, M, 1, 64).bfloat16()
        q = ops.rope_append(qkv[r], angle, angle, at[r], slots[r], *caches, q_norm=weight[:64], k_norm=weight[:64])
        return q, *(cache[slots[r].long()] for cache in caches)

    def interval(r):
        g = torch.Generator().manual_seed(5)
        q, (k, v) = rows_of(g, 1, M, 2, 64), rows_of(g, 2, 1, 700, 1, 64)
        start, end = torch.arange(M).int()[None] * 60, torch.arange(M).int()[None] * 90 + 100
        return (ops.interval_attention(q[:, r], k, v, start[:, r], end[:, r])[0],)

    return {
        "linear": lambda r: (ops.linear(x[r], matrix),),
        "rms_norm": lambda r: ops.rms_norm(x[r], weight, x[r]),
        "rope": lambda r: (ops.rope(heads[r], angle, angle, at[r]),),
        "rope_append": appended,
        "silu_mul": lambda r: (ops.silu_mul(x[r]),),
        "embed": lambda r: (ops.embed(at[r], x),),
        "row_stats": lambda r: tuple(ops.row_stats(logits[r])),
        "topk_logits": lambda r: ops.topk_logits(logits[r], 5),
        "merge_states": lambda r: ops.merge_states(heads[r, 0], lse[0, r], heads[r, 1], lse[1, r]),
        "residual_sample": lambda r: (ops.residual_sample(p[0, r], p[1, r], u[r]),),
        "interval_attention": interval,
    }[op]


def check(op):
    """Every row alone, on the backend in force."""
    call = calls(op, torch.Generator().manual_seed(1))
    together = call(slice(None))
    for r in range(M):
        assert all(torch.equal(a, b[r : r + 1]) for a, b in zip(call(slice(r, r + 1)), together)), f"{op}: row {r}"


@pytest.mark.parametrize("backend", [
    pytest.param(name, marks=pytest.mark.skipif(bool(backends.missing(name)), reason=backends.missing(name)))
    for name in ("cpu", "cuda", "triton")
])  # fmt: skip
@pytest.mark.parametrize("op", ops_of("cuda", "triton"))
def test_a_row_is_its_own(backend, op):
    if backend != "cpu" and op not in ops_of(backend):
        pytest.skip("not row-invariant there")
    with running(backend), ramify.row_invariant(backend != "cpu"):
        check(op)
