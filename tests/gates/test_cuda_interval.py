"""CUDA interval attention against the reference: every kind of mask, head size and dtype, holes between intervals, many rows."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramify import ops, reference
from ramify.ops import _cuda
from ramify.testing.tensors import intervals, padded, poisoned, unseen_slots

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(kind, B, T, S, Hq, Hkv, D, dtype):
    """q, k, v, start, end; slots that no row of a sequence sees are NaN."""
    g = torch.Generator().manual_seed(T + S)
    q, k, v = (torch.randn(B, n, H, D, generator=g).to(dtype) for n, H in ((T, Hq), (S, Hkv), (S, Hkv)))
    start, end = intervals(kind, B, T, S, g)
    unseen = unseen_slots(start, end, S)
    k[unseen], v[unseen] = torch.nan, torch.nan
    return q, k, v, start, end


def run(place, case, copies=False, **options):
    """o and lse of a call into poisoned outputs, in every schedule."""
    moved = [t.to(place.device) for t in case]

    def call():
        out = padded(poisoned(case[0].shape, case[0].dtype)).to(place.device), padded(poisoned(case[0].shape[:3])).to(place.device)
        return ops.interval_attention(*moved, **options, return_lse=True, out=out)

    return tuple(t.cpu() for t in place.everywhere(call, copies))


def check(place, case, copies=False, **options):
    """o and lse lie where the reference in double puts them, row by row; returns both."""
    o, lse = run(place, case, copies, **options)
    q, k, v = (x.double() for x in case[:3])
    want, want_lse = reference.interval_attention(q, k, v, *case[3:], return_lse=True, **options)
    # each weight is rounded before its product, their sum is that of the rounded ones, and so is the output: half a last place each
    step = 2.0**-8 if case[0].dtype == BF16 else 2.0**-11
    limit = 2e-5 + 1.05 * step * (reference.interval_attention(q, k, v.abs(), *case[3:], **options) + 2 * want.abs())
    worst = ((o.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"
    off = (lse.double() - want_lse).abs().masked_fill(lse == want_lse, 0)  # -inf equals -inf
    assert off.nan_to_num(nan=torch.inf).max() <= 1.05 * step + 1e-5
    return o, lse


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("kind", "B", "T", "S", "Hq", "Hkv", "D"), [
    ("causal", 2, 40, 57, 4, 2, 64), ("causal", 1, 70, 200, 3, 1, 96), ("window", 1, 300, 330, 1, 1, 64), ("blocks", 2, 24, 48, 2, 2, 128),
    ("full", 5, 3, 65, 4, 1, 64), ("random", 2, 50, 183, 2, 1, 128), ("random", 1, 9, 130, 2, 1, 256), ("random", 1, 1, 1, 1, 1, 96),
], ids=str)  # fmt: skip
def test_against_reference(place, dtype, kind, B, T, S, Hq, Hkv, D):
    check(place, [padded(t) for t in make(kind, B, T, S, Hq, Hkv, D, dtype)], scale=0.1)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["causal", "window", "blocks", "full", "random"]),
    B=st.integers(1, 3),
    T=st.integers(1, 90),
    S=st.integers(0, 200),
    group=st.sampled_from([1, 2, 3, 8]),
    Hkv=st.integers(1, 2),
    D=st.sampled_from([64, 96]),
    dtype=st.sampled_from([BF16, F16]),
    gap=st.booleans(),
)
def test_any_shape(place, kind, B, T, S, group, Hkv, D, dtype, gap):
    case = make(kind, B, T, S, group * Hkv, Hkv, D, dtype)
    check(place, [padded(t) for t in case] if gap else case)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_dense_rows_are_copied_in_words(place, D):
    """Aligned rows, which take cp.async: late and early, and the same bits as through the loads of padded ones."""
    case = make("random", 1, 40, 150, 2, 1, D, F16)
    want = check(place, [padded(t) for t in case])
    assert all(torch.equal(a, b) for a, b in zip(check(place, case, copies=True), want))


def test_holes_between_intervals(place):
    """Rows of one block that see slots far apart: what lies between them may hold anything."""
    case = make("full", 1, 8, 400, 2, 1, 64, BF16)
    q, k, v, start, end = case
    start[:], end[:] = torch.tensor([[3, 3, 390, 390, 0, 70, 200, 130]]), torch.tensor([[5, 70, 400, 399, 0, 71, 190, 131]])
    unseen = unseen_slots(start, end, 400)
    assert unseen[0, 71:130].all() and unseen[0, :3].all()
    k[unseen], v[unseen] = torch.nan, torch.nan
    o, lse = check(place, case)
    assert (o[0, [4, 6]] == 0).all() and (lse[0, [4, 6]] == -torch.inf).all()


def test_rows_that_are_not_numbers(place):
    """A row with a score that is NaN or infinite is NaN; other rows keep their bits, and empty ones stay empty."""
    case = make("full", 1, 9, 40, 4, 2, 64, BF16)
    case[3][:], case[4][:] = torch.tensor([[0, 5, 7, 7, 9, 0, 20, 30, 3]]), torch.tensor([[6, 7, 7, 9, 40, 40, 10, 31, 4]])
    clean, clean_lse = check(place, case)
    q, k = case[:2]
    q[0, 1, 3, 5], q[0, 2, 0, 5], k[0, 8, 0, 1] = torch.inf, torch.nan, -torch.inf
    bad = torch.zeros(1, 9, 4, dtype=torch.bool)
    bad[0, 1, 3] = True  # row 2 sees nothing
    bad[0, [3, 5], :2] = True  # they see slot 8
    o, lse = run(place, case)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad]) and torch.equal(lse[~bad], clean_lse[~bad])


def test_a_row_does_not_see_its_neighbours(place):
    """A row has the same bits alone as among others: tiles begin at multiples of their size, whatever the others see."""
    q, _, v, start, end = make("random", 1, 80, 300, 2, 1, 64, BF16)
    k = -3 * torch.rand(1, 300, 1, 1, generator=torch.Generator().manual_seed(1)).to(BF16).expand(
        v.shape
    )  # a sum that rounds at every step
    case = torch.ones_like(q), k, v.nan_to_num(0.3), start, end
    o, lse = check(place, case)
    q, k, v, start, end = (t.to(place.device) for t in case)
    for t in range(80):
        row = slice(t, t + 1)
        with place.running():
            alone, alone_lse = ops.interval_attention(q[:, row], k, v, start[:, row], end[:, row], return_lse=True)
        assert torch.equal(alone.cpu()[0, 0], o[0, t]) and torch.equal(alone_lse.cpu()[0, 0], lse[0, t])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "window", "blocks", "full", "random"])
def test_few_rows_are_split_over_keys(place, kind, dtype, monkeypatch):
    """Chunks of 64 slots, most of which some row does not see: the same values as in one piece, but for rounding."""
    case = make(kind, 2, 30, 330, 4, 2, 96, dtype)
    check(place, case)
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    check(place, case)
    for variant in (_cuda.COLUMNS, _cuda.ROWS) if place.library else ():  # the same items, on sm_90a
        monkeypatch.setattr(_cuda, "VARIANT", variant)
        check(place, case)
    monkeypatch.setattr(_cuda, "VARIANT", _cuda.AUTOMATIC)
    q, k, v, start, end = case
    end[0, 3] = start[0, 3] = 0
    o, lse = check(place, [padded(t) for t in case])
    assert (o[0, 3] == 0).all() and (lse[0, 3] == -torch.inf).all()


def test_the_split_is_that_of_the_shape(place, monkeypatch):
    """Many rows are not split; few are, and have the same bits on any number of processors, whatever the intervals hold."""
    q, k, v, start, end = make("full", 1, 6, 330, 2, 1, 64, F16)
    start[:], end[:] = 0, 330
    k[:], v[:, :149] = k[:, :1], 2000 * v[:, :149]
    v[:, 150:299] = -v[:, :149]  # equal weights: what remains of the sum is all rounding
    case = q, k, v, start, end
    whole = run(place, case)[0]
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    split = run(place, case)[0]
    assert not torch.equal(whole, split)
    for processors in (1, 3, 200) if place.library else ():
        with place.library.device(processors):
            assert torch.equal(run(place, case)[0], split)
    end[0, 1:] = 9
    assert torch.equal(run(place, case)[0][0, 0], split[0, 0])
    monkeypatch.setattr(_cuda, "FEW", 1)
    end[:] = 330
    assert torch.equal(run(place, case)[0], whole)


def test_bounds_outside_the_slots_are_cut(place):
    """No check on a device could have refused them: no slot outside the cache is read."""
    q, k, v, start, end = (t.to(place.device) for t in make("full", 1, 3, 70, 1, 1, 64, BF16))
    with place.running():
        want = ops.interval_attention(q, k, v, start, end)
        o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
        _cuda.interval_attention((o, lse), q, k, v, start - 9, end + 1000, 0.125)
    assert torch.equal(o, want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("D", [1, 40, 96, 300])
def test_merge_states(place, dtype, D):
    """Sides that saw nothing may hold NaN; a side whose lse is NaN makes the row NaN."""
    g = torch.Generator().manual_seed(D)
    o1, o2 = (torch.randn(2, 5, 3, D, generator=g).to(dtype) for _ in "12")
    lse1, lse2 = (10 * torch.randn(2, 5, 3, generator=g) for _ in "12")
    lse1[0, :2], lse2[0, 1:3] = -torch.inf, -torch.inf
    o1[0, :2], o2[0, 1:3] = torch.nan, torch.nan
    lse1[1, 0], lse2[1, 1, 1], lse2[1, 0, 0] = torch.nan, torch.nan, -torch.inf
    data = [t.to(place.device) for t in (padded(o1), padded(lse1), padded(o2), lse2)]

    def call():
        return ops.merge_states(
            *data, out=(padded(poisoned(o1.shape, dtype)).to(place.device), padded(poisoned(lse1.shape)).to(place.device))
        )

    o, lse = (t.cpu() for t in place.everywhere(call))
    want, want_lse = reference.merge_states(o1.double(), lse1.double(), o2.double(), lse2.double())
    assert torch.equal(lse.isnan(), want_lse.isnan()) and torch.equal(o.isnan(), want.isnan())
    off = (o.double() - want).abs() / (1e-5 + {F32: 0, BF16: 2.0**-8, F16: 2.0**-11}[dtype] * want.abs())
    assert off.nan_to_num(0).max() <= 1
    assert (lse - want_lse).abs().masked_fill(lse == want_lse, 0).nan_to_num(0).max() <= 1e-5
