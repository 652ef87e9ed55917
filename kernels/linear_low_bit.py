"""linear over int8, int4 and fp8 weights on Triton. Meaning: reference/linear.py with activations "exact".

Status: interpreted and compiled, not yet run on hardware. Made for 1 to 32 rows of x; takes any number.

Tiling   a program = (64 outputs, up to 32 rows, chunk of the inputs). Weights are the left operand of the product and rows of x its
         columns; two warps keep every chip at the same instruction, so 1 row and 128 rows run the same products in the same order.
Split    over the inputs, by N and K alone (`split`). Each chunk leaves its sums in f32, and `_join` adds them in order, without
         atomics: what a row comes out as depends neither on the other rows nor on the schedule.
Words    the canonical codes are read as they lie, `planes` codes to a word; so are as many inputs of x. Code p of every word times
         input p of every word is one product, which takes no shuffles: only the order of additions differs.
Numbers  a code becomes a 16-bit float by its bits alone, exactly. With zero points, (code - zero) is rounded to x's dtype. A scale
         multiplies the f32 sum of the inputs that share it, and rounds no weight.
Traffic  the weight once, from the L2 cache again for every 32 rows beyond the first; 8 M N bytes of sums a chunk, which fit that cache.
"""

import triton
import triton.language as tl

ROWS = 64  # outputs of one program
STEP = 64  # inputs of a step: 16 words of four, the shortest product. Two groups of 32 share one
PROGRAMS = 1024  # enough to fill a large chip, eight an SM; a constant, so that every chip splits alike
SHORTEST, MOST = 512, 16  # inputs of a chunk at least, chunks at most


@triton.jit
def _number(code, KIND: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr):
    """Codes in int16 -> their values in HALF, bfloat16 or float16, exactly; for int4 less 8, where no zero point is subtracted later."""
    if KIND == "int4":
        if HALF == tl.bfloat16:
            value = (code | 0x4300).to(HALF, bitcast=True) - (128.0 if ZERO else 136.0)  # 0x4300: 128, whose last bit is worth 1
        else:
            value = (code | 0x6400).to(HALF, bitcast=True) - (1024.0 if ZERO else 1032.0)
    elif KIND == "int8":
        if HALF == tl.bfloat16:  # 128 + the low bits, less 128 or, with the sign bit, 256
            value = ((code & 0x7F) | 0x4300).to(HALF, bitcast=True) - ((code & 0x80) | 0x4300).to(HALF, bitcast=True)
        else:
            value = ((code ^ 0x80) | 0x6400).to(HALF, bitcast=True) - 1152.0
    else:  # e4m3: its bits in place of the wider type's are the value over a power of two; its one NaN is no number there
        size, sign = code & 0x7F, (code & 0x80) << 8
        if HALF == tl.bfloat16:
            value = (sign | (size << 4)).to(HALF, bitcast=True) * 1.329227995784916e36
        else:
            value = (sign | (size << 7)).to(HALF, bitcast=True) * 256.0
        value = tl.where(size == 0x7F, float("nan"), value)
    return value


