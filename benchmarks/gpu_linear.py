"""Linear layers in the GPU's speed stage: low-bit weights of ours against cuBLAS in bf16 and tinygemm, 1 to 64 rows."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Provider
from ramify import ops
from ramify.ops import _cuda_linear
from ramify.quant import Format, QuantizedWeight

ROWS = (1, 4, 8, 16, 32, 64)
CELLS = (
    *(("int4-g128", N, K, M) for N, K in ((14336, 4096), (4096, 4096), (8192, 8192)) for M in ROWS),
    *((form, 14336, 4096, M) for form in ("int4-g64", "int8") for M in (1, 8, 32, 64)),
)
"""Format, N, K and rows."""

TINY = (("int4-g64", 64, 128, 2), ("int8", 64, 128, 2))
LIMIT = 0.02
"""Largest error: one rounding to bf16, and where a peer rounds weights too, theirs."""


def layer(device: str, name: str, N: int, K: int, M: int, seed: int) -> Case:
    """x, the low-bit weight and the same weight in bf16: scales have few bits, so that every peer holds the same numbers but for that."""
    g, form = torch.Generator(device).manual_seed(seed), Format.parse(name)
    if form.kind == "int4":
        codes = torch.randint(0, 256, (N, K // 2), generator=g, device=device, dtype=torch.uint8)
    else:
        codes = torch.randint(-127, 128, (N, K), generator=g, device=device, dtype=torch.int8)
    shape = form.scale_shape(N, K)
    scale = (0.5 + torch.rand(shape, generator=g, device=device)).div(form.bits * K**0.5).bfloat16()
    weight = QuantizedWeight(form, codes, scale.to(torch.float16 if form.kind == "int4" else torch.float32))
    x = torch.randn(M, K, generator=g, device=device).bfloat16()
    want = lambda: (x.double() @ weight.dequantize().double().T,)  # noqa: E731
    return Case((x, weight), weight.nbytes + 2 * M * (K + N), 2 * M * N * K, "bf16", want, LIMIT)


def ours(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What every backend of ours runs: x is not rounded."""
    return ops.linear(x, weight, activations="exact")


def dense(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Arguments of F.linear."""
    return x, weight.dequantize().bfloat16()


def tinygemm(x: Tensor, weight: QuantizedWeight) -> tuple[Any, ...]:
    """Arguments of torch's int4 product: its own packing, the even input in the high bits, scales and zeros in bf16."""
    swapped = weight.codes << 4 | weight.codes >> 4
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scale = weight.scale.bfloat16().T
    return x, packed, weight.format.group, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()


@contextmanager
def _variant(name: str) -> Any:
    before, _cuda_linear.VARIANT = _cuda_linear.VARIANT, name
    try:
        yield
    finally:
        _cuda_linear.VARIANT = before


def _forced(name: str) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: QuantizedWeight) -> Tensor:
        with _variant(name):
            return ours(x, weight)

    return call


def _no_wgmma() -> str:
    return "" if torch.cuda.get_device_capability()[0] == 9 else "wgmma needs sm_90a"


def ways(device: str) -> list[Provider]:
    """Peers on this device, and on a GPU our two kernels where they meet: which one should serve how many rows."""
    found = [Provider("torch bf16", F.linear, baseline=True, prepare=dense)]
    if device == "cpu":
        return found
    return [
        *found,
        Provider(
            "torch tinygemm int4", torch.ops.aten._weight_int4pack_mm, baseline=True, prepare=tinygemm,
            only=lambda cell: cell["bits"] == 4,
        ),
        Provider("ramify cuda, mma", _forced("few rows"), backend="cuda", only=lambda cell: cell["M"] > 32),
        Provider("ramify cuda, wgmma", _forced("many rows"), backend="cuda", only=lambda cell: 8 <= cell["M"] <= 32, needs=_no_wgmma),
    ]  # fmt: skip
