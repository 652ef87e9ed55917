"""rope_append: rotated queries out, keys and values in exact slots, every other byte as it was."""

import pytest
import torch

from ramify import ops, reference
from ramify.testing.tensors import levels, padded, poisoned, running, runs, threads

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
ROUNDING = {F32: 2.0**-21, BF16: 2.0**-8, F16: 2.0**-10}  # two roundings of a result


def make(M, Hq, Hkv, D, half, S, dtype, cache, norm, seed=0):
    """Arguments and options; every third row is padding, and the caches are NaN."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.rand(40, half, generator=g) * 6
    slots = torch.randperm(S, generator=g)[:M].int()
    slots[2::3] = -1
    norms = [torch.randn(D, generator=g).to(dtype) if norm else None for _ in "qk"]
    tensors = (
        padded(torch.randn(M, (Hq + 2 * Hkv) * D, generator=g).to(dtype)), padded(angle.cos()), padded(angle.sin(), 2),
        torch.randint(0, 40, (M,), generator=g), padded(slots), *(padded(poisoned((S, Hkv, D), cache)) for _ in "kv"),
    )  # fmt: skip
    return tensors, {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-5}


def check(tensors, options):
    *given, k, v = tensors
    q = ops.rope_append(*given, k, v, **options)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    want = reference.rope_append(*exact, **{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()})
    assert q.dtype == given[0].dtype
    for got, right in ((q, want), (k, exact[5])):
        limit = ROUNDING[got.dtype] * right.abs().clamp(min=1) + 2e-6
        assert torch.equal(got.isnan(), right.isnan())
        assert ((got.double() - right).abs().nan_to_num(0) <= limit.nan_to_num(0)).all()
    assert torch.equal(v.isnan(), exact[6].isnan()) and torch.equal(v.nan_to_num(9), exact[6].to(v.dtype).nan_to_num(9))
    used = given[4][given[4] >= 0].long()
    assert int(k[:, 0, 0].isfinite().sum()) == len(used) and k[used].isfinite().all()


@pytest.mark.parametrize(("backend", "level"), runs("rope_append"))
@pytest.mark.parametrize(("dtype", "cache"), [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize(
    ("M", "Hq", "Hkv", "D", "half"),
    [(1, 1, 1, 64, 32), (5, 4, 2, 96, 48), (2, 7, 1, 8, 4), (7, 3, 3, 80, 16), (4, 5, 2, 64, 32), (3, 2, 5, 16, 8)],
)
def test_against_reference(backend, level, dtype, cache, M, Hq, Hkv, D, half):
    if backend == "cpu" and (dtype == F16 or 2 * half < D):
        pytest.skip("no CPU kernel")
    for norm in (False, True):
        with running(backend, level):
            check(*make(M, Hq, Hkv, D, half, 20, dtype, cache, norm, seed=D))


@pytest.mark.parametrize("level", levels())
def test_a_row_is_its_own(level):
    """The same bits as rms_norm and rope one after the other give, and as the row alone; whatever the threads."""
    (qkv, cos, sin, at, slots, k, v), options = make(7, 4, 2, 64, 32, 20, F32, F32, True)
    q_norm, k_norm = options["q_norm"], options["k_norm"]
    with running("cpu", level):
        q = ops.rope_append(qkv, cos, sin, at, slots, k, v, **options)
        rows = qkv.reshape(7, 8, 64)
        assert torch.equal(q, ops.rope(ops.rms_norm(rows[:, :4], q_norm, eps=1e-5), cos, sin, at))
        keys = ops.rope(ops.rms_norm(rows[:, 4:6], k_norm, eps=1e-5), cos, sin, at)
        stored = slots >= 0
        assert torch.equal(k[slots[stored].long()], keys[stored])
        with threads(2):
            alone = ops.rope_append(qkv[3:4], cos, sin, at[3:4], slots[3:4], k.clone(), v.clone(), **options)
    assert torch.equal(alone[0], q[3])


def test_rows_that_lie_in_the_cache_are_read_before_they_are_written():
    store, angle, one = torch.randn(6, 1, 4), torch.rand(3, 2), torch.ones(1, dtype=I32)
    rows, apart, other = store[1:5].view(1, 16), store.clone(), torch.zeros(6, 1, 4)
    want = ops.rope_append(rows.clone(), angle, angle, one, one * 2, apart, torch.zeros(6, 1, 4))
    assert torch.equal(ops.rope_append(rows, angle, angle, one, one * 2, store, other), want)
    assert torch.equal(store, apart) and torch.equal(other[2], apart[4])


def test_a_gradient_is_refused():
    angle, at = torch.rand(3, 2), torch.zeros(1, dtype=I32)
    q = ops.rope_append(torch.randn(1, 16, requires_grad=True), angle, angle, at, at, *torch.zeros(2, 6, 1, 4))
    with pytest.raises(NotImplementedError, match="^rope_append: backward is not built"):
        q.sum().backward()


def test_says_what_it_does_not_take():
    good, _ = make(3, 2, 1, 8, 4, 6, F32, F32, False)
    norm = torch.ones(8)
    bad = [
        ({0: good[0][:, :24]}, {}, None, ""),  # one query head: fine
        ({0: good[0][:, :16]}, {}, ValueError, "qkv is [3, 16] and k_cache [6, 1, 8]; takes [M, (Hq + 2) * 8] with Hq of 1 or more"),
        ({0: good[0][:, :30]}, {}, ValueError, "qkv is [3, 30]"),
        ({0: good[0][:2]}, {}, ValueError, "positions is [3]; takes [M] with M = 2, as in qkv"),
        ({1: good[1][:, :3]}, {}, ValueError, "sin is [40, 4]; takes [P, R/2] with R/2 = 3, as in cos"),
        ({1: torch.ones(9, 5), 2: torch.ones(9, 5)}, {}, ValueError, "cos has 5 columns; takes at most D/2 = 4"),
        ({1: good[1].double()}, {}, TypeError, "cos is float64; takes float32"),
        ({3: good[3] + 40}, {}, ValueError, "positions holds"),
        ({4: good[4].long()}, {}, TypeError, "slots is int64; takes int32 [M]. Use slots.int()"),
        ({4: good[4] + 6}, {}, ValueError, "slots holds"),
        ({4: torch.tensor([0, -2, 1]).int()}, {}, ValueError, "slots holds -2; takes 0 to 5, the slots of k_cache, or -1 for none"),
        ({4: torch.tensor([3, -1, 3]).int()}, {}, ValueError, "slots holds 3 twice; takes a slot of its own for every row, or -1 for none"),
        ({4: torch.tensor([-1, -1, -1]).int()}, {}, None, ""),
        ({6: good[6].bfloat16()}, {}, TypeError, "v_cache is bfloat16; takes float32"),
        ({6: good[5]}, {}, ValueError, "v_cache shares memory with k_cache"),
        ({}, {"q_norm": norm[:4]}, ValueError, "q_norm is [4]; takes [D] with D = 8"),
        ({}, {"q_norm": norm, "k_norm": norm.bfloat16()}, TypeError, "k_norm is bfloat16; takes float32, as q_norm is"),
        ({}, {"eps": -1}, ValueError, "eps is -1.0; takes a finite number of 0 or more"),
        ({}, {"eps": "a"}, TypeError, 'eps is "a"'),
        ({0: None}, {}, TypeError, "qkv is None; takes a tensor"),
    ]
    for changed, options, kind, said in bad:
        tensors = [changed.get(i, x) for i, x in enumerate(good)]
        if kind is None:
            ops.rope_append(*tensors, **options)
            continue
        good[5].fill_(torch.nan)
        with pytest.raises(kind) as error:
            ops.rope_append(*tensors, **options)
        assert said in str(error.value) and str(error.value).startswith("rope_append: "), str(error.value)
        assert good[5].isnan().all()  # a refused call has written nothing
