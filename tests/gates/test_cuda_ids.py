"""Ids of 64 bits that CUDA kernels read in 32: one that does not fit names nothing, and never what its low bits name.

Straight to the launchers, as a call goes whose ids lie on a GPU, where no check of an op reads them.
"""

import pytest
import torch

from ramify.ops import _cuda
from ramify.testing.tensors import poisoned

I32, F32, WRAP = torch.int32, torch.float32, 2**32


def launch(place, name, *args):
    """Call a launcher with its tensors on the place's device; all that it was given comes back."""

    def there(x):
        return tuple(map(there, x)) if isinstance(x, tuple) else x.to(place.device) if isinstance(x, torch.Tensor) else x

    args = there(args)
    with place.running():
        getattr(_cuda, name)(*args)
    return args


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_embed(place):
    table = torch.randn(5, 8)
    (got,), *_ = launch(place, "embed", (poisoned((5, 8)),), ids(4, WRAP, WRAP + 3, 1 - WRAP, -(1 << 63)), table)
    assert torch.equal(got.cpu()[0], table[4]) and got[1:].isnan().all()


def test_rope(place):
    x, table = torch.randn(4, 3, 8), torch.rand(5, 4)
    (got,), *_ = launch(place, "rope", (poisoned(x.shape),), x, table, table, ids(4, WRAP, WRAP + 4, 2 - WRAP))
    assert got[0].isfinite().all() and got[1:].isnan().all()


def test_rope_append(place):
    qkv, table, slots = torch.randn(3, 4 * 8), torch.rand(5, 4), torch.arange(3, dtype=I32)
    caches = poisoned((4, 1, 8)), poisoned((4, 1, 8))
    q, *_, k, v, _, _, _ = launch(
        place, "rope_append", poisoned((3, 2, 8)), qkv, table, table, ids(4, WRAP + 1, -WRAP), slots, *caches, None, None, 0.1
    )
    assert q[0].isfinite().all() and q[1:].isnan().all() and k[0].isfinite().all() and k[1:].isnan().all()
    assert torch.equal(v.cpu()[:3, 0], qkv[:, 24:])


@pytest.mark.parametrize("layers", [(), (2,)], ids=["one", "layers"])
def test_kv_commit(place, layers):
    tail, cache = torch.ones(*layers, 1, 4, 1, 8), torch.zeros(*layers, 1, 8, 1, 8)
    path, four, none = ids(WRAP, 1, WRAP + 2, 3 - WRAP)[None], torch.tensor([4], dtype=I32), torch.tensor([0], dtype=I32)
    _, _, k, v, *_ = launch(place, "kv_commit", tail, tail, cache, cache.clone(), path, four, none, None)
    for written in (k, v):
        assert (written != 0).flatten(-2).any(-1).reshape(-1, 8).tolist() == [[False, True] + 6 * [False]] * max(1, sum(layers) or 1)


def test_trees(place):
    """Parents and tokens, by choice and by chance: every row holds the token that is chosen, or one that wraps to it."""
    certain = torch.full((1, 5, 50), -torch.inf)
    certain[..., 7] = 0
    one, n = torch.ones(1, dtype=torch.int64), torch.tensor([5], dtype=I32)
    for tokens, parents, want in (
        (ids(7, 7, 7, 7, 7), ids(-1, 0, WRAP, WRAP + 1, 1 - WRAP), [0, 1, -1, -1, -1]),
        (ids(7, WRAP + 7, 7 - WRAP, 7, 7), ids(-1, 0, 0, 1, 2), [0, -1, -1, -1, -1]),
    ):
        outs = lambda: (poisoned((1, 5), I32), poisoned((1,), I32), poisoned((1,), I32))  # noqa: E731
        chosen, *_ = launch(place, "verify_greedy", outs(), tokens[None], parents[None], torch.full((1, 5), 7), n)
        rest = tokens[None], parents[None], n, torch.ones(1), one, one
        drawn = [launch(place, "verify_sample", outs(), certain, *rest, certain.exp(), mode)[0] for mode in ("iid", "wor")]
        drawn.append(launch(place, "verify_sample", outs(), certain, *rest, None, "det")[0])
        for path, count, bonus in (chosen, *drawn):
            assert path.tolist() == [want] and count.item() == sum(row >= 0 for row in want) and bonus.item() == 7