@triton.jit
def _finish(
    y, n, m, live, bias, residual, out, residual_stride, out_stride, BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """Epilogue of the sums y of the outputs n and rows m, int64 and shaped to broadcast against each other; the one rounding."""
    if BIAS:
        y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    if RESIDUAL:
        y += tl.load(residual + m * residual_stride + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + n, y.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def _linear_low_bit(
    x, codes, scale, zero, part, bias, residual, out,
    x_stride, codes_stride, scale_stride, zero_stride, residual_stride, out_stride, M, N, W, chunk,
    WORK: tl.constexpr,  # dtype of the products: x's
    KIND: tl.constexpr,  # "int8", "int4" or "fp8"
    PLANES: tl.constexpr,  # codes of a word, and inputs of a word of x
    ZERO: tl.constexpr,  # codes count from a stored zero
    GROUP: tl.constexpr,  # inputs that share a scale; 0: the whole row
    GROUPS: tl.constexpr,  # groups of a step, 1 or 2
    LINES: tl.constexpr,  # outputs that share a scale
    EVEN: tl.constexpr,  # steps are whole, and no word is masked
    SPLIT: tl.constexpr,  # sums go to `part`, and `_join` finishes
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,  # outputs of one program
    TOKENS: tl.constexpr,  # rows of x of one program
    TILE: tl.constexpr,  # words of a step
):  # fmt: skip
    BITS: tl.constexpr = 4 if KIND == "int4" else 8
    HALF: tl.constexpr = tl.float16 if WORK == tl.float16 else tl.bfloat16
    WIDTH: tl.constexpr = WORK.primitive_bitwidth
    blocks = tl.cdiv(M, TOKENS)
    n = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    row, token = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)  # the last one again, and not stored
    j = tl.arange(0, TILE)
    codes_at = codes + row[:, None] * codes_stride + j[None, :]
    x_at = x + token[:, None] * x_stride + j[None, :]
    scale_at = scale + row // LINES * scale_stride
    zero_at = zero + row * zero_stride
    first = tl.program_id(1) * chunk
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for c in range(first, tl.minimum(first + chunk, W), TILE):
        inside = (c + j < W)[None, :]
        words = tl.load(codes_at + c) if EVEN else tl.load(codes_at + c, mask=inside, other=0)
        for g in tl.static_range(GROUPS):  # a group's product has zeros for the inputs of the others
            mine = inside & (j // (TILE // GROUPS) == g)[None, :]
            inputs = tl.load(x_at + c) if EVEN and GROUPS == 1 else tl.load(x_at + c, mask=mine, other=0)
            sums = tl.zeros([ROWS, TOKENS], tl.float32) if GROUP > 0 else acc
            at = tl.minimum(c + g * (TILE // GROUPS), W - 1) * PLANES // GROUP if GROUP > 0 else 0
            for p in tl.static_range(PLANES):
                code = (words.to(tl.int16) >> (BITS * p)) & ((1 << BITS) - 1)
                w = _number(code, KIND, ZERO, HALF)
                if ZERO:
                    w = w.to(tl.float32) - tl.load(zero_at + at).to(tl.float32)[:, None]
                y = inputs
                if PLANES > 1:
                    y = (inputs >> (WIDTH * p)).to(tl.int16 if WIDTH == 16 else tl.int32).to(WORK, bitcast=True)
                sums = tl.dot(w.to(WORK), tl.trans(y), sums, input_precision="ieee")
            acc = acc + sums * tl.load(scale_at + at).to(tl.float32)[:, None] if GROUP > 0 else sums
    if GROUP == 0:
        acc *= tl.load(scale_at).to(tl.float32)[:, None]
    live = (n < N)[:, None] & (m < M)[None, :]
    n, m = n.to(tl.int64)[:, None], m.to(tl.int64)[None, :]
    if SPLIT:
        tl.store(part + (tl.program_id(1).to(tl.int64) * M + m) * N + n, acc, mask=live)
    else:
        _finish(acc, n, m, live, bias, residual, out, residual_stride, out_stride, BIAS, SILU, RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _join(
    part, bias, residual, out, residual_stride, out_stride, M, N,
    CHUNKS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,  # outputs of one program
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    y = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHUNKS):
        y += tl.load(part + (c * M + m) * N + n, mask=live, other=0.0)
    _finish(y, n, m, live, bias, residual, out, residual_stride, out_stride, BIAS, SILU, RESIDUAL)


@triton.jit
def _reorder(
    x, perm, out, x_stride, K,
    BLOCK: tl.constexpr,  # columns of one program
):  # fmt: skip
    m, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(perm + j, mask=j < K, other=0)
    known = (k >= 0) & (k < K)  # an input that does not exist reads nothing and gives NaN
    tl.store(out + m * K + j, tl.load(x + m * x_stride + k, mask=(j < K) & known, other=float("nan")), mask=j < K)


def reorder(x, perm, out):
    """out [M, K], dense = the columns of x [M, K] that perm [K] names."""
    M, K = x.shape
    _reorder[(M, triton.cdiv(K, 1024))](x, perm, out, x.stride(0), K, BLOCK=1024, num_warps=4)


def planes_of(kind, K, itemsize):
    """How many codes, and inputs of x of so many bytes, one word holds: 1, 2 or 4. A word of x is 8 bytes at most.

    Rows of bytes that are not whole vectors of words are loaded byte by byte.
    """
    if kind != "int4":
        return 1 if K % 32 else 2
    return 4 if itemsize == 2 else 2


def split(N, K):
    """Inputs of a chunk, whole steps: as many chunks as give PROGRAMS programs, within bounds. A function of the weight alone."""
    chunks = min(triton.cdiv(PROGRAMS, triton.cdiv(N, ROWS)), K // SHORTEST, MOST)
    return triton.cdiv(triton.cdiv(K, STEP), max(chunks, 1)) * STEP


def config(M, itemsize):
    """(TOKENS, warps, stages) of M rows of x. Two warps: Hopper and Blackwell then multiply as the older chips do, at every M."""
    if itemsize == 4:
        return 16, 8, 2
    return (16 if M <= 16 else 32), 2, 4


def linear_low_bit(x, codes, scale, zero, kind, group, planes, bias, silu, residual, out, work, scratch):
    """out [M, N] = act(x W^T + bias) + residual; x [M, W] and codes [N, W] are words of `planes`; scratch(shape, dtype) makes a buffer."""
    (M, N), W = out.shape, x.shape[1]
    type, itemsize = {"torch.bfloat16": (tl.bfloat16, 2), "torch.float16": (tl.float16, 2), "torch.float32": (tl.float32, 4)}[str(work)]
    tokens, warps, stages = config(M, itemsize)
    chunk, tile = split(N, W * planes), min(STEP // planes, 32)  # 64 single bytes would not fit the registers
    chunks = triton.cdiv(W * planes, chunk)
    part = scratch((chunks, M, N), "f32") if chunks > 1 else out
    epilogue = {"BIAS": bias is not None, "SILU": silu, "RESIDUAL": residual is not None}
    bias, residual = out if bias is None else bias, out if residual is None else residual
    _linear_low_bit[(triton.cdiv(N, ROWS) * triton.cdiv(M, tokens), chunks)](
        x, codes, scale, scale if zero is None else zero, part, bias, residual, out,
        x.stride(0), codes.stride(0), scale.stride(0), 0 if zero is None else zero.stride(0), residual.stride(0), out.stride(0),
        M, N, W, chunk // planes,
        WORK=type, KIND=kind, PLANES=planes, ZERO=zero is not None, GROUP=group, GROUPS=2 if group == 32 else 1,
        LINES=group if kind == "fp8" and group else 1, EVEN=W % tile == 0, SPLIT=chunks > 1, **epilogue,
        ROWS=ROWS, TOKENS=tokens, TILE=tile, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if chunks > 1:
        _join[(M, triton.cdiv(N, 256))](
            part, bias, residual, out, residual.stride(0), out.stride(0), M, N, CHUNKS=chunks, **epilogue, BLOCK=256, num_warps=4
        )
