"""As test_properties.py, whose draws and backends these are: ops that verify trees, write caches, score slots and multiply by weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ramify import ops, reference
from ramify.testing.linear import exact_linear, low_bit_weight
from ramify.testing.tensors import TREES, attention_case, poisoned, random_tree, sample_case

spec = importlib.util.spec_from_file_location("properties", Path(__file__).with_name("test_properties.py"))
properties = importlib.util.module_from_spec(spec)
spec.loader.exec_module(properties)
F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64


def verdict(draw, B, T):
    return draw.out(B, T, dtype=I32), poisoned((B,), I32), poisoned((B,), I32)


def verify_greedy(draw):
    B, T, vocabulary = draw.whole(1, 4), draw.of([1, 2, 31, 32, 33, 64, 65, 200, 256]), draw.of([2, 3, 50])
    kind, wide = draw.of(TREES), (I32, I64)
    parents = torch.tensor([random_tree(T, kind, draw.g) for _ in range(B)]).to(draw.of(wide))
    tokens, argmax = (torch.randint(0, vocabulary, (B, T), generator=draw.g).to(draw.of(wide)) for _ in "ta")
    n_rows = torch.randint(1, T + 1, (B,), generator=draw.g).int()
    args = draw.strided(tokens), draw.strided(parents), draw.strided(argmax), n_rows
    return (lambda: ops.verify_greedy(*args, out=verdict(draw, B, T))), [(want, 0) for want in reference.verify_greedy(*args)]


def verify_sample(draw):
    B, T, V, mode = draw.whole(1, 5), draw.whole(1, 24), draw.of([25, 41, 400, 2100]), draw.of(["det", "iid", "wor"])
    logits, tokens, parents, *rest, q = sample_case(B, T, V, draw.whole(0, 999), draw.dtype, mode, draw.of(TREES))
    tokens, parents = (x.to(draw.of([I32, I64])) for x in (tokens, parents))
    args = logits, tokens, parents, *rest, draw.strided(q)
    wants = reference.verify_sample(*args, mode=mode)
    return (lambda: ops.verify_sample(*args, mode=mode, out=verdict(draw, B, T))), [(want, 0) for want in wants]


def residual_sample(draw):
    R, V = draw.whole(0, 5), draw.of([1, 2, 7, 100, 2048, 2049, 6000])
    p, q = (torch.rand(R, V, generator=draw.g) for _ in "pq")
    if draw.flag():
        p *= torch.rand(R, V, generator=draw.g) < 0.2
        p[:, draw.whole(0, V - 1)] = 0.5
    if draw.flag() and R:
        q[0] = p[0]  # nothing is left: p itself is drawn from
    p, q = (draw.strided(x.to(draw.dtype)) for x in (p, q))
    u = torch.rand(R, generator=draw.g, dtype=torch.float64)
    return (lambda: [ops.residual_sample(p, q, u, out=poisoned((R,), I32))]), [(reference.residual_sample(p.double(), q.double(), u), 0)]


def caches(draw, layers, B, S, Hkv, D):
    """Two caches of noise, in pages or not, and the table: every byte that no row goes to has to stay."""
    page, dtype = draw.of([None, 1, 4, 16]), draw.limit("cache", [draw.dtype])
    pages = B * S // (page or S)
    shape = (*layers, B, S, Hkv, D) if page is None else (*layers, pages + 2, page, Hkv, D)
    pair = [draw.normal(*shape, dtype=dtype) for _ in "kv"]
    return pair, None if page is None else draw.strided(torch.randperm(pages + 2, generator=draw.g)[:pages].view(B, -1).int())


def written(op, rows, pair, *rest, **options):
    """A call that writes caches, and the caches as the reference writes them."""
    want = [cache.clone() for cache in pair]
    getattr(reference, op)(*rows, *want, *rest, **options)
    return (lambda: [getattr(ops, op)(*rows, *pair, *rest, **options), *pair][1:]), [(cache.double(), 0) for cache in want]


def kv_append(draw):
    B, T, Hkv, D, S = draw.whole(1, 4), draw.whole(1, 9), draw.whole(1, 3), draw.of([1, 3, 8, 24, 64, 130]), 32
    pair, table = caches(draw, (), B, S, Hkv, D)
    length, rows = (torch.randint(0, high, (B,), generator=draw.g).int() for high in (S - T + 1, T + 1))
    new = [draw.normal(B, T, Hkv, D) for _ in "kv"]
    return written("kv_append", new, pair, length, n_rows=draw.of([None, rows]), page_table=table)


def kv_commit(draw):
    B, T, Hkv, D, S = draw.whole(1, 4), draw.whole(1, 9), draw.whole(1, 3), draw.of([1, 3, 8, 24, 64, 130]), 32
    layers = draw.of([(), (2,)])
    pair, table = caches(draw, layers, B, S, Hkv, D)
    length, count = (torch.randint(0, high, (B,), generator=draw.g).int() for high in (S - T + 1, T + 1))
    path = torch.stack([torch.randperm(T, generator=draw.g) for _ in range(B)]).to(draw.of([I32, I64]))
    path[torch.arange(T) >= count[:, None]] = -9  # what lies behind a path is not read
    tails = [draw.normal(*layers, B, T, Hkv, D) for _ in "kv"]
    return written("kv_commit", tails, pair, draw.strided(path), count, length, page_table=table)


def attention_colsum(draw):
    prefix = [draw.whole(0, 140) for _ in range(draw.whole(1, 3))]
    T, group, Hkv, D = draw.whole(1, 70), draw.of([1, 2, 3, 8]), draw.whole(1, 2), draw.limit("D", [64])
    kv, page, window = draw.limit("kv", [draw.dtype]), draw.of([None, 1, 16]), draw.of([None, draw.whole(1, 150)])
    rows = [draw.whole(0, T) for _ in prefix] if draw.flag() else None
    tree = draw.of(TREES)
    case = attention_case(
        prefix, T, group * Hkv, Hkv, D, dtype=draw.dtype, kv_dtype=kv, tree=tree, tail_rows=rows, page=page, seed=draw.whole(0, 99)
    )
    options, exact = {"window": window, "sink": None if window is None else draw.whole(0, 6)}, case.double()
    lse = draw.strided(reference.tree_attention(*exact.tensors, **exact.options, **options, return_lse=True)[1].float())
    options |= {**case.options, "ancestors": case.ancestors if window or draw.flag() else None}
    want = reference.attention_colsum(exact.q, exact.k, lse.double(), case.prefix_len, **options)
    return (lambda: [ops.attention_colsum(case.q, case.k, lse, case.prefix_len, **options, out=draw.out(*want.shape, dtype=F32))]), [
        (want, 5e-5 * want + 1e-6 if draw.dtype == kv else 0.05 * want + 1e-4)  # a wider q may be rounded to k's dtype
    ]


def linear(draw):
    """Dense weights and every low-bit format that the backend takes; the inputs are not rounded."""
    M, N, K, kind = draw.of([1, 2, 7, 16, 33, 70]), draw.whole(1, 140), draw.whole(1, 600), draw.of(draw.row.limits["weight"])
    perm, scale, seed = draw.flag(), draw.of([F32, BF16, torch.float16]), draw.whole(0, 17)
    dense = isinstance(kind, torch.dtype)
    weight = draw.normal(N, K, dtype=kind, size=0.05) if dense else low_bit_weight(kind, N, K, scale, perm, seed)
    x = draw.strided((torch.randn(M, weight.shape[1], generator=draw.g) * torch.rand(M, 1, generator=draw.g).exp()).to(draw.dtype))
    given = {
        "bias": draw.normal(N, dtype=draw.of([draw.dtype, F32])) if draw.flag() else None,
        "activation": draw.of([None, "silu"]),
        "residual": draw.normal(M, N, dtype=draw.of([draw.dtype, torch.float16])) if draw.flag() else None,
    }
    want, limit = exact_linear(x, weight, **given, rounds_zeros=draw.row.backend == "triton")
    if dense and draw.row.backend == "cpu" and kind == BF16:  # a level that multiplies pairs of bf16 rounds x: a random walk of 2^-8
        limit += 4 * 2**-8 * (x.double().square() @ weight.double().square().T).sqrt()
    how = {} if dense else {"activations": "exact"}
    return (lambda: [ops.linear(x, weight, **given, **how, out=draw.out(M, N))]), [(want, limit)]


def table_draft(draw):
    B, T, V, W = draw.whole(0, 5), draw.of([1, 2, 31, 33, 81, 200, 256]), draw.of([1, 2, 5, 300]), draw.whole(1, 9)
    table, roots = draw.strided(torch.randint(-1 - V // 9, V + 1, (V, W), generator=draw.g).int()), draw.index(V + 1, B)
    parents, ranks = torch.tensor(random_tree(T, draw.of(TREES), draw.g)).int(), torch.randint(0, W, (T,), generator=draw.g).int()
    parents[torch.rand(T, generator=draw.g) < draw.of([0, 0.05])] = -1
    args = table, draw.strided(roots), draw.strided(parents), draw.strided(ranks)
    return (lambda: [ops.table_draft(*args, out=draw.out(B, T, dtype=I32))]), [(reference.table_draft(*args), 0)]


def table_learn(draw):
    M, V, W = draw.of([0, 1, 2, 31, 33, 200]), draw.of([1, 2, 5, 300]), draw.whole(1, 40)
    table, likely = (
        draw.strided(torch.randint(-9, 999, (n, W + more), generator=draw.g).int()) for n, more in ((V, 0), (M, draw.whole(0, 3)))
    )
    tokens, want = draw.strided(torch.randint(-1, V + 1, (M,), generator=draw.g).int()), table.clone()
    reference.table_learn(want, tokens, likely)
    return (lambda: [ops.table_learn(table, tokens, likely), table][1:]), [(want, 0)]


TABLE = verify_greedy, verify_sample, residual_sample, kv_append, kv_commit, attention_colsum, linear, table_draft, table_learn


def test_every_op_has_properties():
    from ramify import backends

    assert {op.__name__ for op in (*TABLE, *properties.TABLE)} == set(backends.OPS)


@pytest.mark.parametrize(("op", "backend", "level"), properties.cases(TABLE))
def test_any_call(op, backend, level, request):
    properties.hold(op, backend, level, request, examples={"cpu": 30, "triton": 15, "cuda": 60})
