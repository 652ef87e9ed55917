"""linear: against the reference in double, and every row against itself alone, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import ops, reference
from ramify.testing.tensors import levels, padded, poisoned, running, runs, threads

F32, BF16 = torch.float32, torch.bfloat16


def make(M, N, K, dtype, weight_dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(weight_dtype)
    return padded(x), padded(weight), torch.randn(N, generator=g).to(weight_dtype), padded(torch.randn(M, N, generator=g).to(dtype))


def check(x, weight, bias, activation, residual, dot=False):
    out = ops.linear(x, weight, bias, activation=activation, residual=residual, out=padded(poisoned((*x.shape[:-1], len(weight)), x.dtype)))
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    want = reference.linear(wide[0], wide[1], wide[2], activation=activation, residual=wide[3])
    # A chain of K f32 additions wanders sqrt(K) half-ulps of its terms, four times over to be safe; then one rounding of the
    # result. A level that multiplies in bf16 also rounds x: up to 2^-8 of each term, which add up like a random walk as well.
    K, terms = x.shape[-1], (wide[0].abs() @ wide[1].abs().T) / max(1, x.shape[-1]) ** 0.5
    rounding = 2**-8 if x.dtype == BF16 else 2**-21
    limit = 4 * (2**-24 * K**0.5 + (2**-8 if dot else 0)) * terms + rounding * (want.abs() + 1)
    worst = ((out.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.numel() == 0 or worst.max() <= 1, f"row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"


@pytest.mark.parametrize(("backend", "level"), runs("linear", weight=F32))
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (2, 31, 33), (5, 96, 65), (17, 200, 700), (70, 33, 1030)])
@pytest.mark.parametrize("epilogue", ["plain", "bias", "all"])
def test_against_reference(backend, level, dtype, weight_dtype, M, N, K, epilogue):
    x, weight, bias, residual = make(M, N, K, dtype, weight_dtype, seed=M)
    with running(backend, level):
        check(
            x, weight, None if epilogue == "plain" else bias, "silu" if epilogue == "all" else None,
            residual if epilogue == "all" else None, dot=level == "avx512_bf16" and weight_dtype == BF16,
        )  # fmt: skip


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(33, 65), (95, 513), (161, 1031)])
def test_row_is_its_own(level, dtype, N, K):
    """Row r of an M-row call has the bits of the call on row r alone, for every M in 1..70, on one thread and on two."""
    x, weight, bias, residual = make(70, N, K, dtype, dtype, seed=N)
    with running("cpu", level):
        with threads(1):
            alone = torch.cat([ops.linear(x[r : r + 1], weight, bias, activation="silu", residual=residual[r : r + 1]) for r in range(70)])
        for M in range(1, 71):
            with threads(1 + M % 2):
                got = ops.linear(x[:M], weight, bias, activation="silu", residual=residual[:M])
            assert torch.equal(got, alone[:M]), f"M = {M}, rows {(got != alone[:M]).any(1).nonzero().flatten().tolist()}"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3), N=st.integers(1, 70), K=st.integers(1, 90),
    dtype=st.sampled_from([F32, BF16]), with_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(lead, N, K, dtype, with_bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(*lead, K, generator=g).to(dtype), torch.randn(N, K, generator=g)
    check(padded(x), weight, torch.randn(N, generator=g) if with_bias else None, None, None)


def test_says_what_it_does_not_take():
    x, weight, bias, residual = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.randn(3, 5)
    bad = [
        (ValueError, "weight is [5, 7]; takes [N, K] with K = 8, as in x", (x, weight[:, :7].contiguous()), {}),
        (ValueError, "bias is [4]; takes [N] with N = 5, as in weight", (x, weight, bias[:4]), {}),
        (ValueError, 'activation is "gelu"; takes None or "silu"', (x, weight), {"activation": "gelu"}),
        (ValueError, "residual is [1, 5]; takes [3, 5]", (x, weight), {"residual": residual[:1]}),
        (ValueError, "last axis of weight has stride 5; takes 1. Use weight.contiguous()", (x, torch.randn(8, 5).T), {}),
        (TypeError, "x is int64; takes float32 or bfloat16", (x.long(), weight), {}),
        (TypeError, "weight is None; takes a tensor", (x, None), {}),
        (TypeError, "out is bfloat16; takes float32", (x, weight), {"out": residual.bfloat16()}),
        (ValueError, "out is [3, 4]; takes [3, 5]", (x, weight), {"out": residual[:, :4]}),
        (ValueError, "x is [3, 0]; takes [..., K] with K of 1 or more", (x[:, :0], weight[:, :0]), {}),
        (ValueError, "weight is on meta and x on cpu", (x, weight.to("meta")), {}),
    ]
    for kind, said, args, kwargs in bad:
        with pytest.raises(kind) as error:
            ops.linear(*args, **kwargs)
        assert said in str(error.value) and str(error.value).startswith("linear: "), str(error.value)
