"""compressed-tensors files (llm-compressor, vLLM): int4 and int8 packed, int8 and fp8 plain.

pack-quantized: `weight_packed` int32 [N, K * bits / 32] of code + 2^(bits-1), lowest first; `weight_zero_point` packed likewise along
N; `weight_shape` int64 [2]; `weight_g_idx` int32 [K] under act-order. int-, float- and naive-quantized: `weight` itself in int8 or
e4m3. `weight_scale` is [N, groups], [N, 1], [1] or [N / 128, K / 128]. Activations are not quantised here, whatever the scheme says.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ramify.quant.formats import BLOCK, Format
from ramify.quant.sources.base import Names, Parts, Source, count_groups, group_order, group_size, int4, int8, named, nibbles, refuse
from ramify.quant.weight import QuantizedWeight, pack_nibbles

PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class CompressedTensors(Source):
    """quant_method "compressed-tensors"."""

    needed = ("weight", "weight_scale")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.dense = named(config.get("ignore"))
        sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
        if sparsity != "dense":
            raise refuse("sparsity_config", sparsity, "dense weights")
        if (config.get("transform_config") or {}).get("config_groups"):
            raise refuse("transform_config", "with transforms", "none")
        self.schemes = [
            _Scheme(group, config.get("format")) for group in (config.get("config_groups") or {}).values() if group.get("weights")
        ]

    def covers(self, module: str) -> bool:
        """Every linear layer that a scheme targets and the config does not ignore; names, class names and "re:" patterns."""
        return self._scheme(module) is not None and not any(_matches(module, ignored) for ignored in self.dense)

    def tensors(self, prefix: str) -> Names:
        """By the layer's scheme."""
        scheme = self._scheme(prefix)
        packed = scheme is not None and scheme.packed
        needed = ("weight_packed", "weight_scale") if packed else self.needed
        optional = ("weight_zero_point", "weight_g_idx", *(("weight_shape",) if packed else ()), *UNUSED)
        return Names(tuple(f"{prefix}.{name}" for name in needed), tuple(f"{prefix}.{name}" for name in optional))

    def _scheme(self, module: str) -> "_Scheme | None":
        """Names win over patterns, patterns over classes."""
        for kind in (lambda t: not t.startswith("re:") and t != "Linear", lambda t: t.startswith("re:"), lambda t: t == "Linear"):
            for scheme in self.schemes:
                if any(_matches(module, target) for target in scheme.targets if kind(target)):
                    return scheme
        return None

    def _read(self, parts: Parts) -> QuantizedWeight:
        scheme = self._scheme(parts.prefix)
        if scheme is None:
            raise parts.beyond("has no scheme in quantization_config; takes one")
        codes = scheme.codes(parts)
        N, K = parts.sized(*codes.shape)
        if codes.dtype == torch.float8_e4m3fn:
            return scheme.fp8(parts, codes)
        scale = scheme.scale(parts, N, K)
        zero = scheme.zero(parts, N, scale.shape[1])
        if scheme.bits == 8:
            return int8(parts, codes, scale, zero)
        g_idx, perm = parts.look("weight_g_idx", (torch.int32, torch.int64), K), None
        if g_idx is not None and not bool((g_idx < 0).all()):  # -1 throughout: made and never set
            perm = group_order(parts, "weight_g_idx", g_idx, scale.shape[1])
            codes = codes if perm is None else codes[:, perm.long()]
        return int4(parts, pack_nibbles(codes + 8), scale, None if zero is None else zero.to(torch.int16) + 8, perm)


