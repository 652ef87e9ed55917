"""The draft table's CUDA kernels: in every order of blocks and threads, and over numbers that no check reads on a device."""

import pytest
import torch

from ramify import backends, ops, reference
from ramify.ops import _bound, _cuda_draft
from ramify.testing.tensors import TREES, padded, poisoned, random_tree

I32, MOST, WRAP = torch.int32, 2**31 - 1, 2**32


def case(B, T, V, W, kind, seed=0):
    """table, roots, parents, ranks: a tenth of the table is not known, and neither are a few roots; some rows are not in use."""
    g = torch.Generator().manual_seed(seed + T)
    table = torch.randint(-V // 10, V, (V, W), generator=g).int()
    parents, ranks = torch.tensor(random_tree(T, kind, g)).int(), torch.randint(0, W, (T,), generator=g).int()
    parents[torch.rand(T, generator=g) < (0 if kind == "chain" else 0.05)] = -1
    return table, torch.randint(-1, V, (B,), generator=g), parents, ranks


def there(place, *args):
    return [padded(x).to(place.device) for x in args]


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(("B", "T", "V", "W"), [(1, 1, 1, 1), (5, 2, 5, 3), (2, 33, 70, 8), (3, 81, 1000, 8), (1, 256, 300, 1)])
def test_table_draft(place, kind, B, T, V, W):
    args = case(B, T, V, W, kind)
    if kind == "chain":
        args[0].abs_()
    there_too, out = there(place, *args), padded(poisoned((B, T), I32)).to(place.device)
    got = place.everywhere(lambda: ops.table_draft(*there_too, out=out).clone())
    assert torch.equal(got.cpu(), reference.table_draft(*args))


@pytest.mark.parametrize(("M", "V", "W", "more"), [(1, 1, 1, 0), (3, 5, 3, 2), (33, 5, 8, 0), (81, 1000, 8, 1), (300, 40, 33, 3)])
def test_table_learn(place, M, V, W, more):
    """The last row of a token in every order of blocks; the first rows hold it nowhere else."""
    g = torch.Generator().manual_seed(M)
    table, likely = torch.randint(0, V, (V, W), generator=g).int(), torch.randint(-1, MOST, (M, W + more), generator=g).int()
    tokens, want = torch.randint(-1, V + 1, (M,), generator=g).int(), table.clone()
    reference.table_learn(want, tokens, likely)
    before, tokens, likely = there(place, table, tokens, likely)

    def learned():
        after = before.clone()
        ops.table_learn(after, tokens, likely)
        return after

    assert torch.equal(place.everywhere(learned).cpu(), want)


def launch(place, table, roots, parents, ranks):
    """Tokens as the launcher makes them, on a device, where no check of an op reads values."""
    out = poisoned((len(roots), len(parents)), I32).to(place.device)
    with place.running():
        _cuda_draft.table_draft((out,), *(x.to(place.device) for x in (table, roots, parents, ranks)))
    return out.cpu()


@pytest.mark.parametrize("bad", [-9, 3, 7, 8, 9, 255, 256, MOST, -MOST - 1])
def test_rows_that_no_tree_has(place, bad):
    """A parent that is the row itself, a later one, none of the tree; a rank outside the table. Such a row holds no token."""
    table, roots, parents, ranks = case(2, 9, 50, 3, "bushy")
    table.abs_(), roots.abs_()
    for spoilt, at in ((parents, 3), (ranks, 4), (parents, 0), (ranks, 0)):
        kept = int(spoilt[at])
        spoilt[at] = bad
        got, want = launch(place, table, roots, parents, ranks), reference.table_draft(table, roots, parents, ranks)
        assert torch.equal(got, want) and (at == 0) == (got[0, at] >= 0).item()
        spoilt[at] = kept


def test_ids_that_no_vocabulary_has(place):
    """As a root, in 64 bits too, in the table and to learn: the table is not left."""
    table, _, parents, ranks = case(2, 20, 50, 3, "bushy")
    table[7:] = torch.tensor([-MOST - 1, 50, MOST])
    roots = torch.tensor([5, 50, -1, WRAP + 5, 5 - WRAP, MOST, -(1 << 63)])
    got = launch(place, table, roots, parents, ranks)
    assert torch.equal(got, reference.table_draft(table, roots, parents, ranks)) and (got[1:] == -1).all() and got[0, 0] == 5
    whole = torch.zeros(60, 5, dtype=I32, device=place.device)
    inner, tokens = whole[5:55, 1:4], torch.tensor([50, -1, MOST, 49, -MOST - 1], dtype=I32, device=place.device)
    with place.running():
        ops.table_learn(inner, tokens, torch.full((5, 3), 9, dtype=I32, device=place.device))
    assert (whole[54, 1:4] == 9).all() and whole.sum() == 27


def test_bound_calls(place):
    """Both as a recorded step has them: the second learns what the first one drafted."""
    table, roots, parents, ranks = (x.to(place.device) for x in case(2, 81, 200, 8, "bushy"))
    out, likely = poisoned((2, 81), I32).to(place.device), torch.randint(0, 200, (162, 8), device=place.device).int()
    want = table.cpu().clone()
    tokens = reference.table_draft(want, roots.cpu(), parents.cpu(), ranks.cpu())
    reference.table_learn(want, tokens.view(-1), likely.cpu())
    with place.running():
        calls = _bound.table_draft(table, roots, parents, ranks, out), _bound.table_learn(table, out.view(-1), likely)
        for call in calls:
            assert call.backend == "cuda" and call.op in backends.OPS
            call.run()
    assert torch.equal(out.cpu(), tokens) and torch.equal(table.cpu(), want)
