"""The CUDA kernels against the reference: under the emulator in every schedule, and on a GPU where there is one.

Odd widths, padded rows that forbid wide loads, ties, masked columns, outputs that hold NaN before the call.
"""

import ctypes

import pytest
import torch

import ramify
from ramify import native_cuda, ops, reference
from ramify.ops import _cuda, _cuda_linear
from ramify.testing.linear import low_bit_weight
from ramify.testing.tensors import TREES, attention_case, intervals, padded, poisoned, random_tree, sample_case

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
ROUNDING = {F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-10}  # two roundings of a result


def near(got, want, dtype, scale=1.0):
    """Each value within two roundings of itself, or of `scale`, of the reference in double."""
    limit = ROUNDING[dtype] * want.abs().clamp_min(scale) + 2e-6
    worst = ((got.double().cpu() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"at {(worst == worst.max()).nonzero()[0].tolist()}: {worst.max():.3g} limits away"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_structs_are_those_of_the_kernels(emulated):
    sizes = {args.__name__: emulated.size(args.kernel) for args in native_cuda.STRUCTS}
    assert sizes == {args.__name__: ctypes.sizeof(args) for args in native_cuda.STRUCTS}
    assert [args.kernel for args in native_cuda.STRUCTS] == list(range(len(sizes))) and emulated.size(len(sizes)) == -1


def test_launch(place):
    out = torch.full((300,), -7, dtype=I32, device=place.device)
    with place.running():
        native_cuda.run(native_cuda.FillArgs(out=out.data_ptr(), count=299, value=5), out)
    assert out.tolist() == [*range(5, 304), -7]


@DTYPES
@pytest.mark.parametrize(("rows", "width", "gap"), [(1, 1, 0), (5, 33, 0), (3, 64, 8), (2, 130, 3), (2, 2056, 0), (1, 4099, 5)])
def test_rms_norm(place, dtype, rows, width, gap):
    g = generator(width)
    x, residual = (padded(torch.randn(rows, width, generator=g).to(dtype), gap).to(place.device) for _ in "xr")
    weight = torch.randn(width, generator=g).to(BF16 if dtype == F32 else dtype).to(place.device)

    def call():
        out, total = (padded(poisoned((rows, width), dtype), gap).to(place.device) for _ in "ot")
        ops.rms_norm(x, weight, residual, out=(out, total))
        return out, total, ops.rms_norm(x, weight), ops.rms_norm(x[-1:], weight)

    normed, total, plain, alone = place.everywhere(call)
    x, residual, weight = (t.double().cpu() for t in (x, residual, weight))
    want, summed = reference.rms_norm(x.to(dtype), weight.to(dtype), residual.to(dtype))
    assert torch.equal(total.cpu(), summed)
    near(normed, reference.rms_norm(summed.double(), weight), dtype, 0.1)
    near(plain, reference.rms_norm(x, weight), dtype, 0.1)
    assert torch.equal(alone, plain[-1:])  # a row's bits are its own


def test_rms_norm_of_live_rows(place):
    """Rows from the count on, which lies on the device, stay as they were."""
    x, out = torch.randn(4, 40, device=place.device), torch.full((4, 40), 7.0, device=place.device)
    weight, live = torch.ones(40, device=place.device), torch.tensor([3], dtype=I32, device=place.device)
    args = native_cuda.RmsNormArgs(live=live.data_ptr(), rows=4, hidden=40, x=x.data_ptr(), x_stride=40, weight=weight.data_ptr(), eps=1e-6)
    args.out, args.out_stride = out.data_ptr(), 40
    with place.running():
        native_cuda.run(args, live, x, weight, out)
    near(out[:3], reference.rms_norm(x[:3].double().cpu(), weight.double().cpu()), F32)
    assert (out[3] == 7).all()


@DTYPES
@pytest.mark.parametrize(("rows", "F", "gap"), [(1, 1, 0), (3, 24, 0), (2, 100, 3), (2, 2100, 4)])
def test_silu_mul(place, dtype, rows, F, gap):
    x = padded(3 * torch.randn(rows, 2 * F, generator=generator(F)).to(dtype), gap).to(place.device)
    got = place.everywhere(lambda: ops.silu_mul(x, out=poisoned((rows, F), dtype).to(place.device)))
    near(got, reference.silu_mul(x.double().cpu()), dtype, 0.1)


@DTYPES
@pytest.mark.parametrize(("H", "D", "half"), [(1, 2, 1), (3, 64, 32), (2, 96, 48), (2, 80, 16), (5, 128, 64)])
def test_rope(place, dtype, H, D, half):
    g = generator(D)
    x = padded(torch.randn(2, 3, H, D, generator=g).to(dtype)).to(place.device)
    angle = torch.rand(20, half, generator=g) * 6
    cos, sin, at = angle.cos().to(place.device), angle.sin().to(place.device), torch.randint(0, 20, (2, 3), generator=g).to(place.device)
    got = place.everywhere(lambda: ops.rope(x, cos, sin, at, out=poisoned(x.shape, dtype).to(place.device)))
    near(got, reference.rope(x.double().cpu(), cos.double().cpu(), sin.double().cpu(), at.cpu()), dtype)


@pytest.mark.parametrize("table_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("H", [1, 40, 264])
def test_embed(place, table_dtype, H):
    table = torch.randn(11, H, generator=generator(H)).to(table_dtype).to(place.device)
    ids = torch.tensor([[3, 10], [0, 3]], device=place.device)
    got = place.everywhere(lambda: ops.embed(ids, table, dtype=BF16))
    assert torch.equal(got.cpu(), table.cpu()[ids.cpu()].to(BF16))
    with place.running():  # what the checks of the CPU would refuse gives NaN on a device
        out = torch.zeros(3, H, device=place.device)
        _cuda.embed((out,), torch.tensor([-1, 2, 11], device=place.device), table)
    assert out[[0, 2]].isnan().all() and torch.equal(out[1].cpu(), table[2].float().cpu())


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("Hq", "Hkv", "D", "half"), [(2, 1, 64, 32), (3, 3, 96, 48), (4, 2, 128, 64), (1, 1, 256, 128), (2, 1, 80, 16)])
def test_rope_append(place, dtype, norm, Hq, Hkv, D, half):
    g, M, S, cache = generator(D + Hq), 5, 9, BF16 if dtype == F32 else dtype
    qkv = padded(torch.randn(M, (Hq + 2 * Hkv) * D, generator=g).to(dtype)).to(place.device)
    angle = torch.rand(30, half, generator=g) * 6
    cos, sin = angle.cos().to(place.device), angle.sin().to(place.device)
    at, slots = (t[:M].int().to(place.device) for t in (torch.randperm(30, generator=g), torch.randperm(S, generator=g)))
    norms = [torch.randn(D, generator=g).to(dtype).to(place.device) if norm else None for _ in "qk"]

    slots[1] = -1
    k, v = (padded(poisoned((S, Hkv, D), cache)) for _ in "kv")

    def call():
        stores = [t.clone().to(place.device) for t in (k, v)]
        q = ops.rope_append(qkv, cos, sin, at, slots, *stores, q_norm=norms[0], k_norm=norms[1], eps=1e-5)
        return q, *stores

    q, *stores = (t.cpu() for t in place.everywhere(call))
    want = [torch.full((S, Hkv, D), torch.nan, dtype=torch.float64) for _ in "kv"]
    *wide, q_norm, k_norm = (None if t is None else t.double().cpu() for t in (qkv, cos, sin, *norms))
    want_q = reference.rope_append(*wide, at.cpu(), slots.cpu(), *want, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
    near(q, want_q, dtype)
    used = torch.zeros(S, dtype=torch.bool).index_fill(0, slots.cpu()[slots.cpu() >= 0].long(), True)
    near(stores[0][used], want[0][used], cache)
    assert torch.equal(stores[1][used], want[1][used].to(cache))
    assert all(store[~used].isnan().all() for store in stores)


def test_rope_append_outside_its_tables(place):
    """What the checks of the CPU would refuse: a position outside the tables gives NaN, a slot outside the cache stores nothing."""
    qkv, table, at = torch.randn(3, 4 * 32), torch.rand(5, 16), torch.tensor([4, 5, -1], dtype=I32)
    q, k, v = torch.empty(3, 2, 32), torch.zeros(6, 1, 32), torch.zeros(6, 1, 32)
    data = [t.to(place.device) for t in (q, qkv, table, table, at, torch.tensor([6, 2, -7], dtype=I32), k, v)]
    with place.running():
        _cuda.rope_append(*data, None, None, 1e-6)
    q, k, v = (t.cpu() for t in (data[0], data[6], data[7]))
    assert q[0].isfinite().all() and q[1:].isnan().all() and k[2].isnan().all() and torch.equal(v[2, 0], qkv[1, 96:])
    assert not k[[0, 1, 3, 4, 5]].any() and not v[[0, 1, 3, 4, 5]].any()


def caches(L, B, S, Hkv, D, dtype, page, g):
    """Two caches of all layers, padded, and a shuffled page table over a pool that holds two pages of nobody."""
    if page is None:
        return *(padded(torch.randn(L, B, S, Hkv, D, generator=g).to(dtype)) for _ in "kv"), None
    pages = B * S // page + 2
    table = torch.randperm(pages, generator=g)[: B * S // page].view(B, -1).int()
    return *(padded(torch.randn(L, pages, page, Hkv, D, generator=g).to(dtype)) for _ in "kv"), table


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(F32, F32), (BF16, BF16), (F32, F16)], ids=str)
@pytest.mark.parametrize(("page", "D"), [(None, 64), (16, 40), (64, 128)])
def test_commit_of_all_layers(place, dtype, cache_dtype, page, D):
    g, (L, B, T, S, Hkv) = generator(D), (3, 3, 6, 64, 2)
    tail_k, tail_v = (padded(torch.randn(L, B, T, Hkv, D, generator=g).to(dtype)) for _ in "kv")
    k, v, table = caches(L, B, S, Hkv, D, cache_dtype, page, g)
    count, length = torch.tensor([4, 0, 6], dtype=I32), torch.tensor([14, 5, 58], dtype=I32)
    path = torch.stack([torch.randperm(T, generator=g).sort().values for _ in range(B)]).int()
    path[0, :4], path[0, 4:] = torch.tensor([0, 2, 3, 5]), -9
    want_k, want_v = k.clone(), v.clone()
    for layer in range(L):
        reference.kv_commit(tail_k[layer], tail_v[layer], want_k[layer], want_v[layer], path, count, length, page_table=table)
    data = [None if t is None else t.to(place.device) for t in (tail_k, tail_v, path, count, length, table)]

    def call():
        caches = [t.clone().to(place.device) for t in (k, v)]
        _cuda.commit_layers(*data[:2], *caches, *data[2:])
        return tuple(caches)

    got_k, got_v = place.everywhere(call)
    assert torch.equal(got_k.cpu(), want_k) and torch.equal(got_v.cpu(), want_v)


def test_commit_leaves_what_does_not_exist_alone(place):
    """Rows, slots and pages outside their tensors are not written: no check on a device could have refused them."""
    tail = torch.ones(1, 1, 4, 1, 8, device=place.device)
    path = torch.tensor([[0, 9, -1, 3]], dtype=I32, device=place.device)
    four, table = torch.tensor([4], dtype=I32, device=place.device), torch.tensor([[1, 7]], dtype=I32, device=place.device)
    cache, pool = torch.zeros(1, 1, 6, 1, 8, device=place.device), torch.zeros(1, 2, 4, 1, 8, device=place.device)
    with place.running():
        _cuda.commit_layers(tail, tail, cache, cache.clone(), path, four, four, None)  # slots 4 to 7 of 6
        _cuda.commit_layers(tail, tail, pool, pool.clone(), None, four, four - 2, table)  # slots 2 to 5, the last two in page 7 of 2
    assert cache[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 0] and pool[0, :, :, 0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_append_through_the_op(place):
    g = generator(1)
    k, v, length, rows = (
        torch.randn(2, 5, 2, 24, generator=g),
        torch.randn(2, 5, 2, 24, generator=g),
        torch.tensor([3, 9]),
        torch.tensor([5, 2]),
    )
    k_cache, v_cache, table = caches(1, 2, 32, 2, 24, F32, 16, g)
    k_cache, v_cache = k_cache[0], v_cache[0]
    want = k_cache.clone(), v_cache.clone()
    reference.kv_append(k, v, *want, length.int(), n_rows=rows.int(), page_table=table)
    data = [t.to(place.device) for t in (k, v, k_cache, v_cache, length.int())]
    with place.running():
        ops.kv_append(*data, n_rows=rows.int().to(place.device), page_table=table.to(place.device))
    assert torch.equal(data[2].cpu(), want[0]) and torch.equal(data[3].cpu(), want[1])


def make_logits(R, V, dtype):
    """Realistic spread, a row stride whose gap is NaN, every 5th column masked, an exact tie for the maximum, zeros of both signs."""
    x = padded(4 * torch.randn(R, V, generator=generator(R * V)).to(dtype), 7 if V % 2 else 8)
    if V > 20:
        x[:, ::5], x[:, V // 2], x[:, V - 1], x[:, 3], x[:, 4] = -torch.inf, 30, 30, 0.0, -0.0
    return x


@DTYPES
@pytest.mark.parametrize(("R", "V"), [(1, 1), (1, 129), (2, 4097), (3, 9000), (1, 32000)])
def test_row_stats(place, dtype, R, V):
    x = make_logits(R, V, dtype).to(place.device)

    def call():
        outs = poisoned((R,), I32), poisoned((R,)), poisoned((R,))
        return *ops.row_stats(x, out=tuple(t.to(place.device) for t in outs)), *ops.row_stats(x[-1:])

    argmax, lse, top, *alone = (t.cpu() for t in place.everywhere(call))
    want = reference.row_stats(x.double().cpu())
    assert torch.equal(argmax.long(), want.argmax) and torch.equal(top, want.max.float())  # exact: nothing rounds
    assert all(torch.equal(one, all[-1:]) for one, all in zip(alone, (argmax, lse, top)))  # a row's bits are its own
    # twice what torch loses in f32 on this row, or 4 ulp of the result
    limit = torch.maximum(2 * (reference.row_stats(x.float().cpu()).lse - want.lse).abs(), 2**-21 * want.lse.abs().clamp_min(1))
    assert ((lse - want.lse).abs() <= limit).all()


@DTYPES
@pytest.mark.parametrize(("R", "V", "k"), [(1, 1, 1), (2, 129, 32), (1, 4097, 8), (2, 9000, 5), (1, 24, 24), (1, 20000, 2)])
def test_topk(place, dtype, R, V, k):
    """16-bit logits of this many columns tie all over: the lower column comes first."""
    x = make_logits(R, V, dtype).to(place.device)
    values, ids = place.everywhere(
        lambda: ops.topk_logits(x, k, out=(poisoned((R, k), dtype).to(place.device), poisoned((R, k), I32).to(place.device)))
    )
    want, where = reference.topk_logits(x.cpu(), k)
    assert torch.equal(values.cpu(), want) and torch.equal(ids.cpu().long(), where)


def test_rows_of_nothing_but_masks(place):
    x = torch.full((2, 5000), -torch.inf, device=place.device)
    with place.running():
        stats, (values, ids) = ops.row_stats(x), ops.topk_logits(x, 3)
    assert stats.argmax.tolist() == [0, 0] and (stats.max == -torch.inf).all() and (stats.lse == -torch.inf).all()
    assert (values == -torch.inf).all() and (ids == -1).all()


@DTYPES
def test_nan_is_the_largest_of_all(place, dtype):
    """As on the CPU: the first NaN is the arg-max, maximum and log-sum-exp are NaN; infinity alone gives infinity; other rows unmoved."""
    x = make_logits(6, 9000, dtype)
    x[0, [8000, 70]], x[1, 5000], x[2, [12, 8999]], x[3], x[4, 4096:] = torch.nan, -torch.nan, torch.inf, torch.nan, torch.inf
    with place.running():
        got, (values, ids) = ops.row_stats(x.to(place.device)), ops.topk_logits(x.to(place.device), 4)
    want, (want_values, want_ids) = reference.row_stats(x.double()), reference.topk_logits(x, 4)
    assert torch.equal(got.argmax.cpu().long(), want.argmax) and torch.equal(ids.cpu().long(), want_ids)
    for one, other in ((got.max, want.max.float()), (values, want_values)):
        assert torch.equal(one.cpu().nan_to_num(7), other.nan_to_num(7))
    assert torch.equal(got.lse.cpu().isnan(), want.lse.isnan()) and torch.equal(got.lse.cpu().isposinf(), want.lse.isposinf())
    assert abs(float(got.lse[5]) - float(want.lse[5])) < 1e-4


def test_zeros_of_both_signs_are_equal(place):
    x = torch.full((1, 600), -1.0, device=place.device)
    x[0, [7, 300]], x[0, 100] = -0.0, 0.0
    with place.running():
        assert ops.row_stats(x).argmax.tolist() == [7] and ops.topk_logits(x, 4)[1].tolist() == [[7, 100, 300, 0]]


def trees(B, T, kind, vocabulary, seed):
    """tokens, parents [B, T] and rows in use; siblings hold distinct tokens, as drafters make them."""
    g = generator(seed)
    parents = torch.tensor([random_tree(T, kind, g) for _ in range(B)], dtype=I32)
    tokens = torch.randint(0, vocabulary, (B, T), generator=g)
    for b in range(B):
        for parent in set(parents[b].tolist()) - {-1}:
            children = (parents[b] == parent).nonzero().flatten()
            tokens[b, children] = torch.randperm(max(vocabulary, T), generator=g)[: len(children)] % max(vocabulary, len(children))
    return tokens.int(), parents, torch.randint(1, T + 1, (B,), generator=g).int()


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(("B", "T", "vocabulary"), [(1, 1, 2), (3, 33, 2), (2, 70, 3), (1, 256, 2)])
def test_verify_greedy(place, kind, B, T, vocabulary):
    tokens, parents, rows = trees(B, T, kind, vocabulary, T)
    argmax = torch.randint(0, vocabulary, (B, T), generator=generator(T + 1)).int()
    data = [t.to(place.device) for t in (tokens, parents, argmax, rows)]
    outs = [poisoned(shape, I32).to(place.device) for shape in ((B, T), (B,), (B,))]
    got = place.everywhere(lambda: tuple(t.clone() for t in ops.verify_greedy(*data, out=tuple(outs))))
    for made, want in zip(got, reference.verify_greedy(tokens, parents, argmax, rows)):
        assert torch.equal(made.cpu(), want)


def test_a_failed_launch_is_an_exception(place):
    with place.running(), pytest.raises(native_cuda.CudaError, match="RowStatsArgs"):
        x = torch.zeros(1, 8, device=place.device)
        native_cuda.run(native_cuda.RowStatsArgs(B=1, T=1, V=8, topk=99, logits=x.data_ptr(), type=0), x)


def calls():
    """One small launch of every kernel, ragged and with tails in every direction: what the sanitizers watch."""
    g = generator(0)

    def rand(*shape, dtype=F32):
        return padded(torch.randn(*shape, generator=g).to(dtype), 3)

    angle = torch.rand(8, 16, generator=g)
    at = torch.tensor([7, 0, 3], dtype=I32)
    for dtype in (F32, BF16):
        x, weight = rand(3, 70, dtype=dtype), torch.randn(70, generator=g)
        ops.rms_norm(x, weight, x)
        ops.silu_mul(x)
        ops.embed(at, rand(8, 20, dtype=dtype), dtype=F16)
        ops.rope(rand(3, 2, 40, dtype=dtype), angle, angle, at)
        slots = (torch.zeros(8, 1, 32, dtype=dtype), torch.zeros(8, 1, 32, dtype=dtype))
        ops.rope_append(rand(3, 128, dtype=dtype), angle, angle, at, at, *slots, q_norm=torch.ones(32))
        ops.row_stats(rand(1, 4200, dtype=dtype))
        ops.topk_logits(rand(1, 4200, dtype=dtype), 5)
    logits, how = rand(2, 4200), (torch.ones(2), torch.arange(2), torch.arange(2))
    _cuda.decide_rows(logits, at[:2].clone(), *poisoned((2, 2)), poisoned((2, 3)), poisoned((2, 3), I32), *how, poisoned((2,), I32))
    a, b, c, d = torch.ones(16, 16).bfloat16(), torch.ones(16, 8).bfloat16(), torch.ones(16, 8), torch.ones(16, 8)
    native_cuda.run(native_cuda.MmaArgs(type=1, a=a.data_ptr(), b=b.data_ptr(), c=c.data_ptr(), d=d.data_ptr()), a, b, c, d)
    k, v, table = caches(1, 2, 32, 1, 24, BF16, 16, g)
    count = torch.tensor([2, 0], dtype=I32)
    _cuda.commit_layers(rand(1, 2, 2, 1, 24), rand(1, 2, 2, 1, 24), k, v, None, count, torch.tensor([15, 3], dtype=I32), table)
    tokens, parents, rows = trees(2, 12, "bushy", 9, 3)
    ops.verify_greedy(tokens, parents, tokens, rows)
    successors = padded(torch.randint(0, 9, (9, 3), generator=g).int(), 3)
    guesses = ops.table_draft(successors, at[1:], parents[0], parents[1].clamp(0, 2))
    ops.table_learn(successors, guesses.view(-1)[3:], torch.ones(21, 5, dtype=I32))
    *given, q = sample_case(2, 3, 30, 132, mode="wor", tree="star")  # of the second tree both children are rejected
    ops.verify_sample(*given, padded(q), mode="wor")
    ops.residual_sample(rand(2, 2100).softmax(-1), rand(2, 2100).softmax(-1), torch.tensor([0.1, 0.9], dtype=torch.float64))
    o = rand(3, 2, 40, dtype=BF16)
    ops.merge_states(o, rand(3, 2), o, rand(3, 2))
    for page, prefix in ((None, [600]), (16, [9, 70])):
        case = attention_case(prefix, 3, 2, 1, 64, dtype=BF16, page=page, tree="random", seed=1)
        case.k, case.v = case.k.contiguous(), case.v.contiguous()
        case.tail_k = case.tail_k.contiguous() if page else case.tail_k
        window = None if page else 300
        _, lse = ops.tree_attention(*case.tensors, **case.options, window=window, sink=window and 2, return_lse=True)
        with ramify.row_invariant(True):
            ops.tree_attention(*case.tensors, **case.options, window=window, sink=window and 2)
        tree = {"ancestors": case.ancestors, "page_table": case.page_table}
        ops.attention_colsum(case.q, case.k, lse, case.prefix_len, window=window, sink=window and 2, **tree)
    for D in (96, 128, 256):  # each head size is a kernel of its own
        case = attention_case([70], 5, 2, 1, D, dtype=BF16, tree="random", seed=1)
        ops.tree_attention(*case.tensors, **case.options)
        with ramify.row_invariant(True):
            ops.tree_attention(*case.tensors, **case.options)
    for variant, T, D in (
        (_cuda.COLUMNS, 3, 64),
        (_cuda.COLUMNS, 20, 64),
        (_cuda.COLUMNS, 3, 256),
        (_cuda.ROWS, 66, 64),
        (_cuda.ROWS, 66, 256),
    ):
        case = attention_case([130], T, 1, 1, D, dtype=BF16, page=16, tree="random", seed=1)  # of sm_90a
        _cuda.VARIANT = variant
        ops.tree_attention(*(t.contiguous() for t in case.tensors), **case.options)
        _cuda.VARIANT = _cuda.AUTOMATIC
    q, k, v = (torch.randn(1, rows, 1, 64, generator=g).to(BF16) for rows in (5, 90, 90))
    start, end = intervals("random", 1, 5, 90, g)
    ops.interval_attention(q, k, v, start, end)
    ops.interval_attention(padded(q), padded(k), padded(v), start, end)
    ops.linear(rand(2, 1030, dtype=BF16), rand(5, 1030, dtype=BF16), torch.ones(5), activation="silu", residual=rand(2, 5))
    before = _cuda_linear.VARIANT, _cuda_linear.BLOCKS
    for variant, cases in (
        ("by rows", (("int4-g32-zp", 9, 260, 544, 4), ("int8", 2, 260, 544, 4), ("fp8-b128", 17, 130, 160, 2))),
        ("many rows", (("int4-g32-zp", 3, 300, 544, 6), ("fp8", 3, 40, 70, 2))),
    ):
        for name, rows, N, K, blocks in cases:  # the last: shares that end one panel and begin the next
            _cuda_linear.VARIANT, _cuda_linear.BLOCKS = variant, blocks
            weight = low_bit_weight(name, N, K, perm=name == "int8")
            ops.linear(rand(rows, K, dtype=BF16), weight, activations="exact")
    _cuda_linear.VARIANT, _cuda_linear.BLOCKS = before
