"""The wgmma attention kernels of sm_90a against the reference: packed rows as columns and as rows, everything else as attention.cu.

On a GPU they run where it is a Hopper one.
"""

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ramify
from ramify import native_cuda, ops, reference
from ramify.ops import _cuda
from ramify.testing.tensors import attention_case, intervals, padded, poisoned, unseen_slots

BF16, F16 = torch.bfloat16, torch.float16
FIXTURE = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def neighbour(name):
    """Another file of this folder, for what its tests call."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trees, spans = neighbour("test_cuda_attention"), neighbour("test_cuda_interval")


@pytest.fixture(params=["columns", "rows"])
def kernel(request, place, monkeypatch):
    """Calls take this kernel."""
    if place.library is None and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is Hopper's; this GPU is another")
    monkeypatch.setattr(_cuda, "VARIANT", {"columns": _cuda.COLUMNS, "rows": _cuda.ROWS}[request.param])
    return request.param


def aligned(x):
    """Rows at multiples of 16 bytes, with gaps of NaN between them."""
    return padded(x.contiguous(), 8)


def case_of(*args, **options):
    case = attention_case(*args, **options)
    for name in ("k", "v", "tail_k", "tail_v"):
        setattr(case, name, aligned(getattr(case, name)))
    return case


def takes(kernel, D, packed):
    return kernel == "rows" or D < 256 or packed <= 16


SHAPES = [*trees.SHAPES[:-1], ([100], 7, 2, 1, 256, "bushy", None, 64), ([70], 65, 2, 1, 256, "bushy", None, None)]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s[0])}x{s[1]}x{s[2]}/{s[3]}x{s[4]}")
def test_against_reference(place, kernel, dtype, shape):
    prefix, T, Hq, Hkv, D, tree, rows, page = shape
    if not takes(kernel, D, T * Hq // Hkv):
        pytest.skip("64 columns of 256 features are more registers than there are")
    case = case_of(prefix, T, Hq, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=T + D)
    trees.check(place, case, copies=True)


@FIXTURE
@trees.any_tree
def test_any_shape(place, kernel, prefix, T, group, Hkv, D, tree, page, window, dtype, seed):
    rows = [(T * (b + 1) + seed) % (T + 1) for b in range(len(prefix))]
    case = case_of(prefix, T, group * Hkv, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=seed)
    trees.check(place, case, window=window, sink=None if window is None else window % 7)


@FIXTURE
@given(
    kind=st.sampled_from(["causal", "window", "blocks", "full", "random"]),
    B=st.integers(1, 3),
    T=st.integers(1, 150),
    S=st.integers(0, 200),
    group=st.sampled_from([1, 2, 3]),
    D=st.sampled_from([64, 96]),
    dtype=st.sampled_from([BF16, F16]),
)
def test_any_interval(place, kernel, kind, B, T, S, group, D, dtype):
    g = torch.Generator().manual_seed(T + S)
    q, k, v = (torch.randn(B, n, H, D, generator=g).to(dtype) for n, H in ((T, group), (S, 1), (S, 1)))
    start, end = intervals(kind, B, T, S, g)
    unseen = unseen_slots(start, end, S)
    k[unseen], v[unseen] = torch.nan, torch.nan
    spans.check(place, [padded(q), aligned(k), aligned(v), start, end])


def test_row_blocks_far_apart(place, kernel):
    """The second 64 rows see slots before those of the first: tiles that a pair of row blocks shares begin where the later one does."""
    g, T, S = torch.Generator().manual_seed(1), 100, 400
    q, k, v = (torch.randn(1, n, 1, 64, generator=g).to(BF16) for n in (T, S, S))
    start = (S - 20 - 3 * torch.arange(T)).clamp(0)[None].int()
    end = start + 20
    unseen = unseen_slots(start, end, S)
    k[unseen], v[unseen] = torch.nan, torch.nan
    spans.check(place, [q, aligned(k), aligned(v), start, end])
    spans.check(place, [q, aligned(k.flip(1)), aligned(v.flip(1)), (S - end).int(), (S - start).int()])


@pytest.mark.parametrize(("window", "sink"), [(1, None), (3, 2), (100, 4), (600, 70)])
@pytest.mark.parametrize("page", [None, 16])
def test_window(place, kernel, window, sink, page):
    case = case_of([0, 2, 70, 690], 20, 2, 1, dtype=F16, tree="bushy", tail_rows=[20, 3, 20, 17], page=page, seed=window)
    deep = case_of([30], 100, 1, 1, dtype=F16, tree="chain", page=page, seed=window)
    trees.check(place, case, window=window, sink=sink)
    trees.check(place, deep, window=window, sink=sink)


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_growing_scores(place, kernel, size):
    """Each tile's scores lie above those before it: references move, or stay where the growth is within reach."""
    case = case_of([300], 5, 4, 2, dtype=BF16, seed=5)
    case.k[:, :300] *= torch.linspace(0.1, 3, 300)[:, None, None].to(BF16)
    case.q = case.q * size
    trees.check(place, case, scale=0.125 / size)
    with place.running():
        o, lse = ops.tree_attention(*(t.to(place.device) for t in case.tensors), return_lse=True)
    assert o.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_numbers(place, kernel, value, monkeypatch):
    """A row with a score that is NaN or infinite is NaN in o and lse; other rows keep their bits."""
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    T = 20
    case = case_of([150, 3], T, 4, 2, dtype=BF16, tree="random", seed=9)
    clean, clean_lse = trees.check(place, case)
    bad = torch.zeros(2, T, 4, dtype=torch.bool)
    for b, t, h in ((0, 0, 0), (0, 17, 3), (1, 19, 2)):
        case.q[b, t, h, 5] = value
        bad[b, t, h] = True
    case.tail_k[1, 4, 1, 7] = value  # seen by the rows that descend from row 4, through heads 2 and 3
    bad[1, :, 2:] |= reference.attention.ancestor_bits(case.ancestors, T)[1, :, 4, None]
    o, lse = trees.run(place, case)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad]) and torch.equal(lse[~bad], clean_lse[~bad])
    case.k[0, 30, 0, 9] = value  # in the first of three chunks, seen by every row of sequence 0 through heads 0 and 1
    bad[0, :, :2] = True
    o, lse = trees.run(place, case)
    assert torch.equal(lse.isnan(), bad) and torch.equal(o.isnan(), bad[..., None].expand(o.shape))
    assert torch.equal(o[~bad], clean[~bad])


