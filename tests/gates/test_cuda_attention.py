"""CUDA tree attention against the reference: every head size and dtype, ragged prefixes and trees, pages, windows, many chunks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ramify
from ramify import ops, reference
from ramify.ops import _cuda
from ramify.testing.tensors import TREES, attention_case, padded, poisoned

BF16, F16 = torch.bfloat16, torch.float16
NAMES = ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len", "page_table", "tail_rows")


def run(place, case, copies=False, **options):
    """o and lse of a call into poisoned outputs, in every schedule."""
    moved = {name: None if getattr(case, name) is None else getattr(case, name).to(place.device) for name in NAMES}

    def call():
        out = padded(poisoned(case.q.shape, case.q.dtype)).to(place.device), padded(poisoned(case.q.shape[:3])).to(place.device)
        return ops.tree_attention(**moved, **options, return_lse=True, out=out)

    return tuple(t.cpu() for t in place.everywhere(call, copies))


def check(place, case, copies=False, **options):
    """o and lse lie where the reference in double puts them, row by row; returns both."""
    o, lse = run(place, case, copies, **options)
    exact = case.double()
    want, want_lse = reference.tree_attention(*exact.tensors, **exact.options, **options, return_lse=True)
    # each weight is rounded before its product, their sum is that of the rounded ones, and so is the output: half a last place each
    spread = reference.tree_attention(
        exact.q, exact.k, exact.v.abs(), exact.tail_k, exact.tail_v.abs(), *exact.tensors[5:], **exact.options, **options
    )
    step = 2.0**-8 if case.q.dtype == BF16 else 2.0**-11
    limit = 2e-5 + 1.05 * step * (spread + 2 * want.abs())
    worst = ((o.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"
    lse_error = (lse.double() - want_lse).abs().masked_fill(lse == want_lse, 0)  # -inf equals -inf
    assert lse_error.nan_to_num(nan=torch.inf).max() <= 1.05 * step + 1e-5  # the sum is that of the rounded weights
    return o, lse


SHAPES = [  # prefix lengths, rows, Hq, Hkv, D, tree, tail_rows, page
    ([0], 1, 1, 1, 64, "chain", None, None),
    ([37], 1, 8, 1, 128, "chain", None, None),
    ([1, 64], 7, 4, 2, 64, "random", None, None),
    ([63, 65], 33, 6, 2, 96, "bushy", [33, 0], None),
    ([511, 512, 513, 0, 700], 5, 4, 2, 64, "random", [5, 1, 4, 5, 2], 16),
    ([129], 70, 3, 1, 128, "chain", [64], 64),
    ([20], 256, 1, 1, 64, "random", None, None),
    ([100], 40, 2, 1, 256, "bushy", None, 64),
]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s[0])}x{s[1]}x{s[2]}/{s[3]}x{s[4]}")
def test_against_reference(place, dtype, shape):
    prefix, T, Hq, Hkv, D, tree, rows, page = shape
    check(place, attention_case(prefix, T, Hq, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=T + D))


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("page", [None, 16])
def test_dense_rows_are_copied_in_words(place, D, page):
    """Aligned rows, which take cp.async: late and early, and the same bits as through the loads of padded ones."""
    case = attention_case([70, 9], 9, 4, 2, D, dtype=BF16, page=page, tree="bushy", seed=D)
    want = check(place, case)
    for name in ("k", "v", "tail_k", "tail_v"):
        setattr(case, name, getattr(case, name).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(check(place, case, copies=True), want))


any_tree = given(
    prefix=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    T=st.integers(1, 70),
    group=st.sampled_from([1, 2, 3, 8]),
    Hkv=st.integers(1, 2),
    D=st.sampled_from([64, 96]),
    tree=st.sampled_from(TREES),
    page=st.sampled_from([None, 1, 16, 64]),
    window=st.one_of(st.none(), st.integers(1, 150)),
    dtype=st.sampled_from([BF16, F16]),
    seed=st.integers(0, 99),
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@any_tree
def test_any_shape(place, prefix, T, group, Hkv, D, tree, page, window, dtype, seed):
    rows = [(T * (b + 1) + seed) % (T + 1) for b in range(len(prefix))]
    case = attention_case(prefix, T, group * Hkv, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=seed)
    check(place, case, window=window, sink=None if window is None else window % 7)


@pytest.mark.parametrize(("window", "sink"), [(1, None), (3, 2), (64, None), (100, 4), (600, 70), (5000, 1)])
@pytest.mark.parametrize("page", [None, 16])
def test_window(place, window, sink, page):
    case = attention_case([0, 2, 70, 690], 20, 2, 1, dtype=F16, tree="bushy", tail_rows=[20, 3, 20, 17], page=page, seed=window)
    deep = attention_case([30], 100, 1, 1, dtype=F16, tree="chain", page=page, seed=window)
    check(place, case, window=window, sink=sink)
    check(place, deep, window=window, sink=sink)


def test_large_scores(place):
    """Scores far apart: one key takes all, and nothing overflows on the way."""
    case = attention_case([150, 3], 9, dtype=BF16, seed=5)
    case.q = case.q * 40
    with place.running():
        o, lse = ops.tree_attention(*(t.to(place.device) for t in case.tensors), return_lse=True)
    assert o.isfinite().all() and lse.isfinite().all()
    check(place, case, scale=0.01)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_numbers(place, dtype, value, monkeypatch):
    """A row with a score that is NaN or infinite is NaN in o and lse, whichever chunk the key is in; other rows keep their bits."""
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    T = 20
    case = attention_case([150, 3], T, 4, 2, dtype=dtype, tree="random", seed=9)
    clean, clean_lse = check(place, case)
    bad = torch.zeros(2, T, 4, dtype=torch.bool)
    for b, t, h in ((0, 0, 0), (0, 17, 3), (1, 19, 2)):
        case.q[b, t, h, 5] = value
        bad[b, t, h] = True
    case.tail_k[1, 4, 1, 7] = value  # seen by the rows that descend from row 4, through heads 2 and 3
    bad[1, :, 2:] |= reference.attention.ancestor_bits(case.ancestors, T)[1, :, 4, None]
    o, lse = run(place, case)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad]) and torch.equal(lse[~bad], clean_lse[~bad])
    case.k[0, 30, 0, 9] = value  # in the first of three chunks, seen by every row of sequence 0 through heads 0 and 1
    bad[0, :, :2] = True
    o, lse = run(place, case)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad])


def test_scores_beyond_float32(place):
    """Finite operands whose score is not: NaN as well, and never half a row."""
    case = attention_case([70, 3], 9, 2, 1, dtype=BF16, seed=9)
    o, lse = run(place, case, scale=1e38)
    assert lse[0].isnan().all() and torch.equal(o.isnan().all(-1), lse.isnan()) and torch.equal(o.isnan().any(-1), lse.isnan())


@pytest.mark.parametrize("size", [1e4, 1e12, 1e17, 5e17])
def test_scores_of_any_size(place, size):
    """Scores down to the lowest float32 count as seen: the row's own key, at -size^2 sqrt(D), is all there is."""
    q = torch.full((1, 1, 1, 64), size, dtype=BF16)
    none, word, n = torch.zeros(1, 0, 1, 64, dtype=BF16), torch.ones(1, 1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    v = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(2)).to(BF16)
    data = [t.to(place.device) for t in (q, none, none, -q, v, word, n)]
    o, lse = place.everywhere(lambda: ops.tree_attention(*data, return_lse=True))
    assert torch.equal(o.cpu(), v) and float(lse) == pytest.approx(-8 * float(q[0, 0, 0, 0]) ** 2, rel=1e-5)


