"""row_stats, topk_logits and verify_greedy: odd widths, padded rows, ties, masked columns, poisoned outputs, random trees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import ops, reference
from ramify.testing.tensors import TREES, padded, path_of, poisoned, random_tree, running, runs, threads

F32, BF16 = torch.float32, torch.bfloat16
I32 = torch.int32
SHAPES = [(1, 1), (1, 129), (2, 4097), (5, 32000), (64, 1000), (2, 128256)]  # R, V
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def make_logits(R, V, dtype):
    """Realistic spread, a row stride whose gap is NaN, every 5th column masked, an exact tie for the maximum."""
    x = padded(4 * torch.randn(R, V, generator=torch.Generator().manual_seed(R * V)).to(dtype), 7)
    if V > 20:
        x[:, ::5], x[:, V // 2], x[:, V - 1] = -torch.inf, 30, 30
    return x


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("row_stats"))
@pytest.mark.parametrize(("R", "V"), SHAPES)
def test_row_stats(backend, level, dtype, R, V):
    x = make_logits(R, V, dtype)
    with running(backend, level):
        got = ops.row_stats(x, out=(poisoned((R,), I32), poisoned((R,)), poisoned((R,))))
        with threads(2):
            alone = ops.row_stats(x[-1:])
    want = reference.row_stats(x.double())
    assert torch.equal(got.argmax.long(), want.argmax)  # exact: the first of equal maxima
    assert torch.equal(got.max, want.max.float())  # exact: a maximum does not round
    if level:
        assert all(torch.equal(a, b[-1:]) for a, b in zip(alone, got))  # a row's bits are its own
    # per row, never averaged: twice what torch loses in f32 on this row, or 4 ulp of the result
    limit = torch.maximum(2 * (reference.row_stats(x.float()).lse - want.lse).abs(), 2**-21 * want.lse.abs().clamp_min(1))
    worst = ((got.lse - want.lse).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"row {worst.argmax()}: lse {got.lse[worst.argmax()]}, wanted {want.lse[worst.argmax()]}"


@pytest.mark.parametrize(("backend", "level"), runs("row_stats"))
def test_rows_of_nothing_but_masks(backend, level):
    with running(backend, level):
        stats = ops.row_stats(torch.full((2, 700), -torch.inf))
        values, ids = ops.topk_logits(torch.full((2, 700), -torch.inf), 3)
    assert stats.argmax.tolist() == [0, 0] and (stats.max == -torch.inf).all() and (stats.lse == -torch.inf).all()
    assert (values == -torch.inf).all() and (ids == -1).all()


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("row_stats"))
def test_nan_and_infinity(backend, level, dtype):
    """NaN is the largest of all, wherever in its row it stands and however many there are; a row beside it does not notice."""
    g = torch.Generator().manual_seed(5)
    x = make_logits(60, 1500, dtype)
    for r in range(50):
        for value in [torch.nan, -torch.nan, torch.inf][: 1 + r % 3]:
            x[r, torch.randint(0, 1500, (1 + r % 7,), generator=g)] = value
    x[50], x[51, :] = torch.nan, -torch.inf
    x[51, 1499] = torch.nan
    x[52, 700:703], x[53, [3, 1100]] = torch.inf, torch.inf
    with running(backend, level):
        got = ops.row_stats(x)
        values, ids = ops.topk_logits(x, 9)
    want, (want_values, want_ids) = reference.row_stats(x.double()), reference.topk_logits(x, 9)
    assert torch.equal(got.argmax.long(), want.argmax) and torch.equal(want.argmax, ids[:, 0].long())
    assert torch.equal(got.max.nan_to_num(7), want.max.float().nan_to_num(7))
    assert torch.equal(got.lse.isnan(), x.isnan().any(-1)) and torch.equal(got.max.isnan(), x.isnan().any(-1))
    assert torch.equal(got.lse.isposinf(), (x == torch.inf).any(-1) & ~x.isnan().any(-1)) and torch.isfinite(got.lse[54:]).all()
    assert torch.equal(ids.long(), want_ids) and torch.equal(values.nan_to_num(7), want_values.nan_to_num(7))


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("topk_logits"))
@pytest.mark.parametrize(("R", "V", "k"), [(1, 1, 1), (5, 129, 32), (2, 4097, 8), (3, 32000, 5), (40, 600, 10), (2, 24, 24)])
def test_topk(backend, level, dtype, R, V, k):
    """bf16 logits of this many columns tie all over: the lower column comes first."""
    x = make_logits(R, V, dtype)
    with running(backend, level):
        values, ids = ops.topk_logits(x, k, out=(poisoned((R, k), dtype), poisoned((R, k), I32)))
    want, where = reference.topk_logits(x, k)
    assert torch.equal(values, want) and torch.equal(ids.long(), where)


def test_topk_falls_back_above_its_limit():
    x = make_logits(2, 500, F32)
    values, ids = ops.topk_logits(x, 100)
    assert torch.equal(values, x.sort(descending=True, stable=True).values[:, :100]) and ids.dtype == I32


@pytest.mark.parametrize(("backend", "level"), runs("verify_greedy"))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.sampled_from([1, 2, 5]), T=st.integers(1, 40), kind=st.sampled_from(TREES), seed=st.integers(0, 999),
    vocabulary=st.sampled_from([2, 5, 50]), wide=st.booleans(),
)  # fmt: skip
def test_verify_greedy(backend, level, B, T, kind, seed, vocabulary, wide):
    """The path found is the longest of all root paths on which every row holds its parent's arg-max."""
    g = torch.Generator().manual_seed(seed)
    trees = [random_tree(T, kind, g) for _ in range(B)]
    dtype = torch.int64 if wide else I32
    tokens, argmax = torch.randint(0, vocabulary, (2, B, T), generator=g).to(dtype)
    n_rows = torch.randint(1, T + 1, (B,), generator=g).int()
    for b, parents in enumerate(trees):  # siblings hold distinct tokens, as drafters make them
        for i in range(1, T):
            used = {int(tokens[b, j]) for j in range(i) if parents[j] == parents[i]}
            tokens[b, i] = next(t for t in [int(tokens[b, i]), *range(T + vocabulary)] if t not in used)
    out = poisoned((B, T), I32), poisoned((B,), I32), poisoned((B,), I32)
    with running(backend, level):
        path, count, bonus = ops.verify_greedy(tokens, torch.tensor(trees).to(dtype), argmax, n_rows, out=out)
    for b, parents in enumerate(trees):
        paths = [path_of(parents, r) for r in range(int(n_rows[b]))]
        good = [p for p in paths if all(tokens[b, row] == argmax[b, parents[row]] for row in p[1:])]
        best = max(good, key=len)
        assert path[b].tolist() == best + [-1] * (T - len(best)) and int(count[b]) == len(best)
        assert int(bonus[b]) == int(argmax[b, best[-1]])


