"""rms_norm, rope, silu_mul and embed on Triton. Meaning: reference/glue.py. Status: interpreted and compiled, not yet run on hardware.

All are bound by memory: every element is read once and written once, arithmetic in f32. One program owns whole rows (or heads),
so a row's bits never depend on its neighbours.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["eps"])
def _rms_norm(
    x, weight, residual, out, summed, x_stride, residual_stride, out_stride, summed_stride, H, eps,
    ADD: tl.constexpr,  # norm x + residual, and store the sum
    BLOCK: tl.constexpr,  # columns of the one tile that holds a row; a power of two
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = col < H
    h = tl.load(x + r * x_stride + col, mask=live, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + r * residual_stride + col, mask=live, other=0.0).to(tl.float32)
        h = h.to(summed.dtype.element_ty)  # rounded before it is normed, as a model that stores it does
        tl.store(summed + r * summed_stride + col, h, mask=live)
        h = h.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / H + eps)
    w = tl.load(weight + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + r * out_stride + col, (h * scale * w).to(out.dtype.element_ty), mask=live)


@triton.jit
def _rope(
    x, cos, sin, positions, out, x_stride_t, x_stride_h, out_stride_t, out_stride_h, table_stride, heads, half, D,
    HEADS: tl.constexpr,  # heads of one program
    HALF: tl.constexpr,  # half the turned features, rounded up to a power of two
    REST: tl.constexpr,  # features that pass unchanged, rounded up; 0: none
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, HALF)[None, :]
    live = (h < heads) & (col < half)
    position = tl.load(positions + t).to(tl.int64)
    c = tl.load(cos + position * table_stride + col, mask=col < half, other=0.0)
    s = tl.load(sin + position * table_stride + col, mask=col < half, other=0.0)
    from_x, to_out = x + t * x_stride_t + h * x_stride_h, out + t * out_stride_t + h * out_stride_h
    first = tl.load(from_x + col, mask=live, other=0.0).to(tl.float32)
    second = tl.load(from_x + half + col, mask=live, other=0.0).to(tl.float32)
    tl.store(to_out + col, (first * c - second * s).to(out.dtype.element_ty), mask=live)
    tl.store(to_out + half + col, (second * c + first * s).to(out.dtype.element_ty), mask=live)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        kept = (h < heads) & (rest < D)
        tl.store(to_out + rest, tl.load(from_x + rest, mask=kept), mask=kept)


@triton.jit
def _silu_mul(
    x, out, x_stride, out_stride, F,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < F
    gate = tl.load(x + r * x_stride + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + r * x_stride + F + col, mask=live, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))  # a large negative gate divides by infinity: 0, as it should be
    tl.store(out + r * out_stride + col, (silu * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def _embed(
    ids, table, out, table_stride, out_stride, V, H,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + r).to(tl.int64)
    known = (row >= 0) & (row < V)  # an id outside the table reads nothing and gives NaN
    x = tl.load(table + row * table_stride + col, mask=known & (col < H), other=float("nan"))
    tl.store(out + r * out_stride + col, x.to(out.dtype.element_ty), mask=col < H)


def rms_norm(x, weight, residual, out, summed, eps):
    """out = normed rows of x [M, H]; with a residual, of x + residual, which goes to summed."""
    M, H = x.shape
    block = triton.next_power_of_2(H)
    add = residual is not None
    other, total = (residual, summed) if add else (x, out)
    _rms_norm[(M,)](
        x, weight, other, out, total, x.stride(0), other.stride(0), out.stride(0), total.stride(0), H, eps,
        ADD=add, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


def rope(x, cos, sin, positions, out):
    """out [M, H, D] = heads of x turned by their row's position [M]."""
    (M, heads, D), half = x.shape, cos.shape[1]
    tile = min(triton.next_power_of_2(heads), 8)
    rest = D - 2 * half
    _rope[(M, triton.cdiv(heads, tile))](
        x, cos, sin, positions, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0), heads, half, D,
        HEADS=tile, HALF=triton.next_power_of_2(max(half, 1)), REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip


def silu_mul(x, out):
    """out [M, F] = silu(gate) * up of x [M, 2F]."""
    M, F = out.shape
    _silu_mul[(M, triton.cdiv(F, 1024))](x, out, x.stride(0), out.stride(0), F, BLOCK=1024, num_warps=4)


def embed(ids, table, out):
    """out [M, H] = the rows of table [V, H] that ids [M] name."""
    (V, H), M = table.shape, ids.shape[0]
    _embed[(M, triton.cdiv(H, 1024))](ids, table, out, table.stride(0), out.stride(0), V, H, BLOCK=1024, num_warps=4)