def test_chunks_by_the_cache(place, monkeypatch):
    """Chunks of 64 slots: many parts to join, of which a window skips some; the same values as in one piece, but for rounding."""
    case = attention_case([400, 0, 65], 6, 4, 2, 64, dtype=F16, tree="random", tail_rows=[6, 6, 0], seed=3)
    whole = check(place, case), check(place, case, window=90, sink=3)
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    parts = check(place, case), check(place, case, window=90, sink=3)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole, parts))  # the order of additions is another one
    assert [_cuda.chunk_of(n) for n in (1, 4096, 4097, 1 << 20)] == [64, 64, 128, 1 << 14]


def test_a_row_does_not_see_its_neighbours(place):
    """A row has the same bits whatever stands in other sequences, heads and blocks of rows, and however many chunks they have."""
    case = attention_case([520, 3], 40, 4, 1, 64, dtype=BF16, tree="bushy", seed=8)
    o, lse = check(place, case)
    one = attention_case([520, 3], 40, 4, 1, 64, dtype=BF16, tree="bushy", seed=8)
    for name in ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len"):
        setattr(one, name, getattr(one, name)[:1])
    alone, alone_lse = check(place, one)
    assert torch.equal(alone[0], o[0]) and torch.equal(alone_lse[0], lse[0])


def test_values_under_row_invariance(place, monkeypatch):
    """Another order of additions, the same values, in every schedule; aligned rows, which take cp.async, have the bits of padded ones."""
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    with ramify.row_invariant(True):
        case = attention_case([70, 9], 9, 4, 2, 128, dtype=BF16, page=16, tree="bushy", seed=3)
        want = check(place, case, window=50, sink=3)
        for name in ("k", "v", "tail_k", "tail_v"):
            setattr(case, name, getattr(case, name).contiguous())
        assert all(torch.equal(a, b) for a, b in zip(check(place, case, copies=True, window=50, sink=3), want))
        check(place, attention_case([20], 256, 1, 1, 64, dtype=F16, tree="random", seed=4))
        check(place, attention_case([40, 3], 9, 2, 2, 256, dtype=BF16, tree="random", tail_rows=[9, 0], seed=4), scale=0.05)
        check(place, attention_case([40, 3], 17, 7, 1, 96, dtype=F16, tree="bushy", tail_rows=[17, 2], seed=4))
