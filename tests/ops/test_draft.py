"""table_draft and table_learn: as Token Recycling does it in numpy, and every backend as the reference does it, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import backends, ops, reference
from ramify.draft.token_recycling import WIDTH, TokenRecycling, template
from ramify.ops import _bound
from ramify.testing.tensors import TREES, padded, poisoned, random_tree, running, runs, threads

I32 = torch.int32


def template_of(rows):
    """parents and ranks int32 [T] of the first rows of Token Recycling's template."""
    levels, parents = template(rows)
    ranks = np.full(len(parents), -1, np.int32)
    for row, _, rank in levels:
        ranks[row] = rank
    return torch.tensor(parents, dtype=I32), torch.from_numpy(ranks)


def table_of(V, W, seed, unknown=0.0):
    """A table of random successors, where V allows a row's own each; entries that say nothing hold any negative number."""
    g = torch.Generator().manual_seed(seed)
    table = (torch.rand(V, max(V, W), generator=g).argsort(-1)[:, :W] % V).int()
    return torch.where(torch.rand(V, W, generator=g) < unknown, -torch.randint(1, 1 << 31, (V, W), generator=g), table).int()


@pytest.mark.parametrize("unknown", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("rows", [1, 7, 40, 81])
def test_the_reference_drafts_as_token_recycling_does(rows, unknown):
    """Of full tables row for row; else the rows whose tokens are known, which the drafter alone keeps, in their order."""
    table, roots = table_of(50, WIDTH, rows, unknown), [3, 49, 0]
    drafter = TokenRecycling(keep=False, table=table.clamp(min=-1).numpy())
    tree = drafter.propose([0, 1, 2], roots, [rows] * 3)
    parents, ranks = template_of(rows)
    got = reference.table_draft(table, torch.tensor(roots), parents, ranks)
    assert got.dtype == I32
    for b in range(3):
        wanted = tree.tokens[tree.span(b)].tolist()
        assert [token for token in got[b].tolist() if token >= 0] == wanted
        assert unknown or got[b].tolist() == wanted


@pytest.mark.parametrize("M", [1, 2, 81, 300])
def test_the_reference_learns_as_token_recycling_does(M):
    g = torch.Generator().manual_seed(M)
    table, tokens, likely = table_of(40, WIDTH, M, 0.5), torch.randint(0, 40, (M,), generator=g).int(), table_of(M, WIDTH + 2, M + 1)
    drafter = TokenRecycling(keep=False, table=table.numpy().copy())
    drafter._learn(tokens.tolist(), likely.numpy())
    reference.table_learn(table, tokens, likely)
    assert torch.equal(table, torch.from_numpy(drafter.table))


def tree_of(T, W, kind, seed, spare=0.0):
    """parents and ranks of a random tree; of rows that are not in use, some of which have children, ranks are garbage."""
    g = torch.Generator().manual_seed(seed)
    parents, ranks = torch.tensor(random_tree(T, kind, g)).int(), torch.randint(0, W, (T,), generator=g).int()
    parents[torch.rand(T, generator=g) < spare] = -1
    return parents, torch.where(parents < 0, 1 << 30, ranks).int()


def wrong_ids(x, V, g, share=0.2):
    """x with some ids that no vocabulary of V holds."""
    beside = torch.tensor([-1, V, -(1 << 31), (1 << 31) - 1])[torch.randint(0, 4, x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < share, beside, x).to(x.dtype)


TREES_OF = [(1, 1, "star"), (2, 3, "star"), (7, 8, "bushy"), (81, 8, "template"), (256, 1, "chain"), (256, 3, "random")]  # T, W, kind


@pytest.mark.parametrize(("backend", "level"), runs("table_draft"))
@pytest.mark.parametrize("V", [1, 5, 1000])
@pytest.mark.parametrize(("T", "W", "kind"), TREES_OF)
def test_draft(backend, level, T, W, kind, V):
    """Gaps around every tensor, unknown and impossible entries, rows that are not in use, an output that nobody has written yet."""
    g, whole = torch.Generator().manual_seed(T + V), kind == "chain"  # one that is known to its end
    parents, ranks = template_of(T) if kind == "template" else tree_of(T, W, kind, T, 0.0 if whole else 0.1)
    table = table_of(V, W, T) if whole else padded(wrong_ids(table_of(V, W, T, 0.05), V, g, 0.02))
    for B in (1,) if whole else (1, 2, 5):
        roots = wrong_ids(torch.randint(0, V, (B,), generator=g), V, g, 0.0 if B == 1 else 0.2)
        out = padded(poisoned((B, T), I32))
        with running(backend, level):
            assert ops.table_draft(table, roots, padded(parents), padded(ranks), out=out) is out
            again = ops.table_draft(table, roots.int(), parents, ranks)
        want = reference.table_draft(table, roots, parents, ranks)
        assert torch.equal(out, want) and torch.equal(again, want) and again.dtype == I32
        assert (out._base[B:] == -7).all() and (out._base[:, T:] == -7).all() and (not whole or out.min() >= 0)


@pytest.mark.parametrize(("backend", "level"), runs("table_draft"))
def test_roots_beyond_32_bits_are_no_token(backend, level):
    """Not even where their low bits name one."""
    table, (parents, ranks), wrap = table_of(9, 2, 1), tree_of(4, 2, "chain", 1), 1 << 32
    with running(backend, level):
        got = ops.table_draft(table, torch.tensor([4, wrap + 4, 4 - wrap, wrap, -(1 << 63)]), parents, ranks)
    assert got[0].min() >= 0 and (got[1:] == -1).all()


@pytest.mark.parametrize(("backend", "level"), runs("table_learn"))
@pytest.mark.parametrize("V", [1, 5, 1000])
@pytest.mark.parametrize(("M", "W", "more"), [(1, 1, 0), (2, 3, 0), (7, 8, 2), (81, 8, 0), (300, 3, 5)])
def test_learn(backend, level, M, W, more, V):
    """The last row of a token stays, ids of no vocabulary teach nothing, and nothing beside the table's rows is written."""
    g = torch.Generator().manual_seed(M + V)
    table, likely = padded(table_of(V, W, M, 0.3)), padded(torch.randint(-3, 1 << 30, (M, W + more), generator=g).int())
    tokens = wrong_ids(torch.randint(0, V, (M,), generator=g).int(), V, g)
    want = table.clone()
    for m, token in enumerate(tokens.tolist()):
        if 0 <= token < V:
            want[token] = likely[m, :W]
    plain = table.clone()
    reference.table_learn(plain, tokens, likely)
    with running(backend, level):
        assert ops.table_learn(table, padded(tokens), likely) is None
    assert torch.equal(table, want) and torch.equal(plain, want)
    assert (table._base[V:] == -7).all() and (table._base[:, W:] == -7).all()


@pytest.mark.parametrize(("backend", "level"), runs("table_learn"))
def test_learning_from_the_table_itself(backend, level):
    """Rows and tokens that lie in the table are read before it is written."""
    table = torch.arange(40, dtype=I32).view(10, 4).remainder(10)
    want = table.clone()
    reference.table_learn(want, table[2].clone(), table[3:7].clone())
    with running(backend, level):
        ops.table_learn(table, table[2], table[3:7])
    assert torch.equal(table, want)


@pytest.mark.parametrize(("backend", "level"), runs("table_learn"))
def test_what_a_step_taught_is_drafted(backend, level):
    """From the ids of topk_logits to a guess, as a loop uses both; of a tree without a known successor its root alone is taught."""
    table, (parents, ranks) = torch.full((30, 2), -1, dtype=I32), tree_of(5, 2, "chain", 0)
    likely = torch.randn(4, 30, generator=torch.Generator().manual_seed(3)).topk(3).indices.int()
    first = int(likely[0, ranks[1]])
    with running(backend, level):
        ops.table_learn(table, torch.tensor([7, -1, first, 7], dtype=I32), likely[[1, 3, 2, 0]])
        got = ops.table_draft(table, torch.tensor([7, 11]), parents, ranks)
        ops.table_learn(table, got[1], torch.zeros(5, 2, dtype=I32))
    assert got[0, :3].tolist() == [7, first, int(likely[2, ranks[2]])] and got[1].tolist() == [11, -1, -1, -1, -1]
    assert table[11].tolist() == [0, 0] and (table[:, 0] >= 0).sum() == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 5),
    M=st.integers(0, 60),
    V=st.integers(1, 12),
    W=st.integers(1, 9),
    kind=st.sampled_from(TREES),
    seed=st.integers(0, 999),
)
def test_any_number_of_threads(count, M, V, W, kind, seed):
    g = torch.Generator().manual_seed(seed)
    table, likely = table_of(V, W, seed), torch.randint(0, 99, (M, W), generator=g).int()
    tokens, (parents, ranks) = torch.randint(-1, V + 1, (M,), generator=g).int(), tree_of(M + 1, W, kind, seed, 0.1)
    want = table.clone()
    reference.table_learn(want, tokens, likely)
    with threads(count):
        got = ops.table_draft(table, tokens, parents, ranks)
        assert torch.equal(got, reference.table_draft(table, tokens, parents, ranks))
        ops.table_learn(table, tokens, likely)
    assert torch.equal(table, want)


