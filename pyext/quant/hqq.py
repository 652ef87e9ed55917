"""Half-quadratic refinement of int4 scales and zeros (Badri and Shaji 2023, "HQQ"). Needs no text.

Rounding errors of few large weights should not move the scale of the many: a group's parameters minimise the sum of |error|^p with
p < 1. Splitting the error off as a variable of its own turns that into two closed steps, taken in turn: shrink the errors, then fit
scale and zero to the weights less those errors by least squares. (HQQ fits the zero alone; with both, less error is left.)

No default anywhere: what the zoo's target loses goes with the squared error, which round-to-nearest already searches and fits; this norm
leaves a little more of it, and a search over the whole grid by it far more.
"""

import torch
from torch import Tensor

from ramify.checks import one_of
from ramify.quant import grid
from ramify.quant.formats import Format
from ramify.quant.weight import QuantizedWeight

POWER, STEPS = 0.7, 20
BETA, GROWTH = 10.0, 1.01
"""How strongly the split-off errors are tied to the true ones, in steps of a group's scale, and its growth each time."""


def quantize(w: Tensor, format: Format, hessian: Tensor | None = None) -> QuantizedWeight:
    """w f32 [N, K] in int4; symmetric groups have their scale refined, the others scale and zero. hessian is not used.

    No group has a larger sum of |error|^0.7 than round-to-nearest gives it. Raises ValueError for int8 and fp8, which have no zero.
    """
    one_of("format", format.kind, ("int4",), 'quantize_weight: method "hqq"')
    scale, zero = grid.fit(w, format, grid.scale_dtype(w, format))
    groups, rows = w.reshape(-1, format.group), max(1, grid.CHUNK // format.group)
    flat = [scale.view(-1, 1), torch.zeros_like(scale).half().view(-1, 1) if zero is None else zero.view(-1, 1)]
    parts = zip(groups.split(rows), flat[0].split(rows), flat[1].split(rows))
    found = [_refine(x, s, z, format) for x, s, z in parts]
    scale, better = (torch.cat(each).view(scale.shape) for each in zip(*found))
    return grid.nearest(w, scale, None if zero is None else better, format)


def _refine(x: Tensor, scale: Tensor, zero: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Better parameters of groups x [M, G] than the given ones [M, 1], or the given ones."""
    best, best_norm, beta = (scale, zero), None, BETA
    for _ in range(STEPS + 1):
        s, z = scale.float(), zero.float() if format.zero_point else None
        q = grid.codes(x, s, z, format)
        error = x - grid.values(q, s, z, format)
        norm = error.abs().pow(POWER).sum(1, keepdim=True)
        if best_norm is None:
            best_norm = norm
        else:
            won = norm < best_norm  # never where a fit went wrong and left NaN
            if not bool(won.any()):
                break
            best_norm = torch.where(won, norm, best_norm)
            best = (torch.where(won, scale, best[0]), torch.where(won, zero, best[1]))
        step = torch.where(s == 0, 1.0, s)
        target = x - _shrink(error / step, beta) * step
        scale, zero = grid.least_squares(target, q, scale.dtype, format)
        beta *= GROWTH
    return best


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal step of |error|^p: small errors become 0, large ones nearly stay."""
    return error.sign() * (error.abs() - error.abs().pow(POWER - 1) / beta).nan_to_num_(0, neginf=0).clamp_(min=0)
