"""ramify.row_invariant(True): a row has the bits of plain decoding, however the chip adds inside an instruction; and what a chip must keep.

Under the emulator everywhere; on a GPU where there is one, which alone can answer for the instruction.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ramify
from ramify import backends, native_cuda, ops
from ramify.ops import _cuda
from ramify.testing import emulator
from ramify.testing.tensors import TREES, attention_case, path_of

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
NAMES = ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len", "page_table", "tail_rows")
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


def make(prefix, *args, **options):
    """attention_case whose prefix comes in pairs of equal keys and opposite large values: what remains of their sum is all rounding, which
    so small an output shows."""
    case = attention_case(prefix, *args, **options)
    for b, n in enumerate(prefix):
        for p in range(1, n, 2):
            here, before = ((b, x) if case.page_table is None else _paged(case, b, x) for x in (p, p - 1))
            case.k[here], case.v[before] = case.k[before], 2000 * case.v[before]
            case.v[here] = -case.v[before]
    return case


def _paged(case, b, p):
    return int(case.page_table[b, p // case.k.shape[1]]), p % case.k.shape[1]


def attend(place, case, on=True, **options):
    """o and lse of a call, with the mode on or off."""
    moved = {name: None if getattr(case, name) is None else getattr(case, name).to(place.device) for name in NAMES}
    with place.running(), ramify.row_invariant(on):
        return tuple(t.cpu() for t in ops.tree_attention(**moved, **options, return_lse=True))


def unequal(place, case, rows=None, on=True, rule="aligned", **options):
    """Rows (b, r) of a tree whose bits are not those of plain decoding behind the same path, on a chip that adds by this rule."""
    if place.library is not None and rule is not None:
        with place.library.sums(rule):
            return unequal(place, case, rows, on, None, **options)
    o, lse = attend(place, case, on, **options)
    used = [len(tree) for tree in case.parents] if case.tail_rows is None else case.tail_rows.tolist()
    every = [(b, r) for b, n in enumerate(used) for r in range(n)]
    found = []
    for b, r in every if rows is None else [each for each in every if each[1] in rows]:
        alone, alone_lse = attend(place, case.row(b, r), on, **options)
        if not (torch.equal(alone[0, 0], o[b, r]) and torch.equal(alone_lse[0, 0], lse[b, r])):
            found.append((b, r))
    return found


SHAPES = [  # prefix lengths, rows, Hq, Hkv, D, tree, tail_rows, page
    ([0], 9, 1, 1, 64, "random", None, None),
    ([37], 20, 4, 2, 96, "bushy", None, 16),
    ([400, 16], 7, 4, 1, 128, "random", None, None),
    ([15, 0, 130, 64, 7], 6, 7, 1, 64, "bushy", [6, 1, 4, 0, 5], 16),
    ([63], 40, 2, 1, 64, "chain", None, None),
    ([50], 5, 4, 1, 256, "random", None, 64),
    ([100], 12, 7, 1, 128, "star", None, None),
]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s[0])}x{s[1]}x{s[2]}/{s[3]}x{s[4]}")
def test_a_row_of_a_tree_is_plain_decoding(place, dtype, shape):
    prefix, T, Hq, Hkv, D, tree, rows, page = shape
    case = make(prefix, T, Hq, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=T + D)
    assert unequal(place, case) == []


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.integers(0, 140), min_size=1, max_size=2),
    T=st.integers(1, 24),
    group=st.sampled_from([1, 2, 4, 7]),
    tree=st.sampled_from(TREES),
    page=st.sampled_from([None, 1, 16]),
    window=st.one_of(st.none(), st.integers(1, 150)),
    dtype=st.sampled_from([BF16, F16]),
    seed=st.integers(0, 99),
)
def test_any_tree(place, prefix, T, group, tree, page, window, dtype, seed):
    case = make(prefix, T, group, 1, 64, dtype=dtype, tree=tree, page=page, seed=seed)
    assert unequal(place, case, {0, T // 2, T - 1}, window=window, sink=None if window is None else window % 7) == []


@pytest.mark.parametrize(("window", "sink"), [(1, None), (3, 2), (20, 4), (70, 40), (5000, 1)])
def test_window_and_sink(place, window, sink):
    case = make([90, 2, 33], 12, 2, 1, dtype=F16, tree="bushy", page=16, seed=window)
    assert unequal(place, case, {0, 5, 11}, window=window, sink=sink) == []


@DTYPES
@pytest.mark.parametrize("prefix", [[60], [127], [128], [190, 5]], ids=str)
def test_paths_that_cross_into_the_next_chunk(place, dtype, prefix, monkeypatch):
    """Chunks of 64 positions, wherever the prefix ends: a tail belongs to the chunks of its positions."""
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    case = make(prefix, 80, 2, 1, dtype=dtype, tree="chain", seed=1)
    assert unequal(place, case, {0, 3, 4, 63, 67, 68, 79}) == []


@pytest.mark.parametrize("rule", emulator.SUMS)
def test_it_is_the_place_of_a_key_that_makes_it_so(place, rule):
    """Whatever an instruction does with its sixteen products, equal instructions give equal bits. The ordinary kernel puts keys of a tree
    into other instructions than plain decoding does: products that are added one by one hide that, the other rules show it."""
    if place.library is None:
        pytest.skip("a chip has one rule")
    cases = [make([n], 10, 4, 2, 64, dtype=BF16, tree="bushy", seed=n) for n in (37, 90)]
    assert all(unequal(place, case, rule=rule) == [] for case in cases)
    missed = sum(len(unequal(place, case, on=False, rule=rule)) for case in cases)
    assert missed == 0 if rule == "in order" else missed > 10


def test_rules_of_addition_differ(emulated):
    """Or the test above would say the same three times: the instruction's own result changes with the rule."""
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(16, 16, generator=g).bfloat16(), torch.randn(16, 8, generator=g).bfloat16(), torch.randn(16, 8, generator=g)
    results = []
    for rule in emulator.SUMS:
        with emulated.sums(rule), emulator.emulating(emulated):
            results.append(multiply(a, b, c))
        assert (results[-1] - (a.float() @ b.float() + c)).abs().max() < 1e-4
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(results, 2))


