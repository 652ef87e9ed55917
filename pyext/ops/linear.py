"""linear: a matrix product with its epilogue, the same bits for a row whatever the other rows are."""

from torch import Tensor

from ramify import reference
from ramify.checks import one_of
from ramify.ops import _native
from ramify.ops._checks import FLOATS, Shapes, outputs
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
    check = Shapes("linear")
    check("x", x, "... K", FLOATS)
    check("weight", weight, "N K", FLOATS)
    if x.shape[-1] == 0:
        raise check.fail(f"x is {list(x.shape)}", "one column or more")
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None:
        check("bias", bias, "N", FLOATS)
    if residual is not None:
        check("residual", residual, "... N", FLOATS)
        check.same_shape("residual", residual, "the result", shape)
    one_of("activation", activation, ACTIVATIONS, "linear")
    outs = outputs("linear", out, 1)
    for o in outs or ():
        check.out("out", o, shape, x.dtype)
    return _linear(x, weight, bias, activation, residual, out=outs)


_linear = Op(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual",
    ["out"],
    allocate=lambda x, weight, *_: (x.new_empty((*x.shape[:-1], weight.shape[0])),),
    sizes=lambda x, weight, *_: {"dtype": x.dtype, "weight": weight.dtype},
    reference=lambda x, weight, bias, activation, residual: (reference.linear(x, weight, bias, activation=activation, residual=residual),),
    cpu=_native.linear,
)