class _Scheme:
    """One entry of config_groups."""

    def __init__(self, group: Mapping[str, Any], layout: str | None) -> None:
        weights = group["weights"]
        self.targets = [str(target) for target in group.get("targets") or ()]
        self.layout = group.get("format") or layout
        self.packed = self.layout == PACKED
        self.bits, self.kind = weights.get("num_bits", 8), weights.get("type", "int")
        self.symmetric = weights.get("symmetric", True)
        self.strategy = weights.get("strategy") or ("channel" if group_size(weights.get("group_size")) is None else "group")
        self.group, block = group_size(weights.get("group_size")), weights.get("block_structure")
        if self.layout not in (PACKED, *PLAIN):
            raise refuse("format", self.layout, ", ".join((PACKED, *PLAIN)))
        if (self.kind, self.bits) not in (("int", 4), ("int", 8), ("float", 8)) or (self.packed and self.kind == "float"):
            raise refuse("num_bits and type", f"{self.bits} {self.kind} as {self.layout}", "4 or 8 int, or 8 float unpacked")
        if self.strategy not in ("group", "channel", "tensor", "block") or (self.strategy == "block" and self.kind == "int"):
            raise refuse("strategy", f"{self.strategy} for {self.kind}", "group, channel or tensor, or block for float")
        if self.strategy == "block" and list(block or ()) != [BLOCK, BLOCK]:
            raise refuse("block_structure", block, f"[{BLOCK}, {BLOCK}]")

    def codes(self, parts: Parts) -> Tensor:
        """Signed codes int8, or e4m3, [N, K]."""
        if not self.packed:
            return parts.take("weight", (torch.float8_e4m3fn if self.kind == "float" else torch.int8,), None, None)
        words = parts.take("weight_packed", (torch.int32,), None, None)
        codes = (nibbles(words) - 8 if self.bits == 4 else words.view(torch.uint8) ^ 128).view(torch.int8)
        shape = parts.look("weight_shape", (torch.int64, torch.int32), 2)
        if shape is None:
            return codes
        N, K = shape.tolist()
        if N != len(words) or not 0 <= codes.shape[1] - K < 32 // self.bits:
            raise parts.wrong("weight_packed", f"is {list(words.shape)}; its weight_shape is [{N}, {K}]")
        return codes[:, :K]

    def scale(self, parts: Parts, N: int, K: int) -> Tensor:
        """Scales [N or 1, groups]."""
        if self.strategy == "tensor":
            scale = parts.scale("weight_scale")
            if scale.numel() != 1:
                raise parts.wrong("weight_scale", f"is {list(scale.shape)}; takes one number")
            return scale.reshape(1, 1)
        return parts.scale("weight_scale", N, count_groups(parts, K, None if self.strategy == "channel" else self.group))

    def zero(self, parts: Parts, N: int, groups: int) -> Tensor | None:
        """Signed zeros [N or 1, groups]; None where the scheme is symmetric."""
        if self.symmetric:
            return None
        if not self.packed or self.strategy == "tensor":
            zero = parts.take("weight_zero_point", (torch.int8, torch.int32, torch.int64))
            if tuple(zero.shape) != (N, groups) and zero.numel() != 1:
                raise parts.wrong("weight_zero_point", f"is {list(zero.shape)}; takes [{N}, {groups}]")
            return zero.reshape(-1, groups)
        words = parts.take("weight_zero_point", (torch.int32,), -(-N * self.bits // 32), groups).T.contiguous()
        unpacked = nibbles(words) - 8 if self.bits == 4 else words.view(torch.uint8) ^ 128
        return unpacked.view(torch.int8)[:, :N].T

    def fp8(self, parts: Parts, codes: Tensor) -> QuantizedWeight:
        """e4m3 codes with a scale for a row, for all, or for blocks of 128 x 128."""
        N, K = codes.shape
        if self.strategy == "block":
            form = Format("fp8", BLOCK)
            return QuantizedWeight(form, codes, parts.scale("weight_scale", *form.scale_shape(N, K)))
        scale = self.scale(parts, N, K)
        if scale.shape[1] != 1:
            raise parts.beyond(f"has {scale.shape[1]} fp8 scales a row; takes one, or blocks of {BLOCK}")
        return QuantizedWeight(Format("fp8"), codes, scale.expand(N, 1).contiguous())


def _matches(module: str, target: str) -> bool:
    """As compressed-tensors matches: a whole name, a "re:" pattern from the start of the name, or the class that all of these have."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Linear")
