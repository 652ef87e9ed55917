"""rms_norm, rope, rope_append, silu_mul and embed in plain torch.

Sources: RMSNorm arXiv 1910.07467; rotary embedding arXiv 2104.09864, in the half-rotation form of Llama checkpoints; gated
SiLU arXiv 2002.05202.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ramify.reference._math import wide


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-6) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; with `residual`, of x + residual.

    x, residual [..., H], weight [H]. The sum is rounded to x's dtype before it is normed, as a model that stores it does.
    Returns the normed rows, and with `residual` the pair (normed rows, x + residual), both [..., H] in x's dtype.
    """
    dtype = wide(x)
    h = x.to(dtype)
    if residual is not None:
        summed = (h + residual.to(dtype)).to(x.dtype)
        h = summed.to(dtype)
    normed = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(x.dtype)
    return normed if residual is None else (normed, summed)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate each head by its row's position: feature i pairs with i + R/2, where R = 2 * cos.shape[1].

    x [..., H, D], cos and sin [P, R/2], positions [...] below P. Features from R on pass unchanged. Returns [..., H, D].
    """
    dtype, half = wide(x), cos.shape[1]
    c, s = (table.to(dtype)[positions.long()][..., None, :] for table in (cos, sin))
    first, second = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Split rows qkv [M, (Hq + 2 Hkv) D], norm q and k per head where a weight [D] is given, rotate both, store keys and values.

    Row m's key and value go to slot slots[m] of k_cache and v_cache [S, Hkv, D], rounded once, to their dtype; a slot of -1 stores
    nothing. cos, sin, positions [M] as for `rope`. The caches change in place. Returns q [M, Hq, D] in qkv's dtype.
    """
    (_, Hkv, D), dtype = k_cache.shape, wide(qkv)
    heads = qkv.to(dtype).unflatten(-1, (-1, D))
    queries, keys, values = heads.split([heads.shape[1] - 2 * Hkv, Hkv, Hkv], dim=1)
    stored = slots >= 0
    to = slots[stored].long()
    k_cache[to] = rope(_normed(keys, k_norm, eps), cos, sin, positions)[stored].to(k_cache.dtype)
    v_cache[to] = values[stored].to(v_cache.dtype)
    return rope(_normed(queries, q_norm, eps), cos, sin, positions).to(qkv.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last axis of x [..., 2F] and up the second. Returns [..., F]."""
    gate, up = x.to(wide(x)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def embed(ids: Tensor, table: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of table [V, H] named by ids [...]. Returns [..., H] in `dtype`, the table's own by default."""
    return table[ids.long()].to(dtype or table.dtype)


def _normed(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return heads
    normed = rms_norm(heads, weight.to(heads.dtype), eps=eps)
    assert isinstance(normed, Tensor)
    return normed
