"""Numbers in tensors that lie on a GPU, where no check of an op reads them: Triton kernels neither hang nor read beside their tensors.

Straight to the launchers, as a call with such tensors goes. The interpreter's guard raises at a load outside every argument. What the
CUDA kernels make of the same numbers is in tests/gates/test_cuda_emulated.py.
"""

import pytest
import torch

from ramify import backends, reference
from ramify.testing.tensors import attention_case, poisoned, running, sample_case

I32, F32, NAN, INF = torch.int32, torch.float32, float("nan"), float("inf")
MOST, WRAP = 2**31 - 1, 2**32  # an id that 32 bits do not hold, 0 to whoever takes the low ones
TRITON = [p for p in backends.params("tree_attention", dtype=F32, D=64, kv=F32) if p.id == "triton"]
pytestmark = [pytest.mark.parametrize("place", TRITON), pytest.mark.timeout(30), pytest.mark.filterwarnings("ignore:.*encountered in")]


def ints(*values):
    return torch.tensor(values, dtype=I32)


def within(x, fill):
    """x as a piece of a larger tensor, two entries of `fill` before and behind along its first two axes; and the larger one."""
    whole = x.new_full((x.shape[0] + 4, x.shape[1] + 4, *x.shape[2:]), fill)
    whole[2:-2, 2:-2] = x
    return whole[2:-2, 2:-2], whole


def launch(place, name, *args):
    """Call a launcher with its tensors on the place's device; those of a tuple, its outputs, come back."""
    from ramify.ops import _triton

    def there(x):
        return tuple(map(there, x)) if isinstance(x, tuple) else x.to(place.device) if isinstance(x, torch.Tensor) else x

    args = there(args)
    with running("triton"):
        getattr(_triton, name)(*args)
    return [x.cpu() for x in next(x for x in args if isinstance(x, tuple))]


def attention(place, case, window=0, **changed):
    """o and lse of tree_attention."""
    names = ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len", "page_table", "tail_rows")
    given = {**{name: getattr(case, name) for name in names}, **changed}
    outs = poisoned(case.q.shape, case.q.dtype), poisoned(case.q.shape[:3])
    *tensors, table, used = given.values()
    return launch(place, "tree_attention", outs, *tensors, table, 0.125, window, 4 if window else 0, used)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("absent", [1000, -1, -MOST])
def test_a_page_that_does_not_exist_reads_as_zeros(place, absent, window):
    """In a whole tile of keys and in the one that the prefix ends in."""
    case = attention_case([75, 90], 3, 2, 1, 64, dtype=torch.bfloat16, page=16)
    zeros = torch.zeros_like(case.k[:1])
    k, v = torch.cat([case.k, zeros]), torch.cat([case.v, zeros])
    for at in ([0, 1], [0, 4], [1, 0], [1, 5]):
        bad, good = case.page_table.clone(), case.page_table.clone()
        bad[at[0], at[1]], good[at[0], at[1]] = absent, len(case.k)
        got, want = attention(place, case, window, page_table=bad), attention(place, case, window, k=k, v=v, page_table=good)
        assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(got, want))


@pytest.mark.parametrize("window", [0, 20])
def test_lengths_are_held_to_their_tensors(place, window):
    case = attention_case([40], 3, 2, 1, 64, tail_rows=[3])
    for k in (case.k, case.v):
        k.nan_to_num_(nan=1.0)  # beyond the prefix
    S = case.k.shape[1]
    for name, wrong, right in (("prefix_len", MOST, S), ("prefix_len", -MOST, 0), ("tail_rows", MOST, 3), ("tail_rows", -MOST, 0)):
        got, want = attention(place, case, window, **{name: ints(wrong)}), attention(place, case, window, **{name: ints(right)})
        assert all(torch.equal(x, y) for x, y in zip(got, want))


def colsum(place, case, table, length, used, window):
    out = poisoned((1, 1, case.page_table.numel() * 16))
    rows = case.q, case.k, torch.zeros(1, 3, 2), ints(length), case.ancestors
    return launch(place, "attention_colsum", (out,), *rows, table, 0.125, window, 4, ints(used))[0]