def test_rows_that_are_not_numbers(place):
    """A row with a score that is NaN is NaN; other rows keep their bits."""
    case = attention_case([50], 12, 4, 2, 64, dtype=BF16, tree="random", seed=9)
    o, lse = attend(place, case)
    bad = torch.zeros(12, 4, dtype=torch.bool)
    case.tail_k[0, 4, 1, 7] = torch.nan
    bad[[r for r in range(12) if 4 in path_of(case.parents[0], r)], 2:] = True
    case.q[0, 7, 0, 3], bad[7, 0] = torch.inf, True
    got, got_lse = attend(place, case)
    assert torch.equal(got_lse[0].isnan(), bad) and torch.equal(got[0].isnan(), bad[..., None].expand(12, 4, 64))
    assert torch.equal(got[0][~bad], o[0][~bad]) and torch.equal(got_lse[0][~bad], lse[0][~bad])


# ---- what else the mode lets run


def rowwise():
    """tests/ops/test_row_invariant.py, whose calls run here on the emulated kernels."""
    spec = importlib.util.spec_from_file_location("rowwise", Path(__file__).parents[1] / "ops/test_row_invariant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", rowwise().ops_of("cuda"))
def test_a_row_is_its_own(emulated, op):
    for rule in emulator.SUMS:
        with emulator.emulating(emulated), emulated.sums(rule), ramify.row_invariant(True):
            rowwise().check(op)


def test_intervals_are_split_in_one_way_under_the_mode(emulated, monkeypatch):
    """By the slots alone, and not by how many rows there are."""
    monkeypatch.setattr(_cuda, "CHUNK", 64)
    monkeypatch.setattr(_cuda, "FEW", 2)
    g = torch.Generator().manual_seed(2)
    q, (k, v) = torch.randn(1, 200, 1, 64, generator=g).bfloat16(), torch.randn(2, 1, 300, 1, 64, generator=g).bfloat16()
    v[:, :149] *= 2000
    k[:, 150:299], v[:, 150:299] = k[:, :149], -v[:, :149]  # what remains is all rounding
    start, end = torch.zeros(1, 200, dtype=I32), torch.full((1, 200), 300, dtype=I32)

    def differ():
        many, one = ops.interval_attention(q, k, v, start, end), ops.interval_attention(q[:, :1], k, v, start[:, :1], end[:, :1])
        return not torch.equal(many[:, :1], one)

    with emulator.emulating(emulated):
        assert differ()
        with ramify.row_invariant(True):
            assert not differ()


# ---- the mode itself


def test_setter_and_context_manager():
    assert not backends.invariant()
    with ramify.row_invariant(True):
        assert backends.invariant()
        with ramify.row_invariant(False):
            assert not backends.invariant()
        assert backends.invariant()
    with pytest.raises(RuntimeError), ramify.row_invariant(True):
        raise RuntimeError
    assert not backends.invariant()
    ramify.row_invariant(True)
    assert backends.invariant()
    ramify.row_invariant(False)
    for wrong in (1, None, "on"):
        with pytest.raises(TypeError, match="^row_invariant: on is "):
            ramify.row_invariant(wrong)
    assert not backends.invariant()