def test_says_what_it_does_not_take():
    x, t, n = torch.randn(3, 8), torch.zeros(2, 3, dtype=I32), torch.tensor([3, 2], dtype=I32)
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 0]], dtype=I32)
    bad = [
        (ops.row_stats, (x[0],), ValueError, "logits is [8]; takes 2 axes [R, V]"),
        (ops.row_stats, (x[:, :0],), ValueError, "logits is [3, 0]; takes [R, V] with V of 1 or more"),
        (ops.row_stats, (x.T,), ValueError, "Use logits.contiguous()"),
        (ops.topk_logits, (x, 0), ValueError, "k is 0; takes 1 or more"),
        (ops.topk_logits, (x, 9), ValueError, "k is 9; takes 1 to 8, the columns of logits"),
        (ops.topk_logits, (x, 2.0), TypeError, "k is 2.0; takes a whole number"),
        (ops.verify_greedy, (t, parents, t.float(), n), TypeError, "argmax is float32"),
        (ops.verify_greedy, (t, parents, t, n + 1), ValueError, "n_rows[0] is 4; takes 1 to 3"),
        (ops.verify_greedy, (t, parents + 1, t, n), ValueError, "parents[0, 0] is 0; takes -1"),
        (ops.verify_greedy, (t, parents[:, [0, 2, 1]], t, n), ValueError, "parents[0, 1] is 1; takes 0 to 0"),
        (ops.verify_greedy, (t, parents, t, n[:1]), ValueError, "n_rows is [1]; takes [B] with B = 2"),
    ]
    for op, args, kind, said in bad:
        with pytest.raises(kind) as error:
            op(*args)
        assert said in str(error.value) and str(error.value).startswith(f"{op.__name__}: "), str(error.value)