@pytest.mark.parametrize("window", [0, 20])
def test_colsum(place, window):
    """Slots of a page that does not exist receive nothing; lengths are held to their tensors."""
    case = attention_case([48], 3, 2, 1, 64, page=16)
    for k in (case.k, case.v):
        k.nan_to_num_(nan=1.0)
    want = colsum(place, case, case.page_table, 48, 3, window)
    for absent in (1000, -1):
        table = case.page_table.clone()
        table[0, 2] = absent
        got = colsum(place, case, table, 48, 3, window)
        assert want[..., 32:48].ne(0).any() and not got[..., 32:48].any() and torch.equal(got[..., :32], want[..., :32])
    for length, used, as_of in ((MOST, 3, (64, 3)), (-MOST, 3, (0, 3)), (48, MOST, (48, 3)), (48, -MOST, (48, 0))):
        assert torch.equal(colsum(place, case, case.page_table, length, used, window), colsum(place, case, case.page_table, *as_of, window))


def test_intervals(place):
    """Bounds outside the slots are those of the slots; a row whose interval lies beyond them sees nothing."""
    q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 5, 1, 64)

    def attended(start, end):
        outs = poisoned(q.shape), poisoned((1, 4, 1))
        return launch(place, "interval_attention", outs, q, k, v, ints(*start)[None], ints(*end)[None], 0.1)

    got = attended([-MOST, 2, MOST, 999], [MOST, MOST, MOST, -7])
    want = attended([0, 2, 0, 0], [5, 5, 0, 0])
    assert all(torch.equal(x, y) for x, y in zip(got, want)) and (got[1][0, 2:] == -INF).all()


def test_rope(place):
    """A position outside the tables turns its row to NaN, all but the features that pass unturned."""
    x, table = torch.randn(4, 3, 64), torch.rand(5, 20)
    got = launch(place, "rope", (poisoned(x.shape),), x, table, table, ints(4, 5, -1, MOST))[0]
    want = launch(place, "rope", (poisoned(x.shape),), x, table, table, ints(4, 0, 0, 0))[0]
    assert torch.equal(got[0], want[0]) and got[0].isfinite().all()
    assert got[1:, :, :40].isnan().all() and torch.equal(got[1:, :, 40:], x[1:, :, 40:])


def test_embed(place):
    table = torch.randn(5, 8)
    for ids in (ints(4, 5, -1, MOST), torch.tensor([4, WRAP, WRAP + 3, 1 - WRAP])):
        got = launch(place, "embed", (poisoned((4, 8)),), ids, table, F32)[0]
        assert torch.equal(got[0], table[4]) and got[1:].isnan().all()


def walked(place, parents, mode="det", **changed):
    """Path, count and bonus of verify_sample over five rows."""
    names = ("logits", "tokens", "parents", "n_rows", "temperature", "seed", "position", "q")
    given = dict(zip(names, sample_case(1, 5, 50, 3, F32, "wor"), strict=True))
    given |= {"parents": torch.tensor([parents]), "n_rows": ints(5), "temperature": torch.ones(1), **changed}
    *tensors, q = given.values()
    outs = poisoned((1, 5), I32), poisoned((1,), I32), poisoned((1,), I32)
    return launch(place, "verify_sample", outs, *tensors, q if mode == "wor" else None, mode)


NO_TREE = pytest.mark.parametrize("bad", [[3, 2, 0], [1, 2, 77], [2, 0, 4], [-9, 4, 1 << 40], [WRAP, WRAP + 1, 1 - WRAP]], ids=str)


@pytest.mark.parametrize("mode", ["det", "wor"])
@NO_TREE
def test_parents_that_are_no_tree(place, bad, mode):
    """A cycle, a row of its own, a later row, no row: such a row is nobody's child, and the draws of the others are their own.

    Random tokens first; then one token alone is likely and every row holds it, so that a row taken for a child would be accepted.
    """
    rows = [-1, 0, *bad]
    alone = [p if 0 <= p < r else -1 for r, p in enumerate(rows)]
    certain = torch.full((1, 5, 50), -INF)
    certain[..., 7] = 0
    tokens = torch.full((1, 5), 7)
    for changed in ({}, {"logits": certain, "q": certain.exp(), "tokens": tokens}):
        assert all(map(torch.equal, walked(place, rows, mode, **changed), walked(place, alone, mode, **changed)))
    if mode == "det":
        got, want = (greedy(place, tokens, torch.tensor([tree]), tokens) for tree in (rows, alone))
        assert all(map(torch.equal, got, want))