def test_says_what_it_does_not_take():
    table, roots, row = torch.zeros(5, 3, dtype=I32), torch.zeros(2, dtype=I32), torch.tensor([-1, 0, 1, -1], dtype=I32)
    ranks, likely = torch.tensor([9, 0, 2, -9], dtype=I32), torch.zeros(2, 3, dtype=I32)
    assert ops.table_draft(table, roots, row, ranks).shape == (2, 4)

    def changed(x, t, value):
        x = x.clone()
        x[t] = value
        return x

    long = torch.full((257,), -1, dtype=I32)
    bad = [
        (ops.table_draft, (table.long(), roots, row, ranks), TypeError, "table is int64; takes int32 [V, W]. Use table.int()."),
        (ops.table_draft, (table, roots.float(), row, ranks), TypeError, "roots is float32; takes int32 or int64"),
        (ops.table_draft, (table, roots, row.long(), ranks), TypeError, "parents is int64; takes int32"),
        (ops.table_draft, (table[:0], roots, row, ranks), ValueError, "table is [0, 3]; takes [V, W] with V of 1 or more"),
        (ops.table_draft, (table[:, :0], roots, row, ranks), ValueError, "table is [5, 0]; takes [V, W] with W of 1 or more"),
        (ops.table_draft, (table, roots[None], row, ranks), ValueError, "roots is [1, 2]; takes 1 axes [B]"),
        (ops.table_draft, (table, roots, row, ranks[:3]), ValueError, "ranks is [3]; takes [T] with T = 4, as in parents"),
        (ops.table_draft, (table, roots, row[:0], ranks[:0]), ValueError, "parents has 0 rows a sequence; takes 1 to 256"),
        (ops.table_draft, (table, roots, long, long), ValueError, "parents has 257 rows a sequence; takes 1 to 256"),
        (ops.table_draft, (table, roots, changed(row, 0, 0), ranks), ValueError, "parents[0] is 0; takes -1."),
        (ops.table_draft, (table, roots, changed(row, 2, 2), ranks), ValueError, "parents[2] is 2; takes -1 to 1."),
        (ops.table_draft, (table, roots, changed(row, 1, -2), ranks), ValueError, "parents[1] is -2; takes -1 to 0."),
        (ops.table_draft, (table, roots, row, changed(ranks, 1, 3)), ValueError, "ranks[1] is 3; takes 0 to 2, the columns of table"),
        (ops.table_draft, (table, roots, row, changed(ranks, 2, -1)), ValueError, "ranks[2] is -1; takes 0 to 2"),
        (ops.table_learn, (table, roots, likely[:, :2].contiguous()), ValueError, "likely has 2 columns; takes 3 or more"),
        (ops.table_learn, (table, roots[:1], likely), ValueError, "likely is [2, 3]; takes [M, K] with M = 1, as in tokens"),
        (ops.table_learn, (table, roots.long(), likely), TypeError, "tokens is int64; takes int32"),
        (ops.table_learn, (table, roots, likely.long()), TypeError, "likely is int64; takes int32"),
        (ops.table_learn, (table[:1].expand(5, 3), roots, likely), ValueError, "table is [5, 3] with strides [0, 1]; takes elements at"),
    ]  # fmt: skip
    for op, args, kind, said in bad:
        with pytest.raises(kind) as error:
            op(*args)
        assert said in str(error.value) and str(error.value).startswith(f"{op.__name__}: "), str(error.value)


