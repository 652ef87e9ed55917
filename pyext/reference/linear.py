"""linear in plain torch: y = activation(x W^T + bias) + residual."""

from torch import Tensor
from torch.nn import functional

from ramify.reference._math import wide


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """A linear layer with its epilogue, in one rounding.

    x [..., K], weight [N, K], bias [N], residual [..., N]; activation None or "silu". Arithmetic runs in float32 or wider, and
    only the end result is rounded to x's dtype. Returns [..., N].
    """
    dtype = wide(x)
    y = x.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = functional.silu(y)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)