def test_nothing_changes_on_the_cpu():
    x = torch.randn(3, 8)
    with ramify.row_invariant(True):
        assert backends.choose("silu_mul", "cpu", dtype=F32) == ("reference" if backends.missing("cpu") else "cpu")
        assert backends.choose("silu_mul", "cpu", dtype=torch.float64) == "reference" and ops.silu_mul(x).shape == (3, 4)


def test_what_has_no_such_kernel_is_refused(emulated):
    told = r"row_invariant is on and no such kernel takes this call \(.*\); takes what one does. Use ramify.row_invariant\(False\)\.$"
    with ramify.row_invariant(True):
        for op, sizes in (
            ("linear", {"weight": BF16}),
            ("tree_attention", {"D": 80, "kv": BF16}),
            ("attention_colsum", {"D": 64, "kv": BF16}),
        ):
            with pytest.raises(ValueError, match=f"^{op}: {told}"):
                backends.choose(op, "cuda", dtype=BF16, **sizes)
        with pytest.raises(ValueError, match=f"^explain: {told}"):
            ramify.explain("linear", dtype=BF16, device="cuda")
        with ramify.backend("reference"), pytest.raises(ValueError, match='"reference" was forced and cannot run this call'):
            backends.choose("linear", "cuda", dtype=BF16, weight=BF16)
        with emulator.emulating(emulated), pytest.raises(ValueError, match="it is not row-invariant"):
            ops.attention_colsum(torch.zeros(1, 1, 1, 64).bfloat16(), torch.zeros(1, 4, 1, 64).bfloat16(), torch.zeros(1, 1, 1),
                                 torch.ones(1, dtype=I32))  # fmt: skip
    assert backends.choose("linear", "cuda", dtype=BF16, weight=BF16) == "reference"


# ---- what a chip must keep: the instruction itself


def multiply(a, b, c):
    """One m16n8k16."""
    d = torch.full_like(c, torch.nan)
    args = native_cuda.MmaArgs(type=native_cuda.TYPES[a.dtype], a=a.data_ptr(), b=b.data_ptr(), c=c.data_ptr(), d=d.data_ptr())
    native_cuda.run(args, a, b, c, d)
    return d


@DTYPES
@pytest.mark.parametrize("spread", [0, 8])
def test_an_instruction_keeps_rows_and_columns_apart(place, dtype, spread):
    """A result of mma.m16n8k16 depends on its own row, column and sum: not on the others, not on its place, and a product with an exact
    zero on either side leaves it as it was."""
    g = torch.Generator().manual_seed(spread)

    def values(*shape, of=dtype):  # spread: exponents that differ by as much, so that sums round
        return (
            (torch.randn(*shape, generator=g) * torch.exp2(torch.randint(-spread, spread + 1, shape, generator=g).float()))
            .to(of)
            .to(place.device)
        )

    with place.running():
        for _ in range(20):
            a, b, c = values(16, 16), values(16, 8), values(16, 8, of=F32)
            want = multiply(a, b, c)
            i, j = int(torch.randint(16, (), generator=g)), int(torch.randint(8, (), generator=g))
            others = values(16, 16), values(16, 8), values(16, 8, of=F32)
            for fill in (others, tuple(torch.zeros_like(t) for t in others)):
                x, y, z = (t.clone() for t in fill)
                x[i], z[i] = a[i], c[i]
                assert torch.equal(multiply(x, b, z)[i], want[i]), "another row shows"
                y[:, j], z[:, j] = b[:, j], c[:, j]
                assert torch.equal(multiply(a, y, z)[i, j], want[i, j]), "another column shows"
            order, columns = torch.randperm(16, generator=g).to(place.device), torch.randperm(8, generator=g).to(place.device)
            assert torch.equal(multiply(a[order].contiguous(), b, c[order].contiguous()), want[order]), "the place of a row shows"
            assert torch.equal(multiply(a, b[:, columns].contiguous(), c[:, columns].contiguous()), want[:, columns]), (
                "that of a column does"
            )
            assert torch.equal(multiply(torch.zeros_like(a), b, c), c) and torch.equal(multiply(a, torch.zeros_like(b), c), c)
            hidden = torch.rand(16, generator=g).to(place.device) < 0.5  # keys that one row does not see
            left, right = a.clone(), b.clone()
            left[:, hidden], right[hidden] = 0, 0
            zeros = multiply(left, b, c)
            assert torch.equal(zeros, multiply(left, right, c)) and torch.equal(zeros, multiply(a, right, c)), "which side is zero shows"
