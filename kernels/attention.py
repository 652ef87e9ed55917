"""tree_attention on Triton. Meaning: reference/attention.py. Status: interpreted and compiled, not yet run on hardware.

Tiling   a program = (sequence, KV head, block of the T * Hq/Hkv rows that share that head, chunk of keys). The committed prefix
         is cut at fixed multiples of `chunk` positions, the tree's own rows are one chunk more, and `_join` adds the partial
         results in order, without atomics.
Schedule the grid covers the cache's capacity and lengths are read on the device, where chunks beyond them return at once: no plan
         on the host, no synchronisation, safe in a CUDA graph.
Masks    whole tiles of the prefix run without mask code; only the tail reads ancestor words, one int64 per row and 64 keys.
Outside  lengths are held to their tensors; slots of a page that does not exist are not read: zeros stand for them, as on CUDA.
Softmax  in log2 units over an integral reference m: a weight is 2^frac(s) * 2^(floor(s) - m), so moving the reference is exact and
         neither tiles nor chunks show in a weight (row invariance; the sums inside one tl.dot are the hardware's).
Traffic  2 * D * itemsize bytes a key and block of rows; partials: 4 * D bytes a row and chunk, at most a quarter of a bf16 cache.
"""

import triton
import triton.language as tl
from triton.runtime.driver import driver

from ramify.kernels._softmax import NOTHING, again, counted, join, load_tile, positions_seen, step

LOG2E = 1.4426950408889634
REGISTERS = 255  # a thread may take: left alone, ptxas spills a few bytes where that fits one more block on an SM
FUSED, LINES = 8, 4  # chunks that `_join` adds at a time, and its rows a program