def greedy(place, tokens, parents, argmax):
    """Path, count and bonus of verify_greedy over five rows."""
    return launch(
        place, "verify_greedy", (poisoned((1, 5), I32), poisoned((1,), I32), poisoned((1,), I32)), tokens, parents, argmax, ints(5)
    )


@pytest.mark.parametrize("mode", ["det", "wor"])
def test_tokens_beyond_32_bits_are_no_token(place, mode):
    """Neither the likely one, which they wrap to, nor the -1 that stands for none."""
    certain = torch.full((1, 5, 50), -INF)
    certain[..., 7] = 0
    for token, likely in ((WRAP + 7, certain), (WRAP - 1, torch.full_like(certain, NAN)), (7 - WRAP, certain)):
        path, _, bonus = walked(place, [-1, 0, 0, 1, 1], mode, logits=likely, q=certain.exp(), tokens=torch.full((1, 5), token))
        assert path.tolist() == [[0, -1, -1, -1, -1]] and bonus.item() == (7 if likely is certain else -1)
        path, count, _ = greedy(place, torch.full((1, 5), token), torch.tensor([[-1, 0, 0, 1, 1]]), torch.full((1, 5), 7))
        assert path.tolist() == [[0, -1, -1, -1, -1]] and count.item() == 1


@pytest.mark.parametrize("mode", ["det", "wor"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_that_are_no_law(place, value, mode):
    """One chunk of logits and two: no load beside them, and the bonus is none."""
    tree = [-1, 0, 0, 1, 1]
    for V in (50, 5000)[: 1 if value != value else 2]:  # numpy, which plays the maximum, refuses a whole chunk of NaN
        logits = torch.full((1, 5, V), value)
        path, count, bonus = walked(place, tree, mode, logits=logits, q=torch.rand(1, 5, V))
        assert (path.tolist(), count.tolist(), bonus.tolist()) == ([[0, -1, -1, -1, -1]], [1], [-1])


@pytest.mark.parametrize("V", [5, 5000])
def test_residuals_of_no_weight(place, V):
    for p in (0.0, NAN, -INF):
        args = torch.full((2, V), p), torch.rand(2, V), torch.full((2,), 0.5, dtype=torch.float64)
        assert launch(place, "residual_sample", (poisoned((2,), I32),), *args)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("bad", [-9, 3, 7, 8, 255, 256, MOST, -MOST - 1])
def test_rows_that_no_tree_has(place, bad):
    """A parent that is the row itself, a later one, none of the tree; a rank outside the table. Such a row holds no token."""
    table, roots = torch.arange(27, dtype=I32).view(9, 3) % 9, ints(2, 8)
    for at in (0, 3):
        for spoil in ("parents", "ranks"):
            tree = {"parents": ints(-1, 0, 0, 1, 2, 3, 3), "ranks": ints(-1, 0, 1, 2, 0, 1, 2)}
            tree[spoil][at] = bad
            got = launch(place, "table_draft", (poisoned((2, 7), I32),), table, roots, *tree.values())[0]
            assert torch.equal(got, reference.table_draft(table, roots, *tree.values())) and (at == 0) == (got[0, at] >= 0).item()


def test_ids_that_no_vocabulary_has(place):
    """As a root, in the table and to learn: neither the table nor what stands around it is read or written there."""
    from ramify.ops import _triton

    inner, whole = within(torch.arange(27, dtype=I32).view(9, 3) % 9, -5)
    inner[3:] = ints(9, -MOST - 1, MOST)
    roots, parents = torch.tensor([2, 9, -1, WRAP + 2, 2 - WRAP, MOST]), ints(-1, 0, 1, 1)
    for ids in (roots, roots.int()):
        got = launch(place, "table_draft", (poisoned((6, 4), I32),), inner, ids, parents, ints(0, 1, 0, 2))[0]
        assert torch.equal(got, reference.table_draft(inner, ids, parents, ints(0, 1, 0, 2))) and got[0].tolist() == [2, 7, -1, -1]
    there, tokens = whole.to(place.device), ints(9, -1, MOST, 8, -MOST - 1).to(place.device)
    with running("triton"):
        _triton.table_learn(there[2:-2, 2:-2], tokens, torch.full((5, 4), 1 << 20, dtype=I32, device=place.device))
    inner[8] = 1 << 20
    assert torch.equal(there.cpu(), whole)


def placed(place, paged, path, count, length, table=None, rows=5):
    """Slots of a cache of 8, or of two pages of 4, and the tail's rows that lie there afterwards, -1 for none; kv_append without a path.

    Keys, values and what stands around them: the tail lies in NaN, the caches lie in zeros, and there it stays.
    """
    from ramify.ops import _triton

    shape = (2, 4, 1, 4) if paged else (1, 8, 1, 4)
    tail = within(torch.arange(1, rows + 1.0)[None, :, None, None].expand(1, rows, 1, 4).contiguous(), NAN)[1].to(place.device)
    caches = [within(torch.zeros(shape), 0.0)[1].to(place.device) for _ in "kv"]
    inner = [whole[2:-2, 2:-2] for whole in (tail, *caches)]
    path, count, length, table = (None if t is None else torch.tensor(t).to(place.device, I32) for t in (path, count, length, table))
    with running("triton"):
        if path is None:
            _triton.kv_append(inner[0], inner[0] + 10, *inner[1:], length, count, table)
        else:
            _triton.kv_commit(inner[0], inner[0] + 10, *inner[1:], path, count, length, table)
    found = [(x.flatten(0, 1)[:, 0] - y).cpu() for x, y in zip(inner[1:], (1, 11))]
    inner[1].zero_(), inner[2].zero_()
    assert not caches[0].any() and not caches[1].any(), "written outside the cache"
    empty = [torch.where((f == y).all(-1, keepdim=True), torch.full_like(f, -1), f) for f, y in zip(found, (-1, -11))]
    assert torch.equal(*empty) and (empty[0] == empty[0][:, :1]).all()
    return empty[0][:, 0].int().tolist()


@pytest.mark.parametrize("paged", [False, True])
def test_what_does_not_exist_is_not_placed(place, paged):
    """Rows outside the tail, slots outside the cache and counts beyond the path, by kv_append and by kv_commit."""
    table = [[0, 1]] if paged else None
    for path, count, length, want in (
        ([[0, 5, -1, 4]], [4], [1], [-1, 0, -1, -1, 4, -1, -1, -1]),
        ([[MOST, 6, 2, -MOST]], [4], [0], [-1, -1, 2, -1, -1, -1, -1, -1]),
        ([[0, 1, 2, 3]], [4], [6], [-1] * 6 + [0, 1]),
        ([[0, 1, 2, 3]], [4], [-2], [2, 3] + [-1] * 6),
        ([[0, 1, 2, 3]], [99], [0], [0, 1, 2, 3] + [-1] * 4),
        ([[0, 1, 2, 3]], [-3], [0], [-1] * 8),
        ([[0, 1, 2, 3]], [4], [MOST], [-1] * 8),
        (None, [5], [6], [-1] * 6 + [0, 1]),
        (None, [99], [3], [-1] * 3 + [0, 1, 2, 3, 4]),
        (None, None, [-3], [3, 4] + [-1] * 6),
    ):
        assert placed(place, paged, path, count, length, table) == want, (path, count, length)


@pytest.mark.parametrize("absent", [2, 3, -1, -2, 1000, MOST, -MOST])
def test_pages_that_do_not_exist_are_not_written(place, absent):
    for path in ([[0, 1, 2, 3, 4]], None):
        assert placed(place, True, path, [5], [2], [[1, absent]]) == [-1] * 6 + [0, 1]
        assert placed(place, True, path, [5], [2], [[absent, 0]]) == [2, 3, 4] + [-1] * 5
