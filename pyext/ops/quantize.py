"""quantize_weight: a float weight becomes a low-bit one."""

from torch import Tensor

from ramify.checks import flag, show, whole
from ramify.quant import Format, QuantizedWeight, quantize


def quantize_weight(
    w: Tensor, format: str = "int4", group: int = 64, zero_point: bool = False, method: str = "rtn", hessian: Tensor | None = None
) -> QuantizedWeight:
    """A weight [N, K] of any float dtype in a low-bit format, always the same for the same weight; with "gptq" under the same number of
    torch's threads, whose matrix products round by how they are split.

    format: "int8", "fp8", "fp8-b128", a full name such as "int4-g64-zp", or "int4", which takes its group (32, 64, 128) and zero_point
    from the arguments; other formats do not read them. method: "rtn" (round to nearest), "hqq" (int4 alone) or "gptq", which takes
    hessian f32 [K, K], 2 X^T X of inputs X [tokens, K]. Raises ValueError for an unknown format or method, K that is no multiple of the
    group, and weights that are not finite; TypeError for what is no float tensor.
    """
    if not isinstance(format, str):
        raise TypeError(f"quantize_weight: format is {show(format)}; takes a name.")
    if hessian is not None and method != "gptq":
        raise ValueError(f'quantize_weight: hessian is given and method is {show(method)}; takes it with "gptq". Leave it out.')
    whole("group", group, 1, "quantize_weight")
    flag("zero_point", zero_point, "quantize_weight")
    if format == "int4":
        return quantize(w, Format("int4", group, zero_point), method, hessian)
    return quantize(w, Format.parse(format, "quantize_weight: format"), method, hessian)
