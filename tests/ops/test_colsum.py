"""attention_colsum: against the reference in double, and against the attention that tree_attention itself pays to each slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import ops, reference
from ramify.testing.tensors import TREES, attention_case, levels, padded, poisoned, running, runs, threads

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32


def inputs(case, **options):
    """Tensors and options of a call, with the lse that tree_attention gives, in double."""
    exact = case.double()
    _, lse = reference.tree_attention(*exact.tensors, **exact.options, **options, return_lse=True)
    tensors = case.q, case.k, padded(lse.float()), case.prefix_len
    return tensors, {"ancestors": case.ancestors, "page_table": case.page_table, "tail_rows": case.tail_rows, **options}


def check(case, **options):
    """Every slot's sum lies where the reference puts it; returns the sums."""
    tensors, given = inputs(case, **options)
    slots = case.k.shape[1] * (1 if case.page_table is None else case.page_table.shape[1])
    got = ops.attention_colsum(*tensors, **given, out=padded(poisoned((len(case.q), case.k.shape[2], slots))))
    q, k, lse, n = tensors
    want = reference.attention_colsum(q.double(), k.double(), lse.double(), n, **given)
    # a score of size x rounds by about x 2^-22 on its way to the exponent; scores here stay below 30
    assert got.dtype == F32 and ((got.double() - want).abs() <= 2e-5 * want + 1e-6).all(), float((got.double() - want).abs().max())
    for b, length in enumerate(case.prefix_len.tolist()):
        assert not got[b, :, length:].any()
    return got


@pytest.mark.parametrize(("backend", "level"), runs("attention_colsum"))
@pytest.mark.parametrize(("prefix", "T", "Hq", "Hkv", "D", "dtype", "rows", "page"), [
    ([0], 1, 1, 1, 64, F32, None, None), ([37], 1, 8, 1, 128, BF16, None, None), ([63, 65], 33, 6, 2, 96, BF16, [33, 0], None),
    ([130, 0, 7, 64, 90], 5, 4, 2, 64, F32, [5, 1, 4, 5, 2], 16), ([100], 9, 7, 1, 256, BF16, None, 64),
    ([70, 1], 70, 3, 1, 64, F16, None, 1),
], ids=str)  # fmt: skip
def test_against_reference(backend, level, prefix, T, Hq, Hkv, D, dtype, rows, page):
    if backend == "cpu" and dtype == F16:
        pytest.skip("float16 has no CPU kernel")
    case = attention_case(prefix, T, Hq, Hkv, D, dtype=dtype, tree="bushy", tail_rows=rows, page=page, seed=T + D)
    with running(backend, level):
        check(case)
        check(case, window=20, sink=3)
        check(case, window=1, scale=0.05)


