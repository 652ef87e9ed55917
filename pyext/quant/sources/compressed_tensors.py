"""compressed-tensors files (llm-compressor, vLLM): int4 and int8 packed, int8 and fp8 plain.

pack-quantized: `weight_packed` int32 [N, K * bits / 32] of code + 2^(bits-1), lowest first; `weight_zero_point` packed likewise along
N; `weight_shape` int64 [2]; `weight_g_idx` int32 [K] under act-order. int-, float- and naive-quantized: `weight` itself in int8 or
e4m3. `weight_scale` is [N, groups], [N, 1], [1] or [N / 128, K / 128]. Activations are not quantised here, whatever the scheme says.
"""

import re

import torch
from torch import Tensor

from ramify.checks import show
from ramify.fields import Fields
from ramify.quant.formats import BLOCK, Format
from ramify.quant.sources.base import Names, Parts, Source, choice, count_groups, group_order, group_size, int4, int8, nibbles, refuse
from ramify.quant.weight import QuantizedWeight, pack_nibbles

PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}
"""actorder -> whether the groups follow it, so that a layer has a weight_g_idx."""
ZEROS = (torch.int8, torch.int32, torch.int64)
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class CompressedTensors(Source):
    """quant_method "compressed-tensors"."""

    needed = ("weight", "weight_scale")

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        self.dense = _targets(config, "ignore")
        choice(config.object("sparsity_config"), "format", ("dense",), "dense")
        if (transforms := config.object("transform_config")).object("config_groups").values:
            raise refuse(transforms, "config_groups", "none: no transforms")
        groups = config.object("config_groups")
        schemes = [groups.object(name) for name in groups.values]
        self.schemes = [_Scheme(each, config) for each in schemes if each.object("weights").values]
        if not self.schemes and config.get("format") != "dense" and not config.object("kv_cache_scheme").values:
            if schemes:
                raise schemes[0].wrong("weights", 'an object with "num_bits", "type" and "strategy" in one group at least')
            raise config.wrong("config_groups", 'an object of groups, each with "targets" and "weights"')

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
        if g_idx is None and scheme.act_order and scale.shape[1] > 1:
            raise parts.wrong("weight_g_idx", "is missing; actorder says that it names the group of each input")
        if g_idx is not None and not bool((g_idx < 0).all()):  # -1 throughout: made and never set
            perm = group_order(parts, "weight_g_idx", g_idx, scale.shape[1])
            codes = codes if perm is None else codes[:, perm.long()]
        return int4(parts, pack_nibbles(codes + 8), scale, None if zero is None else zero.to(torch.int16) + 8, perm)


class _Scheme:
    """One entry of config_groups."""

    def __init__(self, scheme: Fields, config: Fields) -> None:
        """scheme: the entry. config: all of it, for the layout of entries that name none."""
        weights = scheme.object("weights")
        self.targets = _targets(scheme, "targets")
        if not self.targets:
            raise scheme.wrong("targets", 'names, class names or "re:" patterns of layers')
        layout = choice(config if scheme.get("format") is None else scheme, "format", (PACKED, *PLAIN))
        self.packed = layout == PACKED
        self.kind = choice(weights, "type", ("int",) if self.packed else ("int", "float"), "int")
        self.bits = choice(weights, "num_bits", (4, 8) if self.kind == "int" else (8,), 8)
        self.symmetric = weights.flag("symmetric", True)
        self.group = group_size(weights, -1)
        strategies = ("group", "channel", "tensor") if self.kind == "int" else ("group", "channel", "tensor", "block")
        self.strategy = choice(weights, "strategy", strategies, "channel" if self.group is None else "group")
        if self.strategy == "group" and self.group is None:
            raise refuse(weights, "group_size", 'a whole number above 0 where "strategy" is "group"')
        if self.strategy == "block" and weights.get("block_structure") != [BLOCK, BLOCK]:
            raise refuse(weights, "block_structure", f"[{BLOCK}, {BLOCK}]")
        order = weights.get("actorder", False)
        self.act_order = order if isinstance(order, bool) else ORDERS[choice(weights, "actorder", tuple(ORDERS))]

    def codes(self, parts: Parts) -> Tensor:
        """Signed codes int8, or e4m3, [N, K]."""
        if not self.packed:
            codes = parts.take("weight", (torch.float8_e4m3fn if self.kind == "float" else torch.int8,), None, None)
            if self.bits == 4 and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
                raise parts.wrong("weight", f"holds {int(codes.min())} to {int(codes.max())}; takes 4-bit codes, -8 to 7")
            return codes
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
            return parts.one_scale("weight_scale")
        return parts.scale("weight_scale", N, count_groups(parts, K, None if self.strategy == "channel" else self.group))

    def zero(self, parts: Parts, N: int, groups: int) -> Tensor | None:
        """Signed zeros [N or 1, groups]; None where the scheme is symmetric."""
        if self.symmetric and parts.look("weight_zero_point", ZEROS) is None:
            return None
        zero = self._stored_zero(parts, N, groups)
        if not self.symmetric:
            return zero
        if bool(zero.any()):
            raise parts.wrong("weight_zero_point", "is not 0; config.json makes the layer symmetric")
        return None

    def _stored_zero(self, parts: Parts, N: int, groups: int) -> Tensor:
        zero = parts.take("weight_zero_point", ZEROS)
        if not self.packed or self.strategy == "tensor" or zero.dtype != torch.int32:
            if tuple(zero.shape) != (N, groups) and zero.numel() != 1:
                raise parts.wrong("weight_zero_point", f"is {list(zero.shape)}; takes [{N}, {groups}]")
            return parts.byte("weight_zero_point", zero).reshape(-1, groups)
        words = parts.take("weight_zero_point", ZEROS, -(-N * self.bits // 32), groups).T.contiguous()
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


def _targets(config: Fields, key: str) -> tuple[str, ...]:
    """Names and patterns of layers."""
    found = config.names(key)
    for each in found:
        try:
            re.compile(each.removeprefix("re:") if each.startswith("re:") else "")
        except re.error as problem:
            raise config.wrong(key, f'regular expressions behind "re:", and {show(each)} is none ({problem})') from None
    return found


def _matches(module: str, target: str) -> bool:
    """As compressed-tensors matches: a whole name, a "re:" pattern from the start of the name, or the class that all of these have."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Linear")