@triton.jit(do_not_specialize=["T", "words", "slots", "pages", "window", "sink"])
def _tree_attention(
    q, k, v, tail_k, tail_v, ancestors, prefix_len, tail_rows, page_table, part, stats,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    tk_stride_b, tk_stride_t, tk_stride_h, tv_stride_b, tv_stride_t, tv_stride_h, word_stride_b, word_stride_t, table_stride,
    T, words, slots, pages, chunk, splits, group, window, sink, scale,
    D: tl.constexpr,  # head size
    WORK: tl.constexpr,  # dtype of both products' operands
    USED: tl.constexpr,  # tail_rows is given, else all T rows are in use
    WINDOW: tl.constexpr,  # a window is on
    PAGE: tl.constexpr,  # slots of a page; 0: no pages
    ROWS: tl.constexpr,  # packed rows of one program
    KEYS: tl.constexpr,  # keys of a tile; divides 64
    AGAIN: tl.constexpr,  # rows are read again for every tile
    BLOCK: tl.constexpr,  # D, rounded up to a power of two
):  # fmt: skip
    blocks = tl.cdiv(T * group, ROWS)
    c, h, b = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = counted(prefix_len + b, slots)
    used = T
    if USED:
        used = counted(tail_rows + b, T)
    first_row = tl.program_id(0) % blocks * ROWS
    tail = c == splits - 1
    if first_row >= used * group:
        return
    if (c * chunk >= n) & (c < splits - 1):
        return

    r = first_row + tl.arange(0, ROWS)
    d, j = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    t = r // group
    live = t < used
    row_at = q + b * q_stride_b + t.to(tl.int64) * q_stride_t + (h * group + r % group) * q_stride_h
    rows = load_tile(row_at, d, live, D, BLOCK, True).to(WORK)
    word_at = ancestors + b * word_stride_b + t.to(tl.int64) * word_stride_t
    m = tl.full([ROWS], NOTHING, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)

    begin, end, own = c * chunk, tl.minimum((c + 1) * chunk, n), 0
    if tail:
        begin, end, own = 0, 0, used
    middle = begin + (end - begin) // KEYS * KEYS  # whole tiles end here; under a window, the sink does
    rest, start = middle, tl.zeros([ROWS], tl.int32)
    if WINDOW:
        depth = positions_seen(word_at, live, words)
        start = tl.maximum(n + depth - window, 0)  # first position inside a row's window
        lowest = tl.min(tl.where(live, start, 0x7FFFFFFF), 0)
        middle = tl.minimum(tl.maximum(begin, sink), end)
        rest = tl.minimum(tl.maximum(middle, lowest), end)
    for lo in range(begin, middle, KEYS):
        at = lo + j
        inside = at < middle  # of a whole tile all are, and neither this nor `seen` is looked at
        page, slot, there = _place_of(at, inside, b, page_table + b * table_stride, pages, PAGE)
        keys = load_tile(k + page * k_stride_b + slot * k_stride_s + h * k_stride_h, d, there, D, BLOCK, WINDOW or PAGE > 0)
        values = load_tile(v + page * v_stride_b + slot * v_stride_s + h * v_stride_h, d, there, D, BLOCK, WINDOW or PAGE > 0)
        seen = inside[None, :] & live[:, None]
        rows = again(rows, row_at, d, live, D, BLOCK, AGAIN)
        m, mass, acc = step(rows, keys.to(WORK), values.to(WORK), seen, m, mass, acc, scale, WINDOW)
    for lo in range(rest, end, KEYS):
        at = lo + j
        page, slot, there = _place_of(at, at < end, b, page_table + b * table_stride, pages, PAGE)
        keys = load_tile(k + page * k_stride_b + slot * k_stride_s + h * k_stride_h, d, there, D, BLOCK, True)
        values = load_tile(v + page * v_stride_b + slot * v_stride_s + h * v_stride_h, d, there, D, BLOCK, True)
        seen = (at[None, :] < end) & (at[None, :] >= start[:, None])
        rows = again(rows, row_at, d, live, D, BLOCK, AGAIN)
        m, mass, acc = step(rows, keys.to(WORK), values.to(WORK), seen, m, mass, acc, scale, True)
    for lo in range(0, own, KEYS):
        at = lo + j
        keys = load_tile(tail_k + b * tk_stride_b + h * tk_stride_h + at.to(tl.int64) * tk_stride_t, d, at < own, D, BLOCK, True)
        values = load_tile(tail_v + b * tv_stride_b + h * tv_stride_h + at.to(tl.int64) * tv_stride_t, d, at < own, D, BLOCK, True)
        word = tl.load(word_at + lo // 64, mask=live, other=0)
        seen = ((word[:, None] >> (at % 64).to(tl.int64)[None, :]) & 1) != 0
        if WINDOW:
            key_at = n + positions_seen(ancestors + b * word_stride_b + at.to(tl.int64) * word_stride_t, at < own, words) - 1
            seen = seen & ((key_at[None, :] >= start[:, None]) | (key_at[None, :] < sink))
        rows = again(rows, row_at, d, live, D, BLOCK, AGAIN)
        m, mass, acc = step(rows, keys.to(WORK), values.to(WORK), seen & (at[None, :] < own), m, mass, acc, scale, True)

    row = ((c * tl.num_programs(2) + b) * tl.num_programs(1) + h) * (T * group) + r
    mine = r < T * group
    tl.store(stats + 2 * row, m, mask=mine)
    tl.store(stats + 2 * row + 1, mass, mask=mine)
    tl.store(part + row[:, None] * D + d[None, :], acc, mask=mine[:, None] & (d < D)[None, :])


@triton.jit
def _place_of(at, live, b, table, pages, PAGE: tl.constexpr):
    """(page, or sequence b without pages; slot in it), int64, of the positions `at`; whether one is live and its page exists."""
    page, slot = b, at.to(tl.int64)
    if PAGE > 0:
        page, slot = tl.load(table + at // PAGE, mask=live, other=0).to(tl.int64), (at % PAGE).to(tl.int64)
        live = live & (page >= 0) & (page < pages)
    return page, slot, live


@triton.jit(do_not_specialize=["T", "slots"])
def _join(
    part, stats, prefix_len, tail_rows, out, lse, out_stride_b, out_stride_t, out_stride_h, lse_stride_b, lse_stride_t,
    T, slots, chunk, splits, group,
    D: tl.constexpr,
    USED: tl.constexpr,
    FUSED: tl.constexpr,  # chunks that are added at a time; fixed, so that the order of additions is
    LINES: tl.constexpr,  # packed rows of one program
    BLOCK: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = counted(prefix_len + b, slots)
    used = T
    if USED:
        used = counted(tail_rows + b, T)
    r = tl.program_id(0) * LINES + tl.arange(0, LINES)
    t, d, i = r // group, tl.arange(0, BLOCK), tl.arange(0, FUSED)
    m, mass, acc = tl.full([LINES], NOTHING, tl.float32), tl.zeros([LINES], tl.float32), tl.zeros([LINES, BLOCK], tl.float32)
    chunks = tl.cdiv(n, chunk)
    for first in range(0, chunks + 1, FUSED):
        c = tl.where(first + i == chunks, splits - 1, first + i)  # the tail is the last to be added
        live = (t < used)[:, None] & (first + i <= chunks)[None, :]
        row = ((c * tl.num_programs(2) + b) * tl.num_programs(1) + h)[None, :] * (T * group) + r[:, None]
        each = tl.load(stats + 2 * row, mask=live, other=NOTHING)
        sums = tl.load(stats + 2 * row + 1, mask=live, other=0.0)
        o = tl.load(part + row[:, :, None] * D + d[None, None, :], mask=live[:, :, None] & (d < D)[None, None, :], other=0.0)
        m, mass, acc = join(m, mass, acc, each, sums, o)
    seen, mine = mass != 0, r < T * group
    mass = tl.where(seen, mass, 1.0)
    to = out + b * out_stride_b + t.to(tl.int64) * out_stride_t + (h * group + r % group) * out_stride_h
    tl.store(to[:, None] + d[None, :], (acc / mass[:, None]).to(out.dtype.element_ty), mask=mine[:, None] & (d < D)[None, :])
    total = tl.where(seen, (m + tl.log2(mass)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + b * lse_stride_b + t.to(tl.int64) * lse_stride_t + h * group + r % group, total, mask=mine)


def arch():
    """The current GPU as a number: 90 for sm_90, which the interpreter plays."""
    return 90 if triton.knobs.runtime.interpret else driver.active.get_current_target().arch


def config(rows, D, itemsize, masked=False):
    """(ROWS, KEYS, warps, stages) of packed rows a KV head, head size and bytes of an operand; masked: most tiles need a mask.

    A tile of keys is 16 KiB at most (64 keys: the bits of one ancestor word), so that three stages of K and V fit the 99 KiB of the
    smallest chips. Hopper and Blackwell's data-centre chips multiply 64 rows with four warps; the others keep the accumulators of 64 rows
    in eight warps, or they spill, and so they would with a whole tile of keys that need a mask. Read from the compiler for every row of
    this table; to be timed on each chip.
    """
    keys = min(64, 16384 // (triton.next_power_of_2(D) * itemsize))
    if itemsize == 4:
        return 16, max(keys // 2, 16), 8, 1 if masked and D > 128 else 2
    if rows <= 32:
        return (16 if rows <= 16 else 32), keys, 4, 3
    if arch() // 10 in (9, 10):
        if D > 128:
            return 64, min(keys, 16 if masked else 64), 8, 3
        return (64, keys, 8, 3) if masked else (64, keys, 4, 3) if rows <= 64 else (128, keys, 8, 3)
    return 64, min(keys, 16 if D > 128 else 32 if masked else 64), 8, 3


def again_of(D, itemsize):
    """Whether a program reads its rows again for every tile: f32 rows of more than 128 features, held, are 256 registers a thread."""
    return itemsize == 4 and D > 128


def work_type(q, k):
    """(dtype of the operands of both products, its bytes): two 16-bit kinds, or 16 and 32 bits, meet in f32."""
    kinds = {"torch.bfloat16": (tl.bfloat16, 2), "torch.float16": (tl.float16, 2)}
    return kinds.get(str(q.dtype), (tl.float32, 4)) if q.dtype == k.dtype else (tl.float32, 4)


def chunk_of(rows):
    """Positions of a chunk: four times the packed rows, so that partial results stay a fraction of the cache; 256 at least."""
    return max(256, triton.next_power_of_2(4 * rows))


def tree_attention(q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table, scale, window, sink, tail_rows, out, lse, scratch):
    """out [B, T, Hq, D] in q's dtype and lse f32 [B, T, Hq]; scratch(shape, dtype) makes a buffer."""
    (B, T, Hq, D), Hkv = q.shape, tail_k.shape[2]
    group, paged = Hq // Hkv, page_table is not None
    slots = k.shape[1] * page_table.shape[1] if paged else k.shape[1]
    kind, itemsize = work_type(q, k)
    rows, keys, warps, stages = config(T * group, D, itemsize, window > 0)
    chunk = chunk_of(T * group)
    splits = triton.cdiv(slots, chunk) + 1
    part, stats = scratch((splits, B, Hkv, T * group, D), "f32"), scratch((splits, B, Hkv, T * group, 2), "f32")
    used = prefix_len if tail_rows is None else tail_rows
    block = triton.next_power_of_2(D)
    _tree_attention[(splits * triton.cdiv(T * group, rows), Hkv, B)](
        q, k, v, tail_k, tail_v, ancestors, prefix_len, used, page_table if paged else prefix_len, part, stats,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *tail_k.stride()[:3], *tail_v.stride()[:3], *ancestors.stride()[:2],
        page_table.stride(0) if paged else 0, T, ancestors.shape[2], slots, k.shape[0], chunk, splits, group, window, sink, scale * LOG2E,
        D=D, WORK=kind, USED=tail_rows is not None, WINDOW=window > 0, PAGE=k.shape[1] if paged else 0,
        ROWS=rows, KEYS=keys, AGAIN=again_of(D, itemsize), BLOCK=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _join[(triton.cdiv(T * group, LINES), Hkv, B)](
        part, stats, prefix_len, used, out, lse, *out.stride()[:3], *lse.stride()[:2], T, slots, chunk, splits, group,
        D=D, USED=tail_rows is not None, FUSED=FUSED, LINES=LINES, BLOCK=block, num_warps=4,
    )  # fmt: skip
