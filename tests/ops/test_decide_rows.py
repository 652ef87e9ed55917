"""What a recorded step decides by its logits, on every backend: bit for bit what row_stats, topk_logits and verify_sample say of them.

tests/gates/test_cuda_sample.py has the same in every schedule of the emulator.
"""

import pytest
import torch

from ramify import backends, ops
from ramify.ops import _bound as bound
from ramify.testing.tensors import padded, poisoned, running

F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32
GPU = ("cuda", "triton")


def decided(logits, k, draws, device):
    """The calls, and what they left in poisoned outputs: argmax, lse, top, values, ids, drawn; those that nobody wants are not there."""
    R = len(logits)
    stats = tuple(poisoned((R,), dtype).to(device) for dtype in (I32, F32, F32))
    largest = (poisoned((R, k), logits.dtype).to(device), poisoned((R, k), I32).to(device)) if k else ()
    drawn = (poisoned((R,), I32).to(device),) if draws else ()
    calls = bound.decide_rows(logits, stats, largest, (*draws, *drawn))
    for call in calls:
        call.run()
    return calls, (*stats, *largest, *drawn)


def wanted(logits, k, draws):
    """The same from the ops."""
    largest = ops.topk_logits(logits, k) if k else ()
    if not draws:
        return *ops.row_stats(logits), *largest
    ones = torch.ones(len(logits), 1, dtype=I32, device=logits.device)
    return *ops.row_stats(logits), *largest, ops.verify_sample(logits[:, None], ones, ones - 2, ones[:, 0], *draws)[2]


def rows(V, dtype, device):
    """Seven rows: of spread, of ties, masked in part and but for one, and three more; temperatures of 0, low and high."""
    x = padded(4 * torch.randn(7, V, generator=torch.Generator().manual_seed(V)).to(dtype), 5)
    x[1], x[2, ::3], x[3, 1:] = x[1].round(), -torch.inf, -torch.inf
    temperature = torch.tensor([0.7, 0.0, 1.0, 1.3, 0.0, 0.5, 1e-3])
    seed, index = torch.tensor([3, 1, -1, 2**62, 5, 6, 7]), torch.tensor([5, 2**31 + 7, 0, 1, 77, 3, 9])
    return x.to(device), tuple(t.to(device) for t in (temperature, seed, index))


@pytest.mark.parametrize("place", backends.params("verify_sample", dtype=F32))
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("k", "draws"), [(0, False), (5, False), (0, True), (32, True)])
@pytest.mark.parametrize("V", [33, 4096, 9001])
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_the_bits_of_the_ops(place, V, k, draws, dtype):
    logits, how = rows(V, dtype, place.device)
    if place.name in GPU:  # the others refuse to draw from what is no law
        logits[4, V // 2], logits[5, V - 1] = torch.nan, torch.inf
    with running(place.name):
        calls, got = decided(logits, k, how if draws else (), place.device)
        want = wanted(logits, k, how if draws else ())
    assert len(calls) == (1 if place.name in GPU else 1 + bool(k) + draws)  # a GPU reads its logits once
    assert {call.backend for call in calls} == {place.name} and len(got) == len(want)
    for made, right in zip(got, want):
        assert made.dtype == right.dtype and torch.equal(made.isnan(), right.isnan()) and torch.equal(made.nan_to_num(), right.nan_to_num())


def test_more_than_a_kernel_keeps_is_a_call_of_its_own():
    logits = torch.randn(2, 50)
    calls, got = decided(logits, 40, (), "cpu")
    assert [call.op for call in calls] == ["row_stats", "topk_logits"] and torch.equal(got[3], ops.topk_logits(logits, 40)[0])
