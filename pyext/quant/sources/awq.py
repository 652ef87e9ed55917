"""AWQ files of AutoAWQ and GPTQModel (arXiv 2306.00978), 4 bits, GEMM layout.

qweight int32 [K, N / 8] and qzeros int32 [groups, N / 8] pack eight outputs a word, in the order 0 2 4 6 1 3 5 7 from the lowest
nibble up; scales [groups, N]. A config that names no group_size means 128.
"""

import torch
from torch import Tensor

from ramify.fields import Fields
from ramify.quant.sources.base import Parts, Source, choice, count_groups, group_size, int4, nibbles, refuse
from ramify.quant.weight import QuantizedWeight, pack_nibbles

INT = (torch.int32,)
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output 8c + j lies in this nibble of word c."""


class Awq(Source):
    """quant_method "awq"."""

    needed = ("qweight", "qzeros", "scales")

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        choice(config, "bits", (4,), 4)
        for key in ("version", "checkpoint_format", "format"):
            if config.text(key, "gemm").lower() != "gemm":
                raise refuse(config, key, "gemm")
        self.group = group_size(config, 128)

    def covers(self, module: str) -> bool:
        """Every linear layer but the head."""
        return super().covers(module) and module != "lm_head"

    def _read(self, parts: Parts) -> QuantizedWeight:
        qweight = parts.take("qweight", INT, None, None)
        N, K = parts.sized(8 * qweight.shape[1], qweight.shape[0])
        groups = count_groups(parts, K, self.group)
        qzeros = parts.take("qzeros", INT, groups, N // 8)
        scale = parts.scale("scales", groups, N)
        return int4(parts, pack_nibbles(_outputs(qweight).T), scale.T, _outputs(qzeros).T)


def _outputs(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [R, N]."""
    return nibbles(words).unflatten(1, (-1, 8))[..., NIBBLE_OF].flatten(1)
