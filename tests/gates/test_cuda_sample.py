"""CUDA verify_sample and residual_sample: the decisions of the reference, number for number, in every schedule."""

import pytest
import torch

from ramify import backends, ops, reference
from ramify.ops import _bound as bound
from ramify.sampling.rng import SAMPLE, uniform
from ramify.testing.tensors import padded, poisoned, sample_case

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32


def check(place, given, q, mode):
    """The reference's path, count and bonus, written into poisoned outputs; returns the counts."""
    B, T = given[1].shape
    data, draft = [t.to(place.device) for t in given], q.to(place.device)

    def call():
        outs = padded(poisoned((B, T), I32)), padded(poisoned((B,), I32)), poisoned((B,), I32)
        return ops.verify_sample(*data, draft, mode=mode, out=tuple(t.to(place.device) for t in outs))

    got = place.everywhere(call)
    for made, want in zip(got, reference.verify_sample(*given, q, mode=mode)):
        assert torch.equal(made.cpu(), want)
    return got[1].tolist()


@pytest.mark.parametrize("mode", ["det", "iid", "wor"])
@pytest.mark.parametrize(("B", "T", "V", "dtype", "tree"), [
    (1, 1, 9, F32, "chain"), (5, 20, 41, F32, "random"), (3, 9, 30, F16, "star"), (2, 13, 2100, BF16, "bushy"),
    (1, 6, 9001, BF16, "random"),
], ids=str)  # fmt: skip
def test_decisions(place, mode, B, T, V, dtype, tree):
    lengths = []
    for seed in range(3):
        *given, q = sample_case(B, T, V, seed, dtype, mode, tree)
        lengths += check(place, given, padded(q), mode)
    assert T < 10 or len(set(lengths)) > 1  # the trees were neither always nor never accepted


@pytest.mark.parametrize("mode", ["iid", "wor"])
def test_rejections(place, mode):
    """Drafts that the target does not want: many rejections in a row, nothing left of p, nothing left of q."""
    *given, q = sample_case(5, 9, 40, 7, F32, mode, "star")
    q[0] = torch.eye(40)[given[1][0, 1].long()]  # all of the draft on one token
    q[1] = given[0][1].softmax(-1)  # p itself
    q[2] = 1.0 / 40
    q[4, :, 20:] = 0  # a truncated draft that is not normalised
    check(place, given, q, mode)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("R", "V", "k"), [(3, 9, 0), (2, 4097, 5), (5, 9001, 32)])
def test_a_step_decides_in_one_read(place, R, V, k, dtype):
    """The bits of row_stats, topk_logits and verify_sample, in one launch over the logits and one that looks at a tile of each row."""
    g = torch.Generator().manual_seed(V)
    logits = padded(4 * torch.randn(R, V, generator=g).to(dtype), 7).to(place.device)
    logits[0, ::5], logits[1, V // 2] = -torch.inf, torch.nan
    how = [
        t[:R].to(place.device) for t in (torch.tensor([0.7, 1.3, 0.0, 1.0, 1e-3]), torch.randint(9, (R,)), torch.arange(2**31, 2**31 + R))
    ]

    def decided():
        outs = [poisoned(shape, kind).to(place.device) for shape, kind in (((R,), I32), ((R,), F32), ((R,), F32), ((R,), I32))]
        largest = tuple(poisoned((R, k), kind).to(place.device) for kind in (dtype, I32)) if k else ()
        calls = bound.decide_rows(logits, tuple(outs[:3]), largest, (*how, outs[3]))
        assert [call.backend for call in calls] == ["cuda"]
        calls[0].run()
        return *outs, *largest

    def by_ops():
        ones = torch.ones(R, 1, dtype=I32, device=place.device)
        drawn = ops.verify_sample(logits[:, None], ones, ones - 2, ones[:, 0], *how)[2]
        return *ops.row_stats(logits), drawn, *(ops.topk_logits(logits, k) if k else ())

    for got, want in zip(place.everywhere(decided), place.everywhere(by_ops), strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def test_one_row_is_plain_sampling(place):
    """The token of a single row is what inverse CDF gives for the seed's own number: Philox on the device."""
    logits, *_ = sample_case(1, 1, 5000, seed=4)
    p = logits[0, 0].double().softmax(-1).cumsum(-1)
    seeds, at = torch.tensor([0, -3, 2**62, 5, 6, 7]), torch.tensor([0, 2**40, 17, 3, 3, 3])
    B = len(seeds)
    ids = torch.zeros(B, 1, dtype=I32)
    given = logits.expand(B, 1, 5000), ids, ids - 1, torch.ones(B, dtype=I32), torch.ones(B), seeds, at
    with place.running():
        _, count, bonus = ops.verify_sample(*(t.to(place.device) for t in given))
    want = [int((p <= uniform(int(seed) % 2**64, int(n), SAMPLE) * p[-1]).sum()) for seed, n in zip(seeds, at)]
    assert bonus.tolist() == want and count.tolist() == [1] * B


def test_rows_that_are_not_numbers(place):
    """NaN, infinite and fully masked rows decide as the reference does, and name a token that exists."""
    *given, q = sample_case(4, 3, 2100, mode="iid", tree="chain")
    for b, value in enumerate((torch.nan, torch.inf, -torch.inf, -torch.nan)):
        given[0][b, 0, 5] = value
    given[0][2] = -torch.inf
    check(place, given, q, "det")
    check(place, given, q, "iid")
    given[4][:] = 0
    check(place, given, q, "det")


def test_what_it_does_not_take(place):
    *given, q = sample_case(1, 257, 9, mode="iid")
    with place.running():
        why = backends.reasons("verify_sample", place.device, F32, {"T": 257, "V": 9})
        assert why["cuda"] == "T is 257, takes 1 to 256"
        assert backends.choose("verify_sample", place.device, F32, T=256, V=9) == "cuda"
        if place.device == "cpu":
            with pytest.raises(ValueError, match="temperature is"):
                ops.verify_sample(*(t[:, :9] if t.ndim > 1 else t for t in given[:3]), given[3] * 0 + 1, given[4] - 2, *given[5:])


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
@pytest.mark.parametrize("V", [1, 7, 2048, 6000])
def test_residual_sample(place, V, dtype):
    g, R = torch.Generator().manual_seed(V), 6
    p, q = ((2 * torch.randn(R, V, generator=g)).double().softmax(-1).to(dtype) for _ in "pq")
    q[1] = p[1]  # nothing is left: a draw from p
    p[2, V // 2 :], q[3] = (0 if V > 1 else 1), 0  # no draw from where p is 0; and all of p is left
    u = torch.tensor([0.0, 0.3, 1 - 2.0**-53, 0.999, 0.5, 0.7], dtype=torch.float64)
    data = [t.to(place.device) for t in (padded(p), padded(q), u)]
    ids = place.everywhere(lambda: ops.residual_sample(*data, out=padded(poisoned((R,), I32)).to(place.device)))
    assert torch.equal(ids.long().cpu(), reference.residual_sample(p.double(), q.double(), u))
