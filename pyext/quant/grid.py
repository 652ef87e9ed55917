"""How each format rounds: scales and zeros of the weights that share them, codes of a weight under given scales.

Scales and zeros are rounded to their stored dtype before codes are chosen, so that the codes know the scale they will be read with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ramify.quant.formats import BLOCK, Format
from ramify.quant.weight import SYMMETRIC_ZERO, QuantizedWeight, pack_nibbles

INT8_TOP, INT4_TOP, FP8_TOP = 127, 15, 448
"""Largest code. Int8 leaves -128 out, so that every code has a negative."""

CLIPS = (-8.0, -8.5, -9.0, -9.5, -10.0, 7.0)
"""Symmetric int4: steps from zero to the group's extreme, each tried for the smallest squared error. There is one code more below the
zero than above it, so the extreme goes there, whatever its sign: the scale takes the sign. 7 is the usual rounding, so that no group
is worse than with it. On the zoo's weights in groups of 64 the error (root mean square) is 9.1% of the weights', and 10.9% with 7 alone."""

SHRINKS = (1.0, 0.93, 0.86)
"""Int4 with zero points: shares of a group's minimum and maximum that the codes span, each tried with each."""

FARTHEST = 2**14
"""Steps between 0 and the codes of a group at most: float16 holds zeros four times as far."""

REFITS = 2
"""Times that the best of an int4 group's candidates is fitted to its codes by least squares. On the zoo in groups of 64 the error goes
from 9.18% to 9.11%, and with zero points from 8.42% to 8.24%; no finer grid and no more refits bring it below 9.08% and 8.19%."""

CHUNK = 1 << 18
"""Weights that are searched at once: few enough to stay in a core's cache."""


def scale_dtype(w: Tensor, format: Format) -> torch.dtype:
    """Float16 for int4; float32 for int8 and fp8, whose scales are few, and for int4 weights of which a group leaves float16's range.

    Below its normal numbers float16 rounds scales coarsely, and at last to 0, which would lose the group. Groups of zeros need no scale.
    """
    if format.kind != "int4":
        return torch.float32
    low, high = w.reshape(-1, format.group).aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / INT4_TOP if format.zero_point else torch.maximum(high, -low) / SYMMETRIC_ZERO
    held = ((step == 0) | (step >= torch.finfo(torch.float16).smallest_normal)).all() & (torch.maximum(high, -low) <= 2**16).all()
    return torch.float16 if bool(held) else torch.float32


