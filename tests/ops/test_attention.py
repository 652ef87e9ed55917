"""tree_attention and merge_states: against the reference in double, and row by row against plain decoding, bit for bit."""

import pytest
import torch

from ramify import ops, reference
from ramify.testing.tensors import attention_case, levels, padded, poisoned, running, runs, threads
from ramify.tree import MAX_ROWS

F32, BF16 = torch.float32, torch.bfloat16


def check(case, *, scale=None, window=None, sink=None, query=False, weights=False):
    """o and lse of a call into poisoned outputs lie where the reference in double puts them, row by row."""
    options = case.options | {"scale": scale, "window": window, "sink": sink}
    out = padded(poisoned(case.q.shape, case.q.dtype)), padded(poisoned(case.q.shape[:3]))
    o, lse = ops.tree_attention(*case.tensors, **options, return_lse=True, out=out)
    exact = case.double()
    want, want_lse = reference.tree_attention(*exact.tensors, **exact.options, scale=scale, window=window, sink=sink, return_lse=True)
    # f32 sums of D products and of at most ~1000 weighted values, each below |v| = 5: 2e-5 is 60 ulp of the largest value.
    # bf16: the output is rounded (2^-9 of it). Products in bf16 round what is wider by 2^-9: a q of f32, and the weights, of which the
    # result is a mean: by 2^-9 of the largest value.
    limit = 2e-5 + (2**-8 if case.q.dtype == BF16 else 0) * want.abs() + (0.02 if query else 0) + (0.01 if weights else 0)
    worst = ((o.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"
    lse_error = (lse.double() - want_lse).abs().masked_fill(lse == want_lse, 0)  # -inf equals -inf
    assert lse_error.nan_to_num(nan=torch.inf).max() <= 1e-5 + (0.02 if query else 0)


def rounded(level, case, backend="cpu"):
    """What is rounded to bf16: a q of f32 at one level of the CPU, weights there and in every GPU kernel of 16-bit tensors."""
    pairs = case.k.dtype == BF16 and level == "avx512_bf16"
    gpu = backend in ("triton", "cuda") and case.k.dtype == case.q.dtype == BF16
    return {"query": pairs and case.q.dtype == F32, "weights": pairs or gpu}


SHAPES = [  # prefix lengths, rows, Hq, Hkv, D, tree, tail_rows, page
    ([0], 1, 1, 1, 64, "chain", None, None),
    ([37], 1, 8, 1, 128, "chain", None, None),
    ([1, 64], 7, 4, 2, 64, "random", None, None),
    ([63, 65], 33, 6, 2, 96, "bushy", [33, 0], None),
    ([511, 512, 513, 0, 700], 5, 8, 2, 64, "random", [5, 1, 4, 5, 2], 16),
    ([508, 129], 70, 3, 1, 128, "chain", [70, 64], 64),
    ([448, 17], 65, 4, 4, 64, "star", None, 16),
    ([200], 256, 2, 1, 64, "random", None, None),
    ([500], 130, 4, 2, 256, "bushy", None, 64),
]


@pytest.mark.interpreted(7)
@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16)], ids=["f32", "bf16", "f32-bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s[0])}x{s[1]}x{s[2]}/{s[3]}x{s[4]}")
def test_against_reference(backend, level, dtype, kv_dtype, shape):
    prefix, T, Hq, Hkv, D, tree, rows, page = shape
    case = attention_case(prefix, T, Hq, Hkv, D, dtype=dtype, kv_dtype=kv_dtype, tree=tree, tail_rows=rows, page=page, seed=T + D)
    with running(backend, level):
        check(case, **rounded(level, case, backend))


@pytest.mark.interpreted(3)
@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
@pytest.mark.parametrize(("window", "sink"), [(1, None), (3, 2), (64, None), (100, 4), (600, 70), (5000, 1)])
@pytest.mark.parametrize("page", [None, 16])
def test_window(backend, level, window, sink, page):
    case = attention_case([0, 2, 70, 512, 690], 40, tree="bushy", tail_rows=[40, 3, 40, 17, 40], page=page, seed=window)
    deep = attention_case([30], 100, tree="chain", page=page, seed=window)  # positions that only a second ancestor word tells
    with running(backend, level):
        check(case, window=window, sink=sink)
        check(deep, window=window, sink=sink)


