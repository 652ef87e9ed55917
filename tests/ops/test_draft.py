"""table_draft and table_learn: as Token Recycling does it in numpy, and every backend as the reference does it."""

import numpy as np
import pytest
import torch

from ramify import reference
from ramify.draft.token_recycling import WIDTH, TokenRecycling, template

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
