"""CUDA attention_colsum against the reference, in every schedule; aligned rows and padded ones; pages and rows that do not exist."""

import pytest
import torch

from ramify import ops, reference
from ramify.ops import _cuda
from ramify.testing.tensors import attention_case, padded, poisoned

BF16, F16 = torch.bfloat16, torch.float16


def check(place, case, **options):
    exact = case.double()
    _, lse = reference.tree_attention(*exact.tensors, **exact.options, **options, return_lse=True)
    given = {"ancestors": case.ancestors, "page_table": case.page_table, "tail_rows": case.tail_rows}
    tensors = case.q, case.k, padded(lse.float()), case.prefix_len
    want = reference.attention_colsum(*(t.double() for t in tensors[:3]), case.prefix_len, **given, **options)
    moved = [t.to(place.device) for t in tensors]
    given = {name: None if t is None else t.to(place.device) for name, t in given.items()}
    out = lambda: padded(poisoned(want.shape)).to(place.device)  # noqa: E731
    got = place.everywhere(lambda: ops.attention_colsum(*moved, **given, **options, out=out())).cpu()
    # products of 16-bit operands are exact in f32, sums of D of them lose D 2^-24 of their size, scores stay below 30
    assert ((got.double() - want).abs() <= 5e-5 * want + 1e-6).all(), float((got.double() - want).abs().max())
    return got


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("prefix", "T", "Hq", "Hkv", "D", "tree", "rows", "page"), [
    ([0], 1, 1, 1, 64, "chain", None, None), ([37], 1, 8, 1, 128, "chain", None, None), ([63, 65], 33, 6, 2, 96, "bushy", [33, 0], None),
    ([130, 0, 7, 64, 90], 5, 4, 2, 64, "random", [5, 1, 4, 5, 2], 16), ([100], 9, 7, 1, 256, "bushy", None, 64),
    ([20, 300], 70, 2, 1, 64, "chain", None, 1),
], ids=str)  # fmt: skip
def test_against_reference(place, dtype, prefix, T, Hq, Hkv, D, tree, rows, page):
    case = attention_case(prefix, T, Hq, Hkv, D, dtype=dtype, tree=tree, tail_rows=rows, page=page, seed=T + D)
    check(place, case)
    check(place, case, window=20, sink=3)
    check(place, case, window=300, scale=0.05)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_aligned_rows_give_the_same_bits(place, D):
    case = attention_case([70, 9], 9, 4, 2, D, dtype=BF16, tree="bushy", seed=D)
    want = check(place, case)
    case.k, case.q = case.k.contiguous(), case.q.contiguous()
    assert torch.equal(check(place, case), want)


def test_pages_that_do_not_exist_are_not_read(place):
    """No check on a device could have refused them: their slots get nothing."""
    case = attention_case([40], 3, 2, 1, 64, dtype=BF16, page=16, seed=4)
    lse = torch.ones(1, 3, 2)
    want = check(place, case)
    table = case.page_table.clone()
    table[0, 1], out = 99, torch.full((1, 1, 48), torch.nan, device=place.device)
    data = [t.to(place.device) for t in (case.q, case.k, lse, case.prefix_len + 1000)]
    with place.running():
        _cuda.attention_colsum((out,), *data, None, table.to(place.device), 0.125, 0, 0, None)
    assert want.shape == out.shape and not out[..., 16:32].any() and out[..., :16].gt(0).all()