def test_nothing_to_do():
    table, none = torch.zeros(5, 3, dtype=I32), torch.zeros(0, dtype=I32)
    assert ops.table_draft(table, none, torch.tensor([-1, 0]).int(), torch.zeros(2, dtype=I32)).shape == (0, 2)
    ops.table_learn(table, none, torch.zeros(0, 3, dtype=I32))
    assert not table.any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_bound_calls(backend):
    """Called again and again over what their tensors hold by then; values are not looked at, and none is read outside a tensor."""
    table, likely = table_of(50, WIDTH, 1, 0.2), table_of(243, WIDTH, 2, 0.2)
    roots, (parents, ranks), out = torch.tensor([3, 5, 7]), template_of(81), poisoned((3, 81), I32)
    with backends.backend(backend):
        draft, learn = _bound.table_draft(table, roots, parents, ranks, out), _bound.table_learn(table, out.view(-1), likely)
    assert (draft.op, learn.op, draft.backend) == ("table_draft", "table_learn", backend or "cpu") and (out == -7).all()
    for step in range(3):
        roots += step
        want, taught = reference.table_draft(table, roots, parents, ranks), table.clone()
        reference.table_learn(taught, want.view(-1), likely)
        draft.run()
        learn.run()
        assert torch.equal(out, want) and torch.equal(table, taught)
    table.copy_(table_of(50, WIDTH, 3))
    (wrong, outside), first = (parents.clone(), ranks.clone()), (parents == 0).nonzero().flatten()
    wrong[first[:5]] = torch.tensor([first[0], first[1] + 1, -9, 81, 1 << 30], dtype=I32)
    outside[first[5:]] = torch.tensor([WIDTH, -1, 1 << 30], dtype=I32)
    wrong[0], outside[0], parents[first] = 3, -9, -1
    with backends.backend(backend):
        _bound.table_draft(table, roots, wrong, outside, out).run()
    assert torch.equal(out, reference.table_draft(table, roots, parents, ranks)) and (out[:, 0] >= 0).all() and (out[:, 1:] == -1).all()
