"""LowBitLinear: a linear layer of a torch model whose weight is a QuantizedWeight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ramify import ops
from ramify.quant import Format, QuantizedWeight
from ramify.quant.sources.ramify import FIELDS
from ramify.quant.weight import CODES


class LowBitLinear(nn.Module):
    """y = x W^T + bias with W [N, K] in a low-bit format. Buffers: weight (the codes), weight_scale, weight_zero and weight_perm.

    Moves to a device keep their dtypes, and so does `.half()`. Made empty, to be filled from a file; `of` makes it whole.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_perm: Tensor | None

    def __init__(
        self,
        format: Format,
        N: int,
        K: int,
        bias: bool = False,
        perm: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """perm: leave room for an order of inputs. dtype: of the bias."""
        super().__init__()
        self.format, self.in_features, self.out_features = format, K, N
        groups = format.scale_shape(N, K)
        width = K // 2 if format.kind == "int4" else K
        self.register_buffer("weight", torch.empty(N, width, dtype=CODES[format.kind], device=device))
        self.register_buffer("weight_scale", torch.empty(groups, dtype=torch.float32, device=device))
        self.register_buffer("weight_zero", torch.empty(groups, dtype=torch.float16, device=device) if format.zero_point else None)
        self.register_buffer("weight_perm", torch.empty(K, dtype=torch.int32, device=device) if perm else None)
        self.bias = nn.Parameter(torch.empty(N, dtype=dtype, device=device), requires_grad=False) if bias else None
        self._made: QuantizedWeight | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "LowBitLinear":
        """A layer with this weight."""
        layer = cls(weight.format, *weight.shape, bias is not None, weight.perm is not None, device="meta")
        for part, tensor in weight.state_dict().items():
            setattr(layer, FIELDS[part], tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight. The same object until a buffer is replaced, so that what kernels pack of it is packed once until it changes."""
        buffers = {part: getattr(self, name) for part, name in FIELDS.items()}
        if self._made is None or any(getattr(self._made, part) is not buffer for part, buffer in buffers.items()):
            self._made = QuantizedWeight(self.format, **buffers)
            for part, tensor in self._made.state_dict().items():
                if tensor is not buffers[part]:  # a copy, of one that was made in inference mode
                    setattr(self, FIELDS[part], tensor)
        return self._made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. TypeError for an x that a model has cast to the dtype of the codes."""
        if x.dtype in CODES.values():
            raise TypeError(
                f"LowBitLinear: x is {str(x.dtype).removeprefix('torch.')}; takes floats. Where the model casts x to weight.dtype, name "
                "the layer in modules_to_not_convert."
            )
        if x.ndim and x.stride(-1) != 1:
            x = x.contiguous()
        return ops.linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        """Sizes and the format, as print(model) shows them."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowBitLinear":
        kept = {name: tensor for name in FIELDS.values() if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if getattr(self, name).dtype != before.dtype:  # a cast of the model is not one of the codes and scales
                setattr(self, name, before.to(getattr(self, name).device))
        return self
