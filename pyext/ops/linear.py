"""linear: a matrix product with its epilogue, the same bits for a row whatever the other rows are."""

from torch import Tensor

from ramify import reference
from ramify.checks import one_of, show
from ramify.ops import _native
from ramify.ops._checks import FLOATS, Results, Shapes
from ramify.ops._library import Op

ACTIVATIONS = (None, "silu")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, rounded once.

    x [..., K], weight [N, K], bias [N], residual [..., N], each of any float dtype; activation None or "silu". Sums run in
    float32 or wider. Returns [..., N] in x's dtype. On the CPU the weight is repacked in every call: a model layer keeps
    packed weights instead. Raises ValueError for shapes and an unknown activation, TypeError for dtypes.
    """
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"linear: activation is {show(activation)}; takes None or a name.")
    return _linear(x, weight, bias, activation, residual, out=out)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Results:
    check = Shapes("linear")
    check("x", x, "... K", FLOATS)
    check("weight", weight, "N K", FLOATS)
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None:
        check("bias", bias, "N", FLOATS)
    if residual is not None:
        check("residual", residual, "... N", FLOATS)
        check.same_shape("residual", residual, "the result", shape)
    one_of("activation", activation, ACTIVATIONS, "linear")
    return ((shape, x.dtype),)


_linear = Op(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual",
    ["out"],
    check=_check,
    sizes=lambda x, weight, *_: {"dtype": x.dtype, "weight": weight.dtype},
    reference=lambda x, weight, bias, activation, residual: (reference.linear(x, weight, bias, activation=activation, residual=residual),),
    cpu=_native.linear,
)
