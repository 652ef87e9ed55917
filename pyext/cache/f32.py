"""Pages in float32: the reference format, and the one for float32 models."""

import torch

from ramify.cache.base import PageFormat
from ramify.registry import page_format


@page_format("f32", lossless=True)
class F32(PageFormat):
    """Keys and values as float32."""

    dtype = torch.float32
