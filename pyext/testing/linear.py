"""Low-bit weights and inputs that catch a careless linear layer, and how far from the reference a right one may be."""

import torch
from torch import Tensor

from ramify import reference
from ramify.quant import Format, QuantizedWeight
from ramify.quant.weight import pack_nibbles
from ramify.testing.tensors import padded

ULP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What one rounding of a result may cost, with a little room in float32."""


def low_bit_weight(
    name: str, N: int, K: int, scale_dtype: torch.dtype = torch.float16, perm: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Random codes of every value, `seed` bytes of gap behind each row, fractional zeros; for int4, K is cut to whole groups."""
    g, form = torch.Generator().manual_seed(seed), Format.parse(name)
    if form.kind == "int4":
        K = max(form.group, K // form.group * form.group)
        codes = pack_nibbles(torch.randint(0, 16, (N, K), generator=g))
    elif form.kind == "int8":
        codes = torch.randint(-128, 128, (N, K), generator=g, dtype=torch.int8)
    else:
        codes = torch.randn(N, K, generator=g).to(torch.float8_e4m3fn)
    wide = torch.full((N, codes.shape[1] + seed), 0x55, dtype=torch.uint8).view(codes.dtype)
    wide[:, : codes.shape[1]] = codes
    groups = form.scale_shape(N, K)
    scale = (torch.rand(groups, generator=g) + 0.1).mul(0.01).to(scale_dtype)
    zero = (torch.rand(groups, generator=g) * 20 - 2).half() if form.zero_point else None
    order = torch.randperm(K, generator=g).int() if perm else None
    return QuantizedWeight(form, wide[:, : codes.shape[1]], scale, zero, order)


def linear_inputs(M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] of very different rows, bias [N] in float32 and residual [M, N] in float16, with gaps of NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g) * torch.rand(M, 1, generator=g).exp()
    return padded(x.to(dtype)), torch.randn(N, generator=g), padded(torch.randn(M, N, generator=g).to(torch.float16))


def every_code() -> list[QuantizedWeight]:
    """Weights of 64 or 128 outputs that hold each code of each kind, with a scale of 1: a unit matrix as x reads their values back."""
    codes = torch.arange(256).to(torch.uint8).view(2, 128).T.contiguous()
    nibbles = pack_nibbles(torch.arange(16).repeat(64, 2))
    zero = torch.tensor([[3.0], [15.0]] * 32).half()
    return [
        QuantizedWeight(Format.parse("int8"), codes.view(torch.int8), torch.ones(128, 1)),
        QuantizedWeight(Format.parse("fp8"), codes.view(torch.float8_e4m3fn), torch.ones(128, 1)),
        QuantizedWeight(Format.parse("fp8-b128"), codes.view(torch.float8_e4m3fn), torch.ones(1, 1)),
        QuantizedWeight(Format.parse("int4-g32"), nibbles, torch.ones(64, 1)),
        QuantizedWeight(Format.parse("int4-g32-zp"), nibbles, torch.ones(64, 1), zero),
    ]


def exact_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, activation: str | None = None, residual: Tensor | None = None,
    rounds_zeros: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer's result by the reference in double, and how far from each value a right result in x's dtype may be.

    The limit is four half-ulps of float32 of the sum of magnitudes, a zero point counted as a term of its own, because a chain of K
    additions wanders like a random walk; and one rounding of the result. rounds_zeros: what a zero point leaves is rounded to 16 bits,
    which costs up to 2^-9 (bf16) of each term: six sigmas of their sum.
    """
    rows, own_zero = x.double(), None if isinstance(weight, Tensor) else weight.zero
    exact = weight.double() if isinstance(weight, Tensor) else weight.dequantize().double()
    apart = exact.abs()
    if isinstance(weight, QuantizedWeight) and own_zero is not None:
        apart = QuantizedWeight(weight.format, weight.codes, weight.scale, -own_zero.abs(), weight.perm).dequantize().double().abs()
    bias, residual = (None if t is None else t.double() for t in (bias, residual))
    want = reference.linear(rows, exact, bias, activation=activation, residual=residual)
    limit = 4 * 2**-24 * rows.abs() @ apart.T + ULP[x.dtype] * (want.abs() + 1)
    if own_zero is not None and rounds_zeros and x.dtype != torch.float32:
        limit += 3 * ULP[x.dtype] * (rows.square() @ exact.square().T).sqrt()
    return want, limit


def assert_linear(
    got: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, activation: str | None = None,
    residual: Tensor | None = None, rounds_zeros: bool = False,
) -> None:  # fmt: skip
    """`got` is the layer's result in x's dtype, each value within its own limit of the reference in double: those of exact_linear."""
    want, limit = exact_linear(x, weight, bias, activation, residual, rounds_zeros)
    worst = ((got.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"{(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"