@pytest.mark.parametrize(("backend", "level"), runs("attention_colsum"))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prefix=st.lists(st.integers(0, 150), min_size=1, max_size=3), T=st.integers(1, 40), group=st.integers(1, 4), Hkv=st.integers(1, 2),
    tree=st.sampled_from(TREES), page=st.sampled_from([None, 1, 16]), window=st.one_of(st.none(), st.integers(1, 160)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(backend, level, prefix, T, group, Hkv, tree, page, window, seed):
    rows = [(T * (b + 1) + seed) % (T + 1) for b in range(len(prefix))]
    case = attention_case(prefix, T, group * Hkv, Hkv, 64, tree=tree, tail_rows=rows, page=page, seed=seed)
    with running(backend, level):
        check(case, window=window, sink=None if window is None else window % 5)


@pytest.mark.parametrize(("backend", "level"), runs("attention_colsum"))
@pytest.mark.parametrize("window", [None, 30])
def test_is_what_tree_attention_pays(backend, level, window):
    """A value that is one at its own slot and zero elsewhere brings a slot's weight out of tree_attention; with the tail they sum to 1."""
    T, group, n = 6, 3, 60
    case = attention_case([n, n - 9], T, group, 1, 64, tree="random", seed=3)
    options = {"window": window, "sink": None if window is None else 2}
    with running(backend, level):
        case.v[:], case.tail_v[:] = torch.eye(n + 5, 64)[:, None], 0
        weight, lse = ops.tree_attention(*case.tensors, **options, return_lse=True)
        got = ops.attention_colsum(case.q, case.k, lse, case.prefix_len, ancestors=case.ancestors, **options)
        case.v[:], case.tail_v[:] = 0, 1
        tail = ops.tree_attention(*case.tensors, **options)
    assert (got[:, 0, :n] - weight.sum((1, 2))[:, :n]).abs().max() <= 2e-5
    assert ((got.sum((1, 2)) + tail[..., 0].sum((1, 2))) / (T * group) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize(("backend", "level"), runs("attention_colsum"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_numbers(backend, level, value):
    """A row that tree_attention makes NaN makes the slots that it sees NaN, of its own head; no other changes a bit."""
    case = attention_case([70, 9], 5, 4, 2, 64, tree="star", seed=6)
    options = {"window": 30, "sink": 2}
    with running(backend, level):
        clean = check(case, **options)
        case.q[0, 3, 1, 5] = value
        tensors, given = inputs(case, **options)
        got = ops.attention_colsum(*tensors, **given)
    bad = torch.zeros_like(got, dtype=torch.bool)
    bad[0, 0, :2] = bad[0, 0, 42:70] = True  # row 3 has depth 1: it stands at 71 and sees the slots above 41
    assert torch.equal(got.isnan(), bad) and torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("level", levels())
def test_threads_and_other_slots_change_nothing(level):
    """A slot's sum is its own: the same bits beside other slots, sequences and on other threads; and without words a chain is meant."""
    case = attention_case([150, 33], 12, 4, 2, 64, tree="chain", seed=8)
    (q, k, lse, n), given = inputs(case, window=40, sink=1)
    with running("cpu", level):
        got = ops.attention_colsum(q, k, lse, n, **given)
        with threads(2):
            assert torch.equal(ops.attention_colsum(q, k, lse, n, **given), got)
        assert torch.equal(ops.attention_colsum(q, k, lse, n, **(given | {"ancestors": None})), got)
        assert torch.equal(ops.attention_colsum(q[1:], k[1:, :40], lse[1:], n[1:], window=40, sink=1)[0], got[1, :, :40])


def test_says_what_it_does_not_take():
    case = attention_case([9, 4], 3, 4, 2, 64)
    q, k, lse, n = case.q, case.k, torch.zeros(2, 3, 4), case.prefix_len
    table, later = torch.zeros(2, 1, dtype=I32), case.ancestors.clone()
    later[0, 1, 0] = 0b110  # row 2 stands behind row 1
    bad = [
        ((q, k, lse[:, :2], n), {}, ValueError, "lse is [2, 2, 4]; takes [B, T, Hq] with T = 3, as in q"),
        ((q, k, lse.double(), n), {}, TypeError, "lse is float64; takes float32"),
        ((q, k, lse, n.long()), {}, TypeError, "prefix_len is int64; takes int32 [B]. Use prefix_len.int()"),
        ((q, k, lse, n + 9), {}, ValueError, "prefix_len[0] is 18; takes 0 to 14"),
        ((q[:, :, :3], k, lse[:, :, :3], n), {}, ValueError, "q has 3 heads and k has 2"),
        ((q[..., :32], k, lse, n), {}, ValueError, "k is [2, 14, 2, 64]; takes [B, S, Hkv, D] with D = 32, as in q"),
        ((q, k, lse, n), {"page_table": table + 2}, ValueError, "takes 0 to 1, the pages of k"),
        ((q, k, lse, n), {"tail_rows": n}, ValueError, "tail_rows[0] is 9; takes 0 to 3"),
        (
            (q, k, lse, n),
            {"ancestors": case.ancestors * 0, "window": 3},
            ValueError,
            "ancestors[0, 0] is 0x0, 0x0; takes the row's own bit",
        ),
        ((q, k, lse, n), {"ancestors": later}, ValueError, "ancestors[0, 1] is 0x6, 0x0; takes the row's own bit"),
        ((q[:, :1].repeat(1, 257, 1, 1), k, lse[:, :1].repeat(1, 257, 1), n), {}, ValueError, "q has 257 rows a sequence; takes 1 to 256."),
        ((q, k, lse, n), {"ancestors": case.ancestors.int()}, TypeError, "ancestors is int32; takes int64"),
        ((q, k, lse, n), {"window": 0}, ValueError, "window is 0"),
        ((q, k, lse, n), {"sink": -1}, ValueError, "sink is -1"),
        ((q, k, lse, n), {"sink": 2}, ValueError, "sink is 2 and window is None; takes a sink behind a window."),
        ((q, k, lse, n), {"scale": float("nan")}, ValueError, "scale is nan"),
        (("q", k, lse, n), {}, TypeError, 'q is "q"; takes a tensor'),
    ]
    for args, options, kind, said in bad:
        with pytest.raises(kind) as error:
            ops.attention_colsum(*args, **options)
        assert said in str(error.value) and str(error.value).startswith("attention_colsum: "), str(error.value)
