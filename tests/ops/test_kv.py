"""kv_append and kv_commit: exact values in exact slots, and every other byte as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import ops
from ramify.testing.tensors import padded, running, runs

F32, BF16 = torch.float32, torch.bfloat16


def caches(B, S, Hkv, D, dtype, page=None, seed=0):
    """Two caches of noise, and for pages a shuffled table over a pool that holds three pages of nobody."""
    g = torch.Generator().manual_seed(seed)
    if page is None:
        return *(padded(torch.randn(B, S, Hkv, D, generator=g).to(dtype)) for _ in "kv"), None
    pool = (padded(torch.randn(B * S // page + 3, page, Hkv, D, generator=g).to(dtype)) for _ in "kv")
    return *pool, torch.randperm(B * S // page + 3, generator=g)[: B * S // page].view(B, -1).int()


def slot(cache, table, b, s):
    """The [Hkv, D] of one slot, by plain indexing."""
    return cache[b, s] if table is None else cache[int(table[b, s // cache.shape[1]]), s % cache.shape[1]]


@pytest.mark.parametrize(("backend", "level"), runs("kv_append"))
@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_append(backend, level, page, dtype, cache_dtype, B):
    S, T, Hkv, D = 128, 20, 2, 8
    k, v = torch.randn(2, B, T, Hkv, D, generator=torch.Generator().manual_seed(B)).to(dtype)
    k_cache, v_cache, table = caches(B, S, Hkv, D, cache_dtype, page)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    length, rows = torch.tensor([0, 7, 108, 63, 100][:B], dtype=torch.int32), torch.tensor([20, 0, 20, 2, 1][:B], dtype=torch.int32)
    for b in range(B):
        for t in range(int(rows[b])):
            slot(want_k, table, b, int(length[b]) + t).copy_(k[b, t])
            slot(want_v, table, b, int(length[b]) + t).copy_(v[b, t])
    before = length.clone()
    with running(backend, level):
        assert ops.kv_append(padded(k), padded(v), k_cache, v_cache, length, n_rows=rows, page_table=table) is None
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v) and torch.equal(length, before)


@pytest.mark.parametrize(("backend", "level"), runs("kv_commit"))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(page=st.sampled_from([None, 1, 16, 64]), B=st.integers(1, 4), T=st.integers(1, 12), seed=st.integers(0, 999), wide=st.booleans())
def test_commit(backend, level, page, B, T, seed, wide):
    """Random ascending paths of random lengths, 0 included, land behind the prefix; path entries past the end are garbage."""
    S, Hkv, D, g = 64, 1, 4, torch.Generator().manual_seed(seed)
    tail_k, tail_v = torch.randn(2, B, T, Hkv, D, generator=g)
    k_cache, v_cache, table = caches(B, S, Hkv, D, F32, page, seed)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    path = torch.full((B, T), -9, dtype=torch.int64 if wide else torch.int32)
    count, length = torch.randint(0, T + 1, (B,), generator=g).int(), torch.randint(0, S - T + 1, (B,), generator=g).int()
    for b in range(B):
        rows = torch.randperm(T, generator=g)[: int(count[b])].sort().values
        path[b, : len(rows)] = rows
        for i, row in enumerate(rows.tolist()):
            slot(want_k, table, b, int(length[b]) + i).copy_(tail_k[b, row])
            slot(want_v, table, b, int(length[b]) + i).copy_(tail_v[b, row])
    with running(backend, level):
        ops.kv_commit(tail_k, tail_v, k_cache, v_cache, path, count, length, page_table=table)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)


@pytest.mark.parametrize(("backend", "level"), runs("kv_commit"))
@pytest.mark.parametrize("page", [None, 16])
def test_commit_of_all_layers(backend, level, page):
    """A fifth axis in front: the same as one call a layer."""
    L, B, T, S, Hkv, D, g = 3, 2, 5, 48, 3, 24, torch.Generator().manual_seed(1)
    tails = [padded(torch.randn(L, B, T, Hkv, D, generator=g)) for _ in "kv"]
    pool = (L, B, S, Hkv, D) if page is None else (L, B * S // page, page, Hkv, D)
    caches = [padded(torch.randn(pool, generator=g).bfloat16()) for _ in "kv"]
    table = None if page is None else torch.randperm(B * S // page, generator=g).view(B, -1).int()
    path, count, length = torch.tensor([[0, 2, 3], [0, 4, 99]]).int(), torch.tensor([3, 2]).int(), torch.tensor([14, 45]).int()
    want = [c.clone() for c in caches]
    for layer in zip(*tails, *want):
        ops.kv_commit(*layer, path, count, length, page_table=table)
    with running(backend, level):
        ops.kv_commit(*tails, *caches, path, count, length, page_table=table)
    assert all(torch.equal(got, right) for got, right in zip(caches, want))
    assert torch.equal(caches[0][:, 0, 16] if page is None else caches[0][:, table[0, 1], 0], tails[0][:, 0, 3].bfloat16())


def test_says_what_it_does_not_take():
    k, one = torch.randn(2, 3, 1, 4), torch.ones(2, dtype=torch.int32)
    cache, other, path = torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4), torch.zeros(2, 3, dtype=torch.int32)
    table = torch.zeros(2, 2, dtype=torch.int32)
    bad = [
        (ops.kv_append, (k, k, cache, other, one * 6), {}, ValueError, "length[0] is 6 and 3 rows follow; takes 8 slots in all"),
        (ops.kv_append, (k, k, cache, other, one), {"n_rows": one * 4}, ValueError, "n_rows[0] is 4; takes 0 to 3"),
        (ops.kv_append, (k, k, cache, other, one.long()), {}, TypeError, "length is int64; takes int32 [B]. Use length.int()"),
        (ops.kv_append, (k, k, cache[..., :3], other, one), {}, ValueError, "k_cache is [2, 8, 1, 3]"),
        (ops.kv_append, (k, k, cache, other, one), {"page_table": table + 2}, ValueError, "page_table[0] names page"),
        (ops.kv_commit, (k, k, cache, other, path + 3, one, one), {}, ValueError, "path[0, 0] is 3; takes 0 to 2"),
        (ops.kv_commit, (k, k, cache, other, path, one * 4, one), {}, ValueError, "count[0] is 4; takes 0 to 3"),
        (ops.kv_commit, (k, k, cache, other, path, one, one - 2), {}, ValueError, "length[0] is -1"),
        (ops.kv_commit, (k, k, cache, cache.bfloat16(), path, one, one), {}, TypeError, "v_cache is bfloat16; takes float32"),
    ]
    for op, args, kwargs, kind, said in bad:
        with pytest.raises(kind) as error:
            op(*args, **kwargs)
        assert said in str(error.value) and str(error.value).startswith(f"{op.__name__}: "), str(error.value)
    assert not cache.any() and not other.any()  # a refused call has written nothing
