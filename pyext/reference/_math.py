"""What the reference modules share."""

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic on x runs in: its own, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
