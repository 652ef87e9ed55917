"""Pages in bfloat16: half the bytes, the precision in which bf16 models are trained and served."""

import torch

from ramify.cache.base import PageFormat
from ramify.registry import page_format


@page_format("bf16", lossless=True)
class Bf16(PageFormat):
    """Keys and values rounded to bfloat16 when they enter the draft region, so a draft row and a committed row hold the same bits."""

    dtype = torch.bfloat16
