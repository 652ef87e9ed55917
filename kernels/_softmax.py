"""What the attention kernels share: tiles of rows, the running softmax over an integral reference, ancestor counts."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-3.4028234663852886e38)  # the softmax reference of a row that has seen no key yet: the lowest number


@triton.jit
def power2(i):
    """2^i for integral f32 i up to 127, exactly, by its exponent bits; 0 below the normal numbers."""
    return ((tl.minimum(tl.maximum(i, -127.0), 127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def counted(at, most):
    """The length at `at`, held to 0..most: it is data on a device, which no check has seen."""
    return tl.minimum(tl.maximum(tl.load(at), 0), most)


@triton.jit
def load_tile(rows, d, live, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of D values at the pointers `rows`, [len(rows), BLOCK]; zeros beyond D and, with MASKED, where not live."""
    at = rows[:, None] + d[None, :]
    if MASKED:
        return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if D < BLOCK:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def again(rows, at, d, live, D: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr):
    """`rows`, which lie at the pointers `at`; with AGAIN read once more, so that no compiler holds them in registers across a loop."""
    if AGAIN:
        rows = tl.load(at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0, volatile=True).to(rows.dtype)
    return rows


@triton.jit
def step(q, keys, values, seen, m, mass, acc, scale, MASKED: tl.constexpr):
    """Add a tile of keys to the running softmax of q's rows: reference m, sum of weights mass, weighted values acc.

    scale turns scores into log2 units. seen [rows, keys] is looked at only with MASKED. The largest weight is at least a half, so mass
    is 0 exactly when no key was seen; a score that is NaN or infinite makes mass and acc NaN, whatever the reference does then.
    """
    s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    whole = tl.floor(s)
    top = tl.max(tl.where(seen, whole, NOTHING), 1) if MASKED else tl.max(whole, 1)
    new = tl.maximum(m, top + 1.0)  # nothing + 1 is nothing
    p = tl.exp2(s - whole) * power2(whole - new[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    shrink = power2(m - new)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new, mass * shrink + tl.sum(p, 1), acc


@triton.jit
def join(m, mass, acc, each, sums, o):
    """Add the partial softmaxes of some rows, o [rows, parts, BLOCK] with references `each` and sums [rows, parts], to (m, mass, acc)."""
    new = tl.maximum(m, tl.max(each, 1))
    share, shrink = power2(each - new[:, None]), power2(m - new)
    acc = acc * shrink[:, None] + tl.sum(o * share[:, :, None], 1)
    return new, mass * shrink + tl.sum(sums * share, 1), acc


@triton.jit
def positions_seen(words_at, live, words):
    """How many rows each row sees, itself included: the bits set in its ancestor words."""
    seen = tl.zeros(words_at.shape, tl.int64)
    for w in range(words):
        x = tl.load(words_at + w, mask=live, other=0)
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        seen += ((x * 0x0101010101010101) >> 56) & 0xFF
    return seen.to(tl.int32)