@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
def test_slots_behind_every_window_may_hold_anything(backend, level):
    """Also in a tile of which some slots are seen."""
    case = attention_case([150], 9, 4, 2, 64, tree="chain", seed=5)
    clean = attention_case([150], 9, 4, 2, 64, tree="chain", seed=5)
    case.k[:, 3:130], case.v[:, 3:130] = torch.nan, torch.nan  # row 0 is at 150 and sees slots from 131
    with running(backend, level):
        o, lse = ops.tree_attention(*case.tensors, window=20, sink=3, return_lse=True)
        want, want_lse = ops.tree_attention(*clean.tensors, window=20, sink=3, return_lse=True)
    assert torch.equal(o, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
def test_large_scores(backend, level):
    """Scores far apart: one key takes all, and nothing overflows on the way."""
    case = attention_case([150, 3], 9, seed=5)
    case.q = case.q * 40
    with running(backend, level):
        o, lse = ops.tree_attention(*case.tensors, return_lse=True)
        assert o.isfinite().all() and lse.isfinite().all()
        check(case, scale=0.01)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16)], ids=["f32", "bf16", "f32-bf16"])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize(("prefix", "T", "page", "window"), [
    ([0, 62, 130], 70, 16, None),
    ([509], 33, None, None),
    ([505, 1020, 3, 64, 0], 20, 64, None),
    ([40, 507], 18, None, 33),
])  # fmt: skip
def test_row_equals_plain_decoding(level, dtype, kv_dtype, D, prefix, T, page, window):
    """Row r of a tree call has the bits of a one-row call with the path to r committed: whatever T, B, pages and threads are.

    A result in bf16 hides most orders of addition; those of a bf16 cache show where the result is f32.
    """
    case = attention_case(prefix, T, 4, 2, D, dtype=dtype, kv_dtype=kv_dtype, tree="bushy", page=page, seed=D + T)
    with running("cpu", level):
        with threads(1):
            o, lse = ops.tree_attention(*case.tensors, **case.options, window=window, sink=window and 3, return_lse=True)
        with threads(2):
            o2, lse2 = ops.tree_attention(*case.tensors, **case.options, window=window, sink=window and 3, return_lse=True)
        assert torch.equal(o, o2) and torch.equal(lse, lse2)
        for b in range(len(prefix)):
            for r in {0, 1, T // 2, T - 2, T - 1}:
                plain, with_threads = case.row(b, r), threads(1 + r % 2)
                with with_threads:
                    o1, lse1 = ops.tree_attention(*plain.tensors, window=window, sink=window and 3, return_lse=True)
                assert torch.equal(o1[0, 0], o[b, r]), f"sequence {b}, row {r}"
                assert torch.equal(lse1[0, 0], lse[b, r]), f"lse of sequence {b}, row {r}"


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layout_leaves_no_trace(level, dtype):
    """Contiguous, padded and paged caches of the same numbers give the same bits."""
    case = attention_case([513, 70], 12, dtype=dtype, tree="random", seed=3)
    S = 640
    k, v = torch.zeros(2, 2, S, *case.k.shape[2:], dtype=dtype)
    k[:, : case.k.shape[1]], v[:, : case.v.shape[1]] = case.k.nan_to_num(), case.v.nan_to_num()
    with running("cpu", level):
        want = ops.tree_attention(case.q, k, v, *case.tensors[3:])
        assert torch.equal(ops.tree_attention(*case.tensors), want)
        for page in (16, 64, 128):
            table = torch.randperm(2 * S // page, generator=torch.Generator().manual_seed(page)).view(2, -1)
            pool = torch.empty(2, 2 * S // page, page, *k.shape[2:], dtype=dtype)
            for x, pages in zip((k, v), pool):
                pages[table.flatten()] = x.view(2 * S // page, page, *x.shape[2:])
            got = ops.tree_attention(case.q, *pool, *case.tensors[3:], page_table=table.int())
            assert torch.equal(got, want)


@pytest.mark.interpreted(2)
@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_rows_that_are_not_numbers(backend, level, value):
    """A row whose query, or a key that it sees, is NaN or so large that a score is not finite is NaN; other rows keep their bits."""
    prefix, T = [700, 3], 40
    case = attention_case(prefix, T, 4, 2, 64, tree="random", seed=9)
    bad = torch.zeros(2, T, 4, dtype=torch.bool)
    with running(backend, level):
        clean, clean_lse = ops.tree_attention(*case.tensors, return_lse=True)
        q, tail_k = case.q.clone(), case.tail_k.clone()
        for b, t, h in ((0, 0, 0), (0, 17, 3), (1, 39, 2)):
            q[b, t, h, 5] = value
            bad[b, t, h] = True
        tail_k[1, 4, 1, 7] = value  # seen by the rows that descend from row 4, through heads 2 and 3
        sees = reference.attention.ancestor_bits(case.ancestors, T)[1, :, 4]
        bad[1, :, 2:] |= sees[:, None]
        o, lse = ops.tree_attention(q, case.k, case.v, tail_k, *case.tensors[4:], return_lse=True)
        far, far_lse = ops.tree_attention(*case.tensors, scale=1e38, return_lse=True)  # of 700 keys some pass float32
    if value == 3e38:  # a product with it is within float32 or beyond, as the other factor has it: no row is half a number
        assert torch.equal(o.isnan().any(-1), lse.isnan()) and torch.equal(o.isnan().all(-1), lse.isnan())
        bad |= lse.isnan()
        assert not lse.isinf().any()
    else:
        assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert (
        far_lse[0].isnan().all() and torch.equal(far.isnan().all(-1), far_lse.isnan()) and torch.equal(far.isnan().any(-1), far_lse.isnan())
    )
    untouched = ~bad
    untouched[1] &= ~sees[:, None]
    untouched[0, 0, 0] = untouched[0, 17, 3] = untouched[1, 39, 2] = False
    assert torch.equal(o[untouched], clean[untouched]) and torch.equal(lse[untouched], clean_lse[untouched])


@pytest.mark.parametrize(("backend", "level"), runs("tree_attention"))
@pytest.mark.parametrize("size", [1e4, 1e12, 1e17, 5e17])
def test_scores_of_any_size(backend, level, size):
    """Scores down to the smallest float32 count as seen: the row's own key, at -size^2 sqrt(D), is all there is."""
    q = torch.full((1, 1, 1, 64), size)
    none, word, n = torch.zeros(1, 0, 1, 64), torch.ones(1, 1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    v = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(2))
    with running(backend, level):
        o, lse = ops.tree_attention(q, none, none, -q, v, word, n, return_lse=True)
    assert torch.equal(o, v) and float(lse) == pytest.approx(-8 * size**2, rel=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_merge_with_nothing(dtype):
    """A side that saw no key adds nothing, though its values are NaN; two of them give nothing."""
    case = attention_case([90, 41, 20], 6, 4, 2, 64, seed=1)
    o, lse = reference.tree_attention(*case.double().tensors, return_lse=True)
    none, nothing = torch.full_like(o, torch.nan).to(dtype), torch.full_like(lse, -torch.inf).float()
    merged, merged_lse = ops.merge_states(o.to(dtype), lse.float(), none, nothing, out=(poisoned(o.shape, dtype), poisoned(lse.shape)))
    assert torch.equal(merged, o.to(dtype)) and torch.equal(merged_lse, lse.float())
    merged, merged_lse = ops.merge_states(none, nothing, none, nothing)
    assert torch.equal(merged, torch.zeros_like(merged)) and torch.equal(merged_lse, nothing)


@pytest.mark.parametrize("cut", [0, 1, 64, 200])
def test_merge_of_two_prefixes(cut):
    """Attention over slots [0, cut) merged with attention over the rest equals attention over all of them."""
    g = torch.Generator().manual_seed(cut)
    q, k, v = torch.randn(1, 1, 2, 64, generator=g), torch.randn(1, 200, 2, 64, generator=g), torch.randn(1, 200, 2, 64, generator=g)

    def over(begin, end):
        if begin == end:
            return torch.full_like(q, torch.nan), torch.full((1, 1, 2), -torch.inf)
        word, last = torch.ones(1, 1, 1, dtype=torch.int64), slice(end - 1, end)  # the last slot plays the row itself
        n = torch.tensor([end - 1 - begin], dtype=torch.int32)
        return ops.tree_attention(q, k[:, begin:], v[:, begin:], k[:, last], v[:, last], word, n, return_lse=True)

    o, lse = ops.merge_states(*over(0, cut), *over(cut, 200))
    want, want_lse = over(0, 200)
    assert (o - want).abs().max() <= 1e-5 and (lse - want_lse).abs().max() <= 1e-5


def test_accepts_full_width_and_says_what_it_does_not_take():
    case = attention_case([3], MAX_ROWS, 1, 1, 64)
    assert ops.tree_attention(*case.tensors).shape == (1, MAX_ROWS, 1, 64)
    q, k, v, tail_k, tail_v, words, n = attention_case([9, 4], 5, 4, 2, 64).tensors
    good = {"q": q, "k": k, "v": v, "tail_k": tail_k, "tail_v": tail_v, "ancestors": words, "prefix_len": n}
    later, lost = words.clone(), words.clone()
    later[1, 2, 0] |= 1 << 3
    lost[0, 3, 0] &= ~(1 << 3)
    wide = attention_case([3], MAX_ROWS + 1, 1, 1, 64)
    bad = [
        (TypeError, "prefix_len is int64; takes int32", {"prefix_len": n.long()}),
        (TypeError, "prefix_len.int()", {"prefix_len": n.long()}),
        (TypeError, "q is int32", {"q": q.int()}),
        (TypeError, 'q is "a string"; takes a tensor', {"q": "a string"}),
        (TypeError, "k is bfloat16; takes float32, as tail_k is", {"k": k.bfloat16(), "v": v.bfloat16()}),
        (TypeError, "v is bfloat16", {"v": v.bfloat16()}),
        (ValueError, "q has 4 heads and k has 3", {name: good[name][:, :, [0, 0, 0]] for name in ("k", "v", "tail_k", "tail_v")}),
        (ValueError, "q is [2, 5, 4]; takes 4 axes", {"q": q[..., 0].contiguous()}),
        (ValueError, "T = 5, as in q", {"tail_v": tail_v[:, :4]}),
        (ValueError, "B = 2, as in q", {"prefix_len": n[:1]}),
        (ValueError, "last axis of q has stride", {"q": q.transpose(1, 3).contiguous().transpose(1, 3)}),
        (ValueError, "prefix_len[0] is 99", {"prefix_len": torch.tensor([99, 4], dtype=torch.int32)}),
        (ValueError, "prefix_len[1] is -1", {"prefix_len": torch.tensor([9, -1], dtype=torch.int32)}),
        (ValueError, "ancestors[1, 2] is", {"ancestors": later}),
        (ValueError, "ancestors[0, 3] is", {"ancestors": lost}),
        (ValueError, "window is 0; takes 1 or more", {"window": 0}),
        (ValueError, "sink is -1", {"sink": -1}),
        (ValueError, "sink is 3 and window is None; takes a sink behind a window. Give a window too", {"sink": 3}),
        (ValueError, "scale is nan", {"scale": float("nan")}),
        (TypeError, "scale is", {"scale": "0.1"}),
        (ValueError, "tail_rows[1] is 6", {"tail_rows": torch.tensor([5, 6], dtype=torch.int32)}),
        (TypeError, "out is list", {"out": [q]}),
        (ValueError, "out[0] is [2, 5, 4, 32]", {"out": torch.empty(2, 5, 4, 32)}),
        (TypeError, "tuple of 2", {"out": q, "return_lse": True}),
        (ValueError, "page_table[0, 0] is 99", {"k": k[0, :, None], "v": v[0, :, None], "page_table": torch.full((2, 9), 99).int()}),
        (ValueError, f"q has {MAX_ROWS + 1} rows", dict(zip(good, wide.tensors))),
    ]  # fmt: skip
    for kind, said, change in bad:
        with pytest.raises(kind) as error:
            ops.tree_attention(**good | change)
        message = str(error.value)
        assert said in message and message.startswith("tree_attention: ") and "\n" not in message, message
