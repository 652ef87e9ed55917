"""rms_norm, rope, silu_mul and embed: against the reference in double, and every row against itself alone."""

import pytest
import torch

from ramify import ops, reference
from ramify.testing.tensors import levels, padded, poisoned, running, runs, threads

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def close(got, want, scale=None):
    """Element by element: 8 ulp of f32 at the size of the terms (`scale`, else the result), and one rounding to bf16."""
    scale = want.abs() if scale is None else scale
    limit = 2**-20 * (scale + 1e-3) + (2**-8 * want.abs() if got.dtype == BF16 else 0)
    worst = ((got.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.numel() == 0 or worst.max() <= 1, f"{(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"


def normal(*shape, dtype=F32, seed=0):
    return padded(torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype))


def angles(P, half):
    angle = torch.arange(P)[:, None] / 10000 ** (torch.arange(half) / half)
    return angle.cos(), angle.sin()


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("rms_norm"))
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (2, 3, 64), (1, 2048), (70, 33), (40,)], ids=str)
def test_rms_norm(backend, level, dtype, shape):
    x, residual, weight = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), normal(shape[-1], dtype=dtype, seed=2)
    with running(backend, level):
        close(
            ops.rms_norm(x, weight, eps=1e-5, out=padded(poisoned(shape, dtype))), reference.rms_norm(x.double(), weight.double(), eps=1e-5)
        )
        out = padded(poisoned(shape, dtype)), padded(poisoned(shape, dtype))
        normed, summed = ops.rms_norm(x, weight, residual, out=out)
    assert torch.equal(summed, x + residual)  # one addition, one rounding: nothing to be close about
    close(normed, reference.rms_norm(summed.double(), weight.double()))


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("rope"))
@pytest.mark.parametrize(
    ("lead", "H", "D", "R"), [((1,), 1, 2, 2), ((5,), 3, 64, 64), ((2, 7), 4, 96, 96), ((2, 3), 2, 128, 32), ((), 2, 8, 8)], ids=str
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rope(backend, level, dtype, lead, H, D, R, index):
    if level and R < D:
        pytest.skip("the kernel takes whole heads")
    x, (cos, sin) = normal(*lead, H, D, dtype=dtype), angles(50, R // 2)
    positions = torch.randint(0, 50, lead, generator=torch.Generator().manual_seed(D)).to(index)
    with running(backend, level):
        got = ops.rope(x, cos, sin, positions, out=padded(poisoned(x.shape, dtype)))
    pairs = x.double().abs()
    pairs[..., :R] = pairs[..., :R] + pairs[..., :R].roll(R // 2, -1)  # a result is a sum of two terms of either sign
    close(got, reference.rope(x.double(), cos.double(), sin.double(), positions), scale=pairs)


def test_rope_falls_back_on_part_of_a_head():
    x, (cos, sin) = normal(3, 2, 64), angles(10, 8)
    got = ops.rope(x, cos, sin, torch.tensor([0, 4, 9]))
    assert torch.equal(got[..., 16:], x[..., 16:]) and torch.equal(got[0], x[0]) and not torch.equal(got[1], x[1])


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("silu_mul"))
@pytest.mark.parametrize("shape", [(1, 2), (5, 130), (2, 3, 66), (33, 512), (34,)], ids=str)
def test_silu_mul(backend, level, dtype, shape):
    x = normal(*shape, dtype=dtype) * 6
    x[..., 0] = -200  # silu underflows to nothing, not to NaN
    with running(backend, level):
        got = ops.silu_mul(padded(x), out=padded(poisoned((*shape[:-1], shape[-1] // 2), dtype)))
    close(got, reference.silu_mul(x.double()))


@DTYPES
@pytest.mark.parametrize(("backend", "level"), runs("embed"))
@pytest.mark.parametrize("out_dtype", [None, F32], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lead", [(1,), (2, 5), (70,), ()], ids=str)
def test_embed(backend, level, dtype, out_dtype, index, lead):
    table = normal(37, 45, dtype=dtype)
    ids = torch.randint(0, 37, lead, generator=torch.Generator().manual_seed(7)).to(index)
    with running(backend, level):
        got = ops.embed(ids, table, dtype=out_dtype, out=padded(poisoned((*lead, 45), out_dtype or dtype)))
    assert got.dtype == (out_dtype or dtype) and torch.equal(got, table[ids.long()].to(got.dtype))


@DTYPES
@pytest.mark.parametrize("level", levels())
def test_rows_are_their_own(level, dtype):
    """Each op: row r among others has the bits of row r alone, on one thread and on two."""
    M, (cos, sin) = 37, angles(64, 32)
    x, weight, residual = normal(M, 192, dtype=dtype), normal(192, seed=1), normal(M, 192, dtype=dtype, seed=2)
    at = torch.arange(M)
    calls = {
        "rms_norm": lambda r: ops.rms_norm(x[r], weight),
        "rms_norm.residual": lambda r: torch.cat(ops.rms_norm(x[r], weight, residual[r]), dim=-1),
        "rope": lambda r: ops.rope(x[r].unflatten(-1, (3, 64)), cos, sin, at[r]),
        "silu_mul": lambda r: ops.silu_mul(x[r]),
    }
    with running("cpu", level):
        for name, call in calls.items():
            with threads(2):
                together = call(slice(0, M))
            with threads(1):
                for r in range(M):
                    assert torch.equal(call(slice(r, r + 1))[0], together[r]), f"{name}, row {r}"


def test_says_what_it_does_not_take():
    x, weight, (cos, sin) = torch.randn(3, 8), torch.randn(8), angles(10, 4)
    heads, at, table = x.view(3, 1, 8), torch.arange(3), torch.randn(6, 4)
    bad = [
        (ops.rms_norm, (x, weight[:7]), ValueError, "weight is [7]; takes [H] with H = 8, as in x"),
        (ops.rms_norm, (x, weight, x[:1]), ValueError, "residual is [1, 8]; takes [3, 8], the shape of x"),
        (ops.rms_norm, (x, weight, x.bfloat16()), TypeError, "residual is bfloat16; takes float32, as x is"),
        (ops.rms_norm, ([1.0], weight), TypeError, "x is [1.0]; takes a tensor"),
        (ops.rope, (heads, cos.double(), sin, at), TypeError, "cos is float64; takes float32"),
        (ops.rope, (heads, cos, sin[:, :3].contiguous(), at), ValueError, "sin is [10, 3]"),
        (ops.rope, (heads, cos, sin, at[:2]), ValueError, "positions is [2]; takes [3]"),
        (ops.rope, (heads, cos, sin, at + 8), ValueError, "positions holds 10; takes 0 to 9, the rows of cos"),
        (ops.rope, (heads, cos, sin, at - 1), ValueError, "positions holds -1"),
        (ops.rope, (heads, *angles(10, 5), at), ValueError, "cos has 5 columns; takes at most D/2 = 4"),
        (ops.silu_mul, (x[:, :7],), ValueError, "x is [3, 7]; takes an even last axis"),
        (ops.embed, (at + 4, table), ValueError, "ids holds 6; takes 0 to 5, the rows of table"),
        (ops.embed, (at.float(), table), TypeError, "ids is float32; takes int32 or int64"),
    ]
    for op, args, kind, said in bad:
        with pytest.raises(kind) as error:
            op(*args)
        assert said in str(error.value) and str(error.value).startswith(f"{op.__name__}: "), str(error.value)
