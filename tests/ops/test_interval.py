"""interval_attention: every shape that intervals can say, against the reference and against tree_attention; merge_states on Triton."""

import pytest
import torch

from ramify import ops, reference
from ramify.testing.tensors import attention_case, intervals, levels, padded, poisoned, running, runs, threads, unseen_slots

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(q, k, v, start, end, **options):
    out = padded(poisoned(q.shape, q.dtype)), padded(poisoned(q.shape[:3]))
    o, lse = ops.interval_attention(q, k, v, start, end, return_lse=True, out=out, **options)
    wide = (x.double() for x in (q, k, v))
    want, want_lse = reference.interval_attention(*wide, start, end, return_lse=True, **options)
    # f32: 60 ulp of the largest value. 16 bits: the weights are rounded before they meet the values (2^-9 each), and so is the output.
    limit = 2e-5 + (0.02 + 2**-8 * want.abs() if q.dtype != F32 else 0)
    worst = ((o.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"
    off = (lse.double() - want_lse).abs().masked_fill(lse == want_lse, 0)  # -inf equals -inf
    assert off.nan_to_num(nan=torch.inf).max() <= (1e-5 if q.dtype == F32 else 1e-2)


@pytest.mark.parametrize(("backend", "level"), runs("interval_attention"))
@pytest.mark.parametrize(("kind", "B", "T", "S", "Hq", "Hkv", "D", "dtype"), [
    ("causal", 2, 40, 57, 4, 2, 64, F32), ("causal", 1, 70, 200, 2, 1, 128, BF16), ("window", 1, 33, 90, 3, 1, 96, F16),
    ("blocks", 2, 24, 48, 2, 2, 64, BF16), ("full", 5, 3, 65, 4, 1, 64, F32), ("random", 2, 50, 83, 2, 1, 64, F32),
    ("random", 1, 1, 1, 1, 1, 256, BF16), ("causal", 1, 5, 1200, 2, 1, 64, F32),
], ids=str)  # fmt: skip
def test_against_reference(backend, level, kind, B, T, S, Hq, Hkv, D, dtype):
    if backend == "cpu" and dtype == F16:
        pytest.skip("float16 has no CPU kernel")
    g = torch.Generator().manual_seed(T + S)
    q, k, v = (torch.randn(B, n, H, D, generator=g) for n, H in ((T, Hq), (S, Hkv), (S, Hkv)))
    start, end = intervals(kind, B, T, S, g)
    unseen = unseen_slots(start, end, S)
    k[unseen], v[unseen] = torch.nan, torch.nan
    with running(backend, level):
        check(padded(q.to(dtype)), padded(k.to(dtype)), padded(v.to(dtype)), padded(start), padded(end), scale=0.1)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_is_its_own(level, dtype):
    """A row has the same bits alone, among others and on other threads: its interval and the slots are all that counts."""
    g = torch.Generator().manual_seed(1)
    q, (k, v) = torch.randn(2, 60, 4, 64, generator=g).to(dtype), torch.randn(2, 2, 1100, 2, 64, generator=g).to(dtype)
    start, end = intervals("random", 2, 60, 1100, g)
    with running("cpu", level):
        o, lse = ops.interval_attention(q, k, v, start, end, return_lse=True)
        for b, t in ((0, 0), (0, 31), (1, 7), (1, 59)):
            with threads(1 + t % 2):
                alone = [x[b : b + 1, t : t + 1] for x in (q, start, end)]
                o1, lse1 = ops.interval_attention(alone[0], k[b : b + 1], v[b : b + 1], *alone[1:], return_lse=True)
            assert torch.equal(o1[0, 0], o[b, t]) and torch.equal(lse1[0, 0], lse[b, t])


@pytest.mark.parametrize(("backend", "level"), runs("interval_attention"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_numbers(backend, level, value):
    """A row with a score that is NaN or infinite is NaN in o and lse; other rows keep their bits, and empty ones stay empty."""
    g = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(1, 9, 4, 64, generator=g), torch.randn(1, 40, 2, 64, generator=g), torch.randn(1, 40, 2, 64, generator=g)
    start, end = torch.tensor([[0, 5, 7, 7, 9, 0, 20, 30, 3]]).int(), torch.tensor([[6, 7, 7, 9, 40, 40, 10, 31, 4]]).int()
    bad = torch.zeros(1, 9, 4, dtype=torch.bool)
    with running(backend, level):
        clean, clean_lse = ops.interval_attention(q, k, v, start, end, return_lse=True)
        q[0, 1, 3, 5], q[0, 2, 0, 5], k[0, 8, 0, 1] = value, value, value
        bad[0, 1, 3] = True  # row 2 sees nothing
        bad[0, [3, 5], :2] = True  # they see slot 8
        o, lse = ops.interval_attention(q, k, v, start, end, return_lse=True)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad]) and torch.equal(lse[~bad], clean_lse[~bad])


def test_is_tree_attention_of_a_chain():
    case = attention_case([30], 12, 4, 2, 64, tree="chain", seed=2)
    k, v = (torch.cat([c[:, :30], t], 1) for c, t in ((case.k, case.tail_k), (case.v, case.tail_v)))
    end = torch.arange(31, 43).int()[None]
    o = ops.interval_attention(case.q, k, v, end * 0, end)
    assert (o - ops.tree_attention(*case.tensors)).abs().max() <= 1e-5


@pytest.mark.parametrize(("backend", "level"), runs("merge_states"))
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_merge_states(backend, level, dtype):
    g = torch.Generator().manual_seed(3)
    o1, o2 = (torch.randn(2, 5, 3, 96, generator=g).to(dtype) for _ in "12")
    lse1, lse2 = (10 * torch.randn(2, 5, 3, generator=g) for _ in "12")
    lse1[0, :2], lse2[0, 1:3] = -torch.inf, -torch.inf
    o1[0, :2], o2[0, 1:3] = torch.nan, torch.nan  # a side that saw nothing may hold anything
    lse1[1, 0], lse2[1, 1, 1], lse2[1, 0, 0] = torch.nan, torch.nan, -torch.inf  # NaN makes the row NaN
    out = padded(poisoned(o1.shape, dtype)), padded(poisoned(lse1.shape))
    with running(backend, level):
        o, lse = ops.merge_states(padded(o1), padded(lse1), padded(o2), lse2, out=out)
    want, want_lse = reference.merge_states(o1.double(), lse1.double(), o2.double(), lse2.double())
    assert torch.equal(lse.isnan(), want_lse.isnan()) and torch.equal(o.isnan(), want.isnan())
    assert (o.double() - want).abs().nan_to_num(0).max() <= (1e-6 if dtype == F32 else 2**-8 * 4)
    assert ((lse - want_lse).abs().masked_fill(lse == want_lse, 0)).nan_to_num(0).max() <= 1e-5


def test_says_what_it_does_not_take():
    q, k = torch.randn(1, 3, 4, 64), torch.randn(1, 9, 2, 64)
    at = torch.zeros(1, 3, dtype=torch.int32)
    bad = [
        ((q, k, k, at, at.long()), TypeError, "end is int64; takes int32"),
        ((q, k, k, at, at + 10), ValueError, "end holds 10; takes 0 to 9"),
        ((q, k, k, at - 1, at), ValueError, "start holds -1"),
        ((q[:, :, :3], k, k, at, at), ValueError, "q has 3 heads and k has 2"),
        ((q, k, k[:, :8], at, at), ValueError, "v is [1, 8, 2, 64]"),
    ]
    for args, kind, said in bad:
        with pytest.raises(kind) as error:
            ops.interval_attention(*args)
        assert said in str(error.value) and str(error.value).startswith("interval_attention: "), str(error.value)
