"""torchao weights in safetensors, flattened by its tensor subclasses: int8, int4 (Intx, unpacked; Int4Tensor, plain) and float8.

A layer has `_weight_qdata`, `_weight_scale` and often `_weight_zero_point`. What they are is told by dtypes and shapes:
int8 [N, K] with scales [N, groups] and int8 zeros (Int8Tensor, IntxUnpackedToInt8Tensor); float8 [N, K] (Float8Tensor); bytes
[N, K / 2] of signed nibbles, lowest first, with scales and float zeros [groups, N] (Int4Tensor). Pickled checkpoints are not read.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ramify.checks import listed
from ramify.fields import Fields
from ramify.quant.formats import Format
from ramify.quant.sources.base import Parts, Source, choice, int4, int8, refuse
from ramify.quant.weight import SCALES, QuantizedWeight, pack_nibbles

TYPES = (
    *("Int4WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"),
    *("Int8DynamicActivationInt4WeightConfig", "Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"),
    *("Int8StaticActivationInt8WeightConfig", "Float8DynamicActivationInt4WeightConfig"),
    *("Float8DynamicActivationFloat8WeightConfig", "Float8StaticActivationFloat8WeightConfig"),
)
"""Configs whose weights may have one of the forms above."""

OLD_TYPES = ("int4_weight_only", "int8_weight_only", "int8_dynamic_activation_int8_weight", "float8_weight_only")
"""What quant_type was called when it was a string."""

BY_LAYER = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")
"""Configs that hold others, by the name of the layer."""

DTYPES = ("int4", "int1", "int2", "int3", "int8", "float8_e4m3fn")
"""weight_dtype: what fits the codes of a canonical form."""

BYTES = (torch.int8, torch.uint8)
FP8 = torch.float8_e4m3fn


class Torchao(Source):
    """quant_method "torchao"."""

    needed = ("_weight_qdata", "_weight_scale")
    optional = ("_weight_zero_point", "_weight_act_quant_scale", "_weight_act_quant_zero_point")

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        if isinstance(config.get("quant_type"), str):
            choice(config, "quant_type", OLD_TYPES)
        elif config.get("quant_type") is not None:
            for each in _types(config.object("quant_type").object("default")):
                _refuse_unread(each)

    def _read(self, parts: Parts) -> QuantizedWeight:
        packed = parts.get(f"{parts.prefix}._weight_qdata")
        if packed is not None and packed.dtype == torch.int32:
            raise parts.beyond("has codes packed in words (tile_packed_to_4d, plain_int32); takes int4 codes in bytes (plain)")
        if parts.get(f"{parts.prefix}._weight_act_pre_scale") is not None:
            raise parts.beyond("scales its inputs (act_pre_scale); takes weights alone")
        codes = parts.take("_weight_qdata", (*BYTES, FP8), None, None)
        zero = parts.look("_weight_zero_point", (*SCALES, torch.int8, torch.int32, torch.int64))
        if zero is not None and zero.is_floating_point():
            return _plain(parts, codes, zero)
        N, K = parts.sized(*codes.shape)
        scale = parts.scale("_weight_scale", None, None)
        if scale.shape[0] not in (1, N) or K % scale.shape[1]:
            raise parts.wrong("_weight_scale", f"is {list(scale.shape)}; takes [{N}, groups], [{N}, 1] or [1, 1]")
        if codes.dtype == FP8:
            if scale.shape[1] != 1:
                raise parts.beyond(f"has {scale.shape[1]} float8 scales a row; takes one")
            return QuantizedWeight(Format("fp8"), codes, scale.expand(N, 1).contiguous())
        if codes.dtype != torch.int8:
            raise parts.wrong("_weight_qdata", "is uint8; takes int8 here")
        if zero is not None and zero.shape != scale.shape:
            raise parts.wrong("_weight_zero_point", f"is {list(zero.shape)}; takes {list(scale.shape)}, as the scales")
        if int(codes.min()) < -8 or int(codes.max()) > 7:
            return int8(parts, codes, scale, zero)
        unsigned = None if zero is None else parts.byte("_weight_zero_point", zero).to(torch.int16) + 8
        return int4(parts, pack_nibbles(codes + 8), scale, unsigned)


def _types(config: Fields) -> Iterator[Fields]:
    """The configs by layer of one that has them, or the config itself."""
    if config.get("_type") not in BY_LAYER:
        yield config
        return
    for key in config.object("_data").values:
        layers = config.object("_data").object(key)
        yield from (layers.object(name) for name, value in layers.values.items() if value is not None)


def _refuse_unread(config: Fields) -> None:
    """UnsupportedModelError for a config whose weights are not read."""
    choice(config, "_type", TYPES)
    data = config.object("_data")
    for key, taken in (("int4_packing_format", ("plain",)), ("weight_dtype", DTYPES)):
        value = data.get(key, taken[0])
        said = value.get("_data") if isinstance(value, Mapping) else value  # enums and dtypes are {"_type": class, "_data": name}
        if not isinstance(said, str) or said.lower() not in taken:
            raise refuse(data, key, listed(taken))


def _plain(parts: Parts, codes: Tensor, zero: Tensor) -> QuantizedWeight:
    """Int4Tensor: code * scale + zero, which has a canonical form where the zeros are 0."""
    if codes.dtype == FP8:
        raise parts.wrong("_weight_qdata", "is float8; takes bytes of two codes where zeros are floats")
    if bool(zero.any()):
        raise parts.beyond("has float zeros that are added to code * scale (Int4Tensor); takes zeros of 0, or whole zeros (Intx)")
    N, _ = parts.sized(codes.shape[0], 2 * codes.shape[1])
    scale = parts.scale("_weight_scale", None, N)
    return int4(parts, codes.view(torch.uint8) ^ 0x88, scale.T, None)
