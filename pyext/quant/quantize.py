"""quantize: a weight, a format and the name of a method give a QuantizedWeight."""

from collections.abc import Callable

import torch
from torch import Tensor

from ramify.checks import one_of
from ramify.quant import gptq, hqq, rtn
from ramify.quant.formats import Format
from ramify.quant.weight import QuantizedWeight

METHODS: dict[str, Callable[[Tensor, Format, Tensor | None], QuantizedWeight]] = {
    "rtn": rtn.quantize,
    "hqq": hqq.quantize,
    "gptq": gptq.quantize,
}
"""Name -> quantize(w f32 [N, K], format, hessian f32 [K, K] or None)."""

LARGEST = 1e38
"""Beyond it the span of a group, from its least to its greatest, may leave float32."""


def quantize(w: Tensor, format: Format, method: str = "rtn", hessian: Tensor | None = None) -> QuantizedWeight:
    """A weight [N, K] of any float dtype in a format. hessian: 2 X^T X of the inputs X [tokens, K], which "gptq" takes.

    The result is the same every time; of "gptq" under the same number of torch's threads, whose matrix products round by how they
    are split, and under another one some codes are others, no worse.
    Raises TypeError for what is no float matrix; ValueError for an unknown method, K that is no multiple of the group, and weights that
    are not finite.
    """
    quantizer = METHODS[one_of("method", method, METHODS, "quantize_weight")]
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"quantize_weight: w is {w.dtype if isinstance(w, Tensor) else type(w).__name__}; takes a float tensor [N, K].")
    if w.layout is not torch.strided:
        raise TypeError(f"quantize_weight: w is a {str(w.layout).removeprefix('torch.')} tensor; takes a strided one. Use w.to_dense().")
    if w.is_meta:
        raise ValueError("quantize_weight: w is on meta; takes a tensor that has values.")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"quantize_weight: w is {list(w.shape)}; takes two axes, [N, K], none empty.")
    if format.kind == "int4" and w.shape[1] % format.group:
        raise ValueError(f"quantize_weight: w has K = {w.shape[1]}; {format.name} takes multiples of {format.group}.")
    w = w.detach().float()
    if not bool((w.abs() <= LARGEST).all()):
        raise ValueError(f"quantize_weight: w holds NaN or infinity, or numbers beyond {LARGEST}; takes finite weights.")
    with torch.no_grad():
        return quantizer(w, format, hessian)
