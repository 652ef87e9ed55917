"""fp8 files as DeepSeek and Qwen ship them (transformers' FineGrainedFP8Config), and the older ones with one scale a matrix.

`weight` is e4m3 [N, K]. With weight_block_size [128, 128] in the config, `weight_scale_inv` [N / 128, K / 128] holds what a block's
codes are multiplied with, whatever its name says; without, `weight_scale_inv` or `weight_scale` is one number. Activations are not
quantised here, whatever activation_scheme says.
"""

import torch

from ramify.fields import Fields
from ramify.quant.formats import BLOCK, Format
from ramify.quant.sources.base import Parts, Source, choice, refuse
from ramify.quant.weight import SCALES, QuantizedWeight


class Fp8(Source):
    """quant_method "fp8"."""

    needed = ("weight", "weight_scale_inv")
    optional = ("activation_scale", "input_scale")

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        self.dense += config.names("ignored_layers")
        choice(config, "fmt", ("e4m3",), "e4m3")
        block = config.get("weight_block_size")
        if block not in (None, [BLOCK, BLOCK]):
            raise refuse(config, "weight_block_size", f"[{BLOCK}, {BLOCK}], or null for one scale a matrix")
        self.format = Format("fp8", BLOCK if block else 0)
        if not block:  # either name is in use
            self.needed, self.optional = ("weight",), ("weight_scale_inv", "weight_scale", *self.optional)

    def covers(self, module: str) -> bool:
        """Every linear layer but the head."""
        return super().covers(module) and module != "lm_head"

    def _read(self, parts: Parts) -> QuantizedWeight:
        codes = parts.take("weight", (torch.float8_e4m3fn,), None, None)
        N, K = parts.sized(*codes.shape)
        if self.format.group:
            return QuantizedWeight(self.format, codes, parts.scale("weight_scale_inv", *self.format.scale_shape(N, K)))
        name = "weight_scale" if parts.look("weight_scale", SCALES) is not None else "weight_scale_inv"
        return QuantizedWeight(self.format, codes, parts.one_scale(name).expand(N, 1).contiguous())
