"""Tests of ops that run on a GPU with CPU tensors: the CPU plays the GPU here, and every byte that a kernel must not touch is watched."""

import pytest
import torch

from ramify import backends, ops
from ramify.testing import tensors
from ramify.testing.on_device import BAND, OnDevice
from ramify.testing.tensors import attention_case, padded, poisoned, running

BF16, I32 = torch.bfloat16, torch.int32
library = torch.library.Library("on_device_test", "DEF")
seen = []


def define(name, arguments, function):
    library.define(f"{name}({arguments}) -> ()")

    def run(*args):
        function(*args)

    library.impl(name, run, "CPU")
    return getattr(torch.ops.on_device_test, name)


def look(x, y):
    seen.append((x, y))


def beyond(x, step):
    """The element `step` behind the last one of x, or before the first, wherever that is."""
    at = x.storage_offset() + (x.numel() + step - 1 if step > 0 else step)
    return torch.as_strided(x, (1,), (1,), at)


look_at = define("look", "Tensor(a!) x, Tensor y", look)
into_gap = define("gap", "Tensor(a!) x", lambda x: beyond(x, 1).fill_(5))
into_input = define("input", "Tensor x, Tensor(a!) y", lambda x, y: x.view(-1)[:1].fill_(5))
behind = define("behind", "Tensor(a!) x, int step", lambda x, step: beyond(x, step).fill_(5))
read_behind = define("read", "Tensor x, Tensor(a!) y", lambda x, y: y.copy_(beyond(x, 1)))


def same(call):
    """The bits of a call here and there."""
    here = call()
    with OnDevice("cpu"):
        there = call()
    for a, b in zip(here, there):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and a.dtype == b.dtype
    return there


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_same_bits_and_the_same_gaps(dtype):
    """Functional and out forms, odd strides, pages, lengths as tensors, a cache that changes in place."""
    x, weight = padded(torch.randn(5, 33).to(dtype)), torch.randn(33)

    def norm():
        out = [padded(poisoned((5, 33), dtype)) for _ in "os"]
        got = ops.rms_norm(x, weight, x, out=tuple(out))
        assert got[0] is out[0] and got[1] is out[1]
        return *(torch.as_strided(o, (8, 36), (36, 1)) for o in out), ops.rms_norm(x, weight)  # with the gaps of each row

    whole = same(norm)
    assert whole[0][:5, :33].isfinite().all() and whole[0][:, 33:].isnan().all() and whole[0][5:].isnan().all()
    case = attention_case([40, 17], 6, 4, 2, 64, dtype=dtype, page=16, tail_rows=[6, 4], seed=3)
    same(lambda: ops.tree_attention(*case.tensors, **case.options, window=20, sink=1, return_lse=True))

    def commit():
        caches = [padded(torch.zeros(2, 9, 1, 4)) for _ in "kv"]
        tails, one = torch.randn(2, 2, 3, 1, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2, dtype=I32)
        ops.kv_commit(*tails, *caches, torch.tensor([[0, 2, 9], [1, 9, 9]]), one * 2 - torch.tensor([0, 1]).int(), one)
        return caches

    assert all(cache[0, 1:3].all() and not cache[0, 3:].any() for cache in same(commit))


def test_views_of_one_storage_stay_so_and_keep_their_place():
    seen.clear()
    whole, other = torch.arange(40.0), torch.arange(3.0)
    x, y = torch.as_strided(whole, (2, 3), (7, 2), 5), whole[20:]
    with OnDevice("cpu", "on_device_test"):
        look_at(x, y)
        look_at(x, other)
    (a, b), (_, c) = seen
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert (b.data_ptr() - a.data_ptr(), a.stride(), a.tolist()) == (4 * 15, (7, 2), x.tolist())
    assert a.storage_offset() == 5 + BAND // 4 and c.tolist() == [0, 1, 2]


def test_a_write_between_the_elements_of_a_view_is_seen():
    whole = torch.zeros(10)
    with OnDevice("cpu", "on_device_test"):
        into_gap(whole[:4])
    assert whole.tolist() == [0] * 4 + [5] + [0] * 5


@pytest.mark.parametrize(("step", "where"), [(1, "behind"), (100, "behind"), (-1, "before")])
def test_a_write_beyond_the_storage_is_refused(step, where):
    with OnDevice("cpu", "on_device_test"), pytest.raises(AssertionError, match=f"on_device_test::behind wrote {where} the storage of x"):
        behind(torch.zeros(6), step)


def test_a_write_into_an_input_is_refused():
    with OnDevice("cpu", "on_device_test"):
        with pytest.raises(AssertionError, match="on_device_test::input wrote into x, which its schema does not mark"):
            into_input(torch.zeros(6), torch.zeros(2))
        both = torch.zeros(6)
        into_input(both, both[3:])  # one storage, and the schema marks a part of it
    assert both[0] == 5


def test_a_read_beyond_the_storage_is_nan():
    out = torch.zeros(1)
    with OnDevice("cpu", "on_device_test"):
        read_behind(torch.zeros(6), out)
    assert out.isnan()


def test_other_ops_stay_where_they_are():
    """Nothing but the namespace is caught: an op of ours that torch knows of, and those of torch itself, run on what they are given."""
    seen.clear()
    x = torch.randn(3, 8)
    with OnDevice("meta"):  # would lose every value
        assert torch.equal(x + x, 2 * x)
        look_at(x, x)
    assert seen[0][0].data_ptr() == x.data_ptr()


def test_tensors_that_lie_elsewhere_are_left_there():
    x = torch.empty(3, 8, device="meta")
    with OnDevice("cpu"):
        assert ops.silu_mul(x).shape == (3, 4) and ops.silu_mul(x).device.type == "meta"


def test_what_a_backend_does_not_take_is_skipped(monkeypatch):
    monkeypatch.setattr(tensors, "OnDevice", lambda device: OnDevice("cpu"))
    with pytest.raises(pytest.skip.Exception, match='backend "cuda" was forced and cannot run this call'), running("cuda"):
        ops.silu_mul(torch.randn(3, 8))
    assert backends.forced() is None
    with pytest.raises(ValueError, match="takes an even last axis"), running("cuda"):
        ops.silu_mul(torch.randn(3, 7))
