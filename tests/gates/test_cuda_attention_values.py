"""CUDA attention over numbers that lie on a GPU, where no check of an op reads them: lengths, pages and bounds outside their tensors.

Straight to the launchers, as a call with such tensors goes. Every tensor is a piece of a larger one: around the inputs lies NaN, which
shows in the results when a kernel reads it, and around the outputs a number, which must still stand there.
"""

import pytest
import torch

from ramify import ops
from ramify.ops import _cuda
from ramify.testing.tensors import attention_case

BF16, I32, MOST = torch.bfloat16, torch.int32, 2**31 - 1
KERNELS = {"mma": _cuda.MMA, "columns": _cuda.COLUMNS, "rows": _cuda.ROWS, "invariant": _cuda.INVARIANT}
NAMES = ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len", "page_table", "tail_rows")


@pytest.fixture(params=list(KERNELS))
def kernel(request, place, monkeypatch):
    """Calls take this kernel."""
    if place.library is None and request.param in ("columns", "rows") and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is Hopper's; this GPU is another")
    monkeypatch.setattr(_cuda, "VARIANT", KERNELS[request.param])
    return request.param


def within(x, fill, device, rows=2):
    """x dense, and the whole of which it is a piece: so many rows of `fill` stand before it and behind it, along the first two axes."""
    whole = x.new_full((x.shape[0] + 2, x.shape[1] + 2 * rows, *x.shape[2:]), fill).to(device)
    piece = whole[1:-1, rows:-rows]
    piece.copy_(x)
    return piece, whole


def launched(place, shape, call):
    """o and lse that call(outs) writes; nothing around them changes."""
    (o, around_o), (lse, around_lse) = (
        within(torch.full(size, torch.nan, dtype=dtype), 7.0, place.device, 64)
        for size, dtype in ((shape, BF16), (shape[:3], torch.float32))
    )
    with place.running():
        call((o, lse))
    got = o.cpu().clone(), lse.cpu().clone()
    o.fill_(7), lse.fill_(7)
    assert (around_o == 7).all() and (around_lse == 7).all()
    return got


def attended(place, case, window=0, sink=0, **changed):
    """o and lse of tree_attention."""
    given = {**{name: getattr(case, name) for name in NAMES}, **changed}
    for name in ("k", "v", "tail_k", "tail_v"):
        given[name] = within(given[name], torch.nan, place.device)[0]
    *tensors, table, used = (None if x is None else x.to(place.device) for x in given.values())
    return launched(place, case.q.shape, lambda outs: _cuda.tree_attention(outs, *tensors, table, 0.125, window, sink, used))


def same(got, want):
    return all(torch.equal(x, y) for x, y in zip(got, want)) and not want[0].isnan().any()


def full(case):
    """The same case with numbers where no row looks."""
    for name in ("k", "v", "tail_k", "tail_v"):
        setattr(case, name, getattr(case, name).nan_to_num(nan=1.0).contiguous())
    return case


@pytest.mark.parametrize("page", [None, 16])
def test_a_window_beyond_every_position_is_none(place, kernel, page):
    case = full(attention_case([40, 70], 6, 4, 2, 64, dtype=BF16, page=page, seed=1))
    want = attended(place, case)
    for window in (MOST, MOST + 1, 1 << 32, (1 << 32) + 5, 1 << 62, (1 << 63) - 1):
        assert same(attended(place, case, window, 3), want)
        assert same(attended(place, case, window, window), want)
        with place.running():
            moved = {name: None if getattr(case, name) is None else getattr(case, name).to(place.device) for name in NAMES}
            got = ops.tree_attention(**moved, scale=0.125, window=window, sink=window, return_lse=True)
        assert same([x.cpu() for x in got], want)


def test_more_slots_than_32_bits_count(place, kernel):
    """A table that names one page again and again: 2^32 slots, of which 40 are in use."""
    case = full(attention_case([40], 3, 2, 1, 64, dtype=BF16, page=1 << 16, seed=1))
    k, v = case.k[case.page_table[0].long()], case.v[case.page_table[0].long()]
    table = torch.zeros(1, 1 << 16, dtype=I32)
    assert same(attended(place, case, k=k, v=v, page_table=table), attended(place, case))


@pytest.mark.parametrize("window", [0, 20])
def test_a_page_that_does_not_exist_reads_as_zeros(place, kernel, window):
    """In a whole tile of keys and in the one that the prefix ends in; the first pages outside hold NaN."""
    case = full(attention_case([75, 90], 3, 2, 1, 64, dtype=BF16, page=16))
    zeros = torch.zeros_like(case.k[:1])
    k, v = torch.cat([case.k, zeros]), torch.cat([case.v, zeros])
    for absent in (len(k), -1, 1000, -MOST):
        for b, p in ((0, 0), (0, 4), (1, 0), (1, 5)):
            bad, good = case.page_table.clone(), case.page_table.clone()
            bad[b, p], good[b, p] = absent, len(case.k)
            assert same(*(attended(place, case, window, min(window, 4), k=k, v=v, page_table=table) for table in (bad, good)))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("page", [None, 16])
def test_lengths_are_held_to_their_tensors(place, kernel, page, window):
    case = full(attention_case([40], 3, 2, 1, 64, dtype=BF16, tail_rows=[3], page=page))
    S = case.k.shape[1] * (1 if page is None else case.page_table.shape[1])
    wrong = [("prefix_len", n, S) for n in (S + 1, S + 2, MOST)] + [("prefix_len", n, 0) for n in (-1, -20, -MOST)]
    wrong += [("tail_rows", n, 3) for n in (4, 5, MOST)] + [("tail_rows", n, 0) for n in (-1, -MOST)]
    for name, given, held in wrong:
        got, want = (attended(place, case, window, min(window, 4), **{name: torch.tensor([n], dtype=I32)}) for n in (given, held))
        assert same(got, want), (name, given)


def test_bounds_of_intervals_are_held_to_the_slots(place, kernel):
    if kernel == "invariant":
        pytest.skip("intervals have no such kernel")
    g = torch.Generator().manual_seed(3)
    q, (k, v) = torch.randn(1, 6, 2, 64, generator=g).to(BF16), torch.randn(2, 1, 70, 1, 64, generator=g).to(BF16)
    caches = [within(x, torch.nan, place.device)[0] for x in (k, v)]

    def seen(start, end):
        bounds = (torch.tensor([x], dtype=I32, device=place.device) for x in (start, end))
        return launched(place, q.shape, lambda outs: _cuda.interval_attention(outs, q.to(place.device), *caches, *bounds, 0.125))

    want = seen([0, 2, 0, 0, 60, 0], [70, 70, 0, 0, 70, 70])
    assert same(seen([-1, 2, 71, 999, 60, -2], [70, 71, 72, -7, 72, 71]), want)
    assert same(seen([-MOST, 2, MOST, 999, 60, -MOST], [MOST, MOST, MOST, -MOST, 999, MOST]), want)
    assert (want[1][0, 2:4] == -torch.inf).all()
