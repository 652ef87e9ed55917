"""Linear layers of torch: dense, int8 and int4, as its public and its aten operators have them."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layers import Held, Hold, Layer

Count = Callable[[int], int]


def dense(dtype: torch.dtype) -> Hold:
    """F.linear."""

    def hold(layer: Layer, count: Count) -> Held:
        w = layer.tensors[0].to(dtype)
        copies = [w.clone() for _ in range(count(w.nbytes))]
        return Held(w.nbytes, w.float(), lambda x: [(x.to(dtype), copy) for copy in copies])

    return hold


linear = F.linear


def dynamic(layer: Layer, count: Count) -> Held:
    """Int8 rows of weights; the inputs are rounded in the call, to 7 bits as torch.ao has it."""
    q = layer.quantized("int8")
    scale, zero = q.scale[:, 0].double(), torch.zeros(layer.N, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its quantised tensors, and has no other way to this kernel
        w = torch._make_per_channel_quantized_tensor(q.codes, scale, zero, 0)
    copies = [torch.ops.quantized.linear_prepack(w, None) for _ in range(count(q.nbytes))]
    return Held(q.nbytes, q.dequantize(), lambda x: [(x, copy) for copy in copies])


def linear_dynamic(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    return torch.ops.quantized.linear_dynamic(x, packed, True)


def int8(layer: Layer, count: Count) -> Held:
    """Int8 rows of weights, bf16 inputs."""
    q = layer.quantized("int8")
    scale = q.scale[:, 0].bfloat16()
    size = q.codes.nbytes + scale.nbytes
    copies = [(q.codes.clone(), scale) for _ in range(count(size))]
    return Held(size, q.codes.float() * scale.float()[:, None], lambda x: [(x.bfloat16(), *copy) for copy in copies])


def int8_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def int4(format: str) -> Hold:
    """Int4 groups of weights, bf16 inputs (tinygemm): scales and zeros in bf16."""

    def hold(layer: Layer, count: Count) -> Held:
        q = layer.quantized(format)
        codes = torch.stack([q.codes & 15, q.codes >> 4], -1).view(layer.N, layer.K).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = q.scale.bfloat16()
        both = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()  # [K / group, N, 2]
        size = packed.nbytes + both.nbytes
        copies = [(packed.clone(), both.clone()) for _ in range(count(size))]
        group = q.format.group
        weight = (codes - 8).float() * scale.float().repeat_interleave(group, 1)
        return Held(size, weight, lambda x: [(x.bfloat16(), code, group, scales) for code, scales in copies])

    return hold


def int4_mm(x: Tensor, codes: Tensor, group: int, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)