def fit(w: Tensor, format: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales in `dtype` and, where the format has them, float16 zeros, for whole groups of w f32 [N, C]; shapes as in QuantizedWeight."""
    N, C = w.shape
    if format.kind == "int4":
        groups = w.reshape(-1, format.group)
        search = _asymmetric if format.zero_point else _symmetric
        found = [search(part, dtype) for part in groups.split(max(1, CHUNK // format.group))]
        scale, zero = (torch.cat(each).view(N, -1) for each in zip(*found))
        return scale, zero if format.zero_point else None
    if format.group:
        padded = torch.nn.functional.pad(w, (0, -C % BLOCK, 0, -N % BLOCK))
        peak = padded.view(-(-N // BLOCK), BLOCK, -(-C // BLOCK), BLOCK).abs().amax((1, 3))
    else:
        peak = w.abs().amax(1, keepdim=True)
    return (peak / (INT8_TOP if format.kind == "int8" else FP8_TOP)).to(dtype), None


def spread(parameter: Tensor, format: Format, N: int) -> Tensor:
    """Scales or zeros as float32 [N, C] (or [N, 1], which serves every column): one for each weight of whole groups."""
    parameter = parameter.float()
    if format.kind == "fp8" and format.group:
        parameter = parameter.repeat_interleave(BLOCK, 0)[:N]
    return parameter.repeat_interleave(format.group, 1) if format.group else parameter


def codes(w: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """The nearest codes of w, as float32; scale and zero broadcast to it. A scale of 0 stands for a group of zeros."""
    steps = w / torch.where(scale == 0, 1.0, scale)
    if format.kind == "int4":
        return (steps + (SYMMETRIC_ZERO if zero is None else zero)).round_().clamp_(0, INT4_TOP)
    if format.kind == "int8":
        return steps.round_().clamp_(-INT8_TOP, INT8_TOP)
    return steps.clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).float()


def values(codes: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """What codes stand for."""
    if format.kind == "int4":
        codes = codes - (SYMMETRIC_ZERO if zero is None else zero)
    return codes * scale


def least_squares(x: Tensor, q: Tensor, dtype: torch.dtype, format: Format) -> tuple[Tensor, Tensor]:
    """Scale [M, 1] (and zero) of int4 groups x [M, G] for which the codes q [M, G] come closest to x, as they are stored.

    NaN or infinite where a group's codes are all alike. Symmetric groups have zeros that nobody reads.
    """
    if not format.zero_point:
        q = q - SYMMETRIC_ZERO
        scale = (x * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
        return scale.nan_to_num_(0).to(dtype), torch.zeros_like(scale).half()
    middle, centre = x.mean(1, keepdim=True), q.mean(1, keepdim=True)
    scale = (((x - middle) * (q - centre)).sum(1, keepdim=True) / (q - centre).square().sum(1, keepdim=True)).to(dtype)
    return scale, (centre - middle / scale.float()).half()


def packed(q: Tensor, scale: Tensor, zero: Tensor | None, format: Format, perm: Tensor | None = None) -> QuantizedWeight:
    """The canonical weight of codes float32 [N, K] and stored scales and zeros."""
    stored = {"int4": pack_nibbles, "int8": lambda t: t.to(torch.int8), "fp8": lambda t: t.to(torch.float8_e4m3fn)}[format.kind](q)
    return QuantizedWeight(format, stored, scale, zero, perm)


def nearest(w: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> QuantizedWeight:
    """w f32 [N, K] rounded to the nearest codes under stored scales and zeros."""
    N, K = w.shape
    wide = spread(scale, format, N)[:, :K]
    return packed(codes(w, wide, None if zero is None else spread(zero, format, N), format), scale, zero, format)


def _symmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale of each group [M, G] (and zeros that nobody reads)."""
    format = Format("int4", x.shape[1])
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    scales = [(extreme / clip).to(dtype) for clip in CLIPS]
    return _refitted(x, *_best(x, [(scale, None) for scale in scales], format), format)


def _asymmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and fractional zero of each group [M, G]. The codes span 0 as well, unless a group that does not is better served apart."""
    format = Format("int4", x.shape[1], zero_point=True)
    least, most = x.aminmax(dim=1, keepdim=True)
    low, high = least.clamp(max=0), most.clamp(min=0)
    tried = [_spanning(low * down, high * up, dtype) for down in SHRINKS for up in SHRINKS]
    scale, zero = _refitted(x, *_best(x, tried, format), format)
    apart = ((least > 0) | (most < 0)).flatten()
    if bool(apart.any()):
        scale[apart], zero[apart] = _apart(x[apart], (scale[apart], zero[apart]), format)
    return scale, zero


def _apart(x: Tensor, found: tuple[Tensor, Tensor], format: Format) -> tuple[Tensor, Tensor]:
    """The best parameters of groups x [M, G] that do not span 0: those found, those of their own span alone, or the symmetric grid's.

    The zero of their own span lies far from the codes, and the 11 bits of float16 may not put it where it should be. The scale that
    puts a code on the extreme itself is then better, so that a zero point never costs more than it saves.
    """
    least, most = x.aminmax(dim=1, keepdim=True)
    dtype = found[0].dtype
    span = torch.maximum(most - least, torch.maximum(most, -least) * (INT4_TOP / FARTHEST))
    own = _refitted(x, *_spanning(least, least + span, dtype), format)
    plain, _ = _symmetric(x, dtype)
    return _best(x, [found, own, (plain, torch.full_like(plain, SYMMETRIC_ZERO).half())], format)


def _spanning(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero with which the codes go from low to high."""
    scale = ((high - low) / INT4_TOP).to(dtype)
    step = scale.float()
    return scale, (-low / torch.where(step == 0, 1.0, step)).half()


def _best(x: Tensor, tried: Sequence[tuple[Tensor, Tensor | None]], format: Format) -> tuple[Tensor, Tensor]:
    """Of each group's candidates the one with the smallest squared error; the first one where they tie."""
    scales = torch.cat([scale for scale, _ in tried], 1)
    zeros = torch.cat([torch.zeros_like(scale).half() if zero is None else zero for scale, zero in tried], 1)
    choice = torch.cat([_rounded(x, scale, zero, format)[1] for scale, zero in tried], 1).argmin(1, keepdim=True)
    return scales.gather(1, choice), zeros.gather(1, choice)


def _refitted(x: Tensor, scale: Tensor, zero: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Parameters of groups x [M, G] with a smaller squared error than the given ones [M, 1], or the given ones."""
    q, least = _rounded(x, scale, zero, format)
    for _ in range(REFITS):
        fitted = least_squares(x, q, scale.dtype, format)
        q, error = _rounded(x, *fitted, format)
        won = error < least  # never where a fit left NaN
        least = torch.where(won, error, least)
        scale, zero = torch.where(won, fitted[0], scale), torch.where(won, fitted[1], zero)
    return scale, zero


def _rounded(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """Codes [M, G] of groups under stored parameters [M, 1], and the squared error [M, 1] that they leave."""
    s, z = scale.float(), zero.float() if zero is not None and format.zero_point else None
    q = codes(x, s, z, format)
    return q, (values(q, s, z, format) - x).square_().sum(1, keepdim=True)
