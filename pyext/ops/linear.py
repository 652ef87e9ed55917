"""linear: a matrix product with its epilogue, the same bits for a row whatever the other rows are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ramify import backends, reference
from ramify.checks import one_of, show, whole
from ramify.memory import on_huge_pages
from ramify.ops import _cuda_linear, _native
from ramify.ops._checks import FLOATS, Results, Shapes, tensor
from ramify.ops._library import Op
from ramify.quant.formats import Format
from ramify.quant.packing import packed, packed_bytes
from ramify.quant.weight import CODES, SCALES, QuantizedWeight

ACTIVATIONS = (None, "silu")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A dense weight [N, K] as the CPU kernels read it, for layers that are called again and again: `PackedWeight.of(weight)`.

    panels: its dtype's panels of 32 outputs, flat (csrc/common/layouts.h). It holds no reference to the weight it came from.
    """

    panels: Tensor
    N: int
    K: int

    def __post_init__(self) -> None:
        N, K = whole("N", self.N, 1, "PackedWeight"), whole("K", self.K, 1, "PackedWeight")
        check = Shapes("PackedWeight")
        check("panels", tensor("PackedWeight", "panels", self.panels), "size", FLOATS[:2])
        if len(self.panels) != (size := _panel_size(N, K, self.panels.dtype)):
            raise check.fail(f"panels is {list(self.panels.shape)}", f"[{size}] for N = {show(N)} and K = {show(K)}")

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        """Pack a weight [N, K], float32 or bfloat16, that lies on the CPU. Needs the CPU kernels: RuntimeError without them."""
        check = Shapes("PackedWeight.of")
        check("weight", tensor("PackedWeight.of", "weight", weight), "N K", FLOATS[:2])
        if weight.device.type != "cpu" or 0 in weight.shape:
            raise check.fail(f"weight is {list(weight.shape)} on {weight.device}", "a weight on the CPU, no axis empty")
        if why := backends.missing("cpu"):
            raise RuntimeError(f"PackedWeight.of: {why}. Use the weight as it is.")
        return cls(on_huge_pages(backends.native().pack_weight(weight)), *weight.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs and K inputs."""
        return self.N, self.K

    def unpack(self) -> Tensor:
        """The weight [N, K] again."""
        return _unpack(self.panels, self.N, self.K)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    activations: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, rounded once.

    x [..., K], weight [N, K], bias [N], residual [..., N], each of any float dtype; activation None or "silu". Sums run in
    float32 or wider. Returns [..., N] in x's dtype. On the CPU a plain weight is repacked in every call: pass a PackedWeight
    when there are many. On a GPU the product with a plain weight is cuBLAS's, rounded before bias and residual are added. Raises
    ValueError for shapes and an unknown activation, TypeError for dtypes.

    A QuantizedWeight is packed at its first use on the CPU. `activations` says how it takes x: "int8" rounds a row to int8 with
    one scale (the default for int8 and int4 on the CPU), "int8-group" with one scale for every group of the weight (128 inputs
    for int8), "bf16" rounds each value to bfloat16 (int4 then goes through bfloat16 products where the chip has them), "exact" nothing
    (the default for fp8, which is never rounded to int8). A row that holds NaN or infinity comes out as NaN when it is rounded to int8,
    and not finite otherwise. On a GPU "exact" is the default and what the kernels do: the CUDA kernels round
    no weight, those of Triton only a difference from a zero point, to x's dtype; the other two run on the reference.
    """
    for name, given in (("activation", activation), ("activations", activations)):
        if given is not None and not isinstance(given, str):
            raise TypeError(f"linear: {name} is {show(given)}; takes None or a name.")
    if isinstance(weight, QuantizedWeight):
        on_cpu = weight.codes.device.type == "cpu"
        how = activations or ("int8" if on_cpu and weight.format.kind != "fp8" else "exact")
        panels = packed(weight) if on_cpu else None
        tensors = weight.codes, weight.scale, weight.zero, weight.perm, panels
        return _low_bit(x, *tensors, weight.format.name, bias, activation, residual, how, out=out)
    if activations is not None:
        raise ValueError(f'linear: activations is "{activations}"; takes None with a dense weight. Quantize the weight first.')
    if isinstance(weight, PackedWeight):
        return _packed(x, weight.panels, weight.N, bias, activation, residual, out=out)
    if not isinstance(weight, Tensor):
        raise TypeError(f"linear: weight is {show(weight)}; takes a tensor [N, K], a QuantizedWeight or a PackedWeight.")
    return _linear(x, weight, bias, activation, residual, out=out)


def _panel_size(N: int, K: int, dtype: torch.dtype) -> int:
    """Values of a packed weight: panels of 32 outputs, bf16 inputs in pairs."""
    return -(-N // 32) * 32 * (K + K % 2 if dtype == torch.bfloat16 else K)


def _rows(x: Tensor, N: int | None = None, K: int | None = None) -> Shapes:
    """The checks of one call, x and the sizes of its weight already in them."""
    check = Shapes("linear")
    check("x", x, "... K", FLOATS)
    if N is not None:
        if x.shape[-1] != K:
            raise check.fail(f"weight is [{N}, {K}]", f"[N, K] with K = {x.shape[-1]}, as in x")
        check.sizes["N"] = (N, "weight")
    return check


def _check_layer(check: Shapes, x: Tensor, N: int, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Results:
    """What every form takes beside its weight."""
    shape = (*x.shape[:-1], N)
    if bias is not None:
        check("bias", bias, "N", FLOATS)
    if residual is not None:
        check("residual", residual, "... N", FLOATS)
        check.same_shape("residual", residual, "the result", shape)
    one_of("activation", activation, ACTIVATIONS, "linear")
    return ((shape, x.dtype),)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Results:
    check = _rows(x)
    check("weight", weight, "N K", FLOATS)
    return _check_layer(check, x, weight.shape[0], bias, activation, residual)


def _check_packed(x: Tensor, panels: Tensor, N: int, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Results:
    check = _rows(x)
    check("panels", panels, "size", FLOATS[:2])
    K = x.shape[-1]
    size = _panel_size(N, K, panels.dtype)
    if N < 1 or len(panels) != size:
        raise check.fail(f"x is {list(x.shape)} and the packed weight {len(panels):,} values", f"{size:,} for K = {K} and N = {N}")
    check.sizes["N"] = (N, "weight")
    return _check_layer(check, x, N, bias, activation, residual)


def _check_low_bit(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    panels: Tensor | None,
    form: str,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    activations: str,
) -> Results:
    f = Format.parse(form)
    Shapes("linear")("codes", codes, "N W", (CODES[f.kind],))
    N, K = codes.shape[0], codes.shape[1] * (2 if f.kind == "int4" else 1)
    if K == 0 or (f.kind == "int4" and K % f.group):
        raise ValueError(f"linear: codes are {list(codes.shape)}; takes whole groups of {f.group or 1} inputs, as {form} has.")
    check = _rows(x, N, K)
    check("codes", codes, "...", (CODES[f.kind],))
    one_of("activations", activations, backends.ROUNDED[2:] if f.kind == "fp8" else backends.ROUNDED, "linear")
    check("scale", scale, "...", SCALES)
    check.same_shape("scale", scale, form, f.scale_shape(N, K))
    if (zero is not None) != f.zero_point:
        raise check.fail(f"zero is {'given' if zero is not None else 'None'}", f"the other with {form}")
    if zero is not None:
        check("zero", zero, "...", (torch.float16,))
        check.same_shape("zero", zero, "scale", scale.shape)
    if perm is not None:
        check("perm", perm, "...", (torch.int32,))
        check.same_shape("perm", perm, "the weight's inputs", (K,))
    if panels is not None:
        check("panels", panels, "...", (torch.uint8,))
        check.same_shape("panels", panels, "this format", (packed_bytes(f, N, K, scale.dtype),))
    return _check_layer(check, x, N, bias, activation, residual)


def _unpack(panels: Tensor, N: int, K: int) -> Tensor:
    """Panels of 32 outputs -> [N, K]: [N/32][K][32], bf16 in pairs of K."""
    pair = 2 if panels.dtype.itemsize == 2 else 1
    rows = -(-N // 32)
    return panels.view(rows, -1, 32, pair).permute(0, 2, 1, 3).reshape(rows * 32, -1)[:N, :K]


def _reference(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, activation: str | None, residual: Tensor | None, **how: str
) -> tuple[Tensor]:
    return (reference.linear(x, weight, bias, activation=activation, residual=residual, **how),)


_linear = Op(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual",
    ["out"],
    check=_check,
    sizes=lambda x, weight, *_: {"dtype": x.dtype, "weight": weight.dtype},
    reference=_reference,
    cpu=_native.linear,
    cuda=_cuda_linear.linear,
)

_packed = Op(
    "linear.packed",
    "Tensor x, Tensor panels, int N, Tensor? bias, str? activation, Tensor? residual",
    ["out"],
    check=_check_packed,
    sizes=lambda x, panels, *_: {"dtype": x.dtype, "weight": panels.dtype},
    reference=lambda x, panels, N, *rest: _reference(x, _unpack(panels, N, x.shape[-1]), *rest),
    cpu=_native.linear_packed,
)

_low_bit = Op(
    "linear.low_bit",
    "Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? perm, Tensor? panels, str format, Tensor? bias, str? activation, "
    "Tensor? residual, str activations",
    ["out"],
    check=_check_low_bit,
    sizes=lambda x, codes, scale, zero, perm, panels, form, *rest: {"dtype": x.dtype, "weight": form, "activations": rest[-1]},
    reference=lambda x, codes, scale, zero, perm, panels, form, bias, activation, residual, how: _reference(
        x, QuantizedWeight(Format.parse(form), codes, scale, zero, perm), bias, activation, residual, activations=how
    ),
    cpu=_native.linear_low_bit,
    cuda=_cuda_linear.linear_low_bit,
    triton="linear_low_bit",
)
