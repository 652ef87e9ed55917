"""Round to nearest: each scale from its own weights, each code from its own weight. Needs no text."""

from torch import Tensor

from ramify.quant import grid
from ramify.quant.formats import Format
from ramify.quant.weight import QuantizedWeight


def quantize(w: Tensor, format: Format, hessian: Tensor | None = None) -> QuantizedWeight:
    """w f32 [N, K] in any format. hessian is not used.

    int8 and fp8: the scale puts the largest weight of a row or block on the largest code. int4: the scale (and zero) with the
    smallest squared error of a few that clip the group's extremes more or less, fitted to its codes by least squares.
    """
    return grid.nearest(w, *grid.fit(w, format, grid.scale_dtype(w, format)), format)