def test_chunks_by_the_cache(place, kernel, monkeypatch):
    case = case_of([400, 0, 65], 6, 4, 2, 64, dtype=F16, tree="random", tail_rows=[6, 6, 0], seed=3)
    whole = trees.check(place, case), trees.check(place, case, window=90, sink=3)
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    parts = trees.check(place, case), trees.check(place, case, window=90, sink=3)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole, parts))  # the order of additions is another one


def test_a_row_does_not_see_its_neighbours(place, kernel):
    """A row has the same bits whatever stands in other sequences, heads and blocks of rows, and however many chunks they have."""
    both = [case_of([520, 3], 40, 4, 1, 64, dtype=BF16, tree="bushy", seed=8) for _ in range(2)]
    for name in ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len"):
        setattr(both[1], name, getattr(both[1], name)[:1])
    (o, lse), (alone, alone_lse) = (trees.check(place, case) for case in both)
    assert torch.equal(alone[0], o[0]) and torch.equal(alone_lse[0], lse[0])


@pytest.mark.parametrize("D", [64, 128])
def test_the_grid_changes_no_bit(place, kernel, D, monkeypatch):
    if place.library is None:
        pytest.skip("a GPU has the multiprocessors that it has")
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    for T in (4, 33, 70):
        case, results = case_of([300, 70], T, 4, 2, D, dtype=BF16, tree="random", seed=D), []
        for processors in (1, 3, 132):
            with place.library.device(processors, 9):
                results.append(trees.run(place, case))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0])), T


def test_which_kernel_a_device_takes(emulated):
    """Hopper takes wgmma, as columns while the rows fit one block; other chips, and rows at odd addresses, take mma.sync."""
    words = torch.zeros(64, dtype=BF16)

    def taken(major, T, D=128, stride=64, **more):
        strides = {f"{name}_stride_{axis}": stride for name in ("k", "v", "tail_k", "tail_v") for axis in "bh"}
        args = native_cuda.AttentionArgs(B=1, T=T, Hq=4, Hkv=1, D=D, type=native_cuda.BF16, **strides, **more)
        args.k = args.v = args.tail_k = args.tail_v = words.data_ptr()
        with emulated.device(132, major):
            return emulated.attention_variant(ctypes.addressof(args))

    assert [taken(9, T) for T in (1, 4, 16, 17, 256)] == [_cuda.COLUMNS] * 3 + [_cuda.ROWS] * 2
    assert [taken(9, T, D=256) for T in (4, 5)] == [_cuda.COLUMNS, _cuda.ROWS]
    assert [taken(major, 4) for major in (8, 10, 12)] == [_cuda.MMA] * 3 and taken(9, 4, stride=63) == _cuda.MMA
    assert taken(9, 4, variant=_cuda.MMA) == _cuda.MMA and taken(8, 4, variant=_cuda.ROWS) == _cuda.ROWS


def test_explain_names_the_choice(place):
    with place.running():
        assert "wgmma on sm_90" in ramify.explain("tree_attention", dtype=BF16, device=place.device, D=64).why


def test_refused_where_it_does_not_fit(place, kernel):
    """A kernel that is asked for by name refuses what it does not take."""
    case = attention_case([9], 3, 2, 1, dtype=BF16)
    out = poisoned(case.q.shape, BF16).to(place.device)
    with place.running(), pytest.raises(native_cuda.CudaError, match="AttentionArgs"):
        ops.tree_attention(*(t.to(place.device) for t in case.tensors), out=out)
