"""From tensors to the argument structs of the CPU kernels (csrc/common/args.h).

The f32 kernels of glue and linear take rows; other dtypes and layouts are brought into that form here, row by row, so that it
cannot matter which other rows a call holds. Checked tensors only: below this line a wrong number is a wrong address.
"""

from ctypes import Structure, addressof, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from ramify.backends import native
from ramify.ops._memory import crosses, ids32
from ramify.quant.formats import Format
from ramify.quant.packing import pack_panels

Outputs = tuple[Tensor, ...]


def linear(outs: Outputs, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    """activation(x W^T + bias) + residual; the weight is packed first."""
    linear_packed(outs, x, native().pack_weight(weight), weight.shape[0], bias, activation, residual)


def linear_packed(
    outs: Outputs, x: Tensor, panels: Tensor, N: int, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
    """The same on a weight that is packed already."""
    n = native()
    args = n.LinearArgs(N=N, weight=panels.data_ptr(), dtype=n.DTYPES[panels.dtype])
    _run_linear(outs[0], args, x, bias, activation, residual)


def linear_low_bit(
    outs: Outputs,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    panels: Tensor | None,
    form: str,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    activations: str,
) -> None:
    """The same on a low-bit weight; it is packed first where `panels` does not hold it yet."""
    n, f = native(), Format.parse(form)
    if panels is None:
        panels = pack_panels(f, codes, scale, zero)
    if perm is not None:
        perm = perm.contiguous()
        if int(perm.min()) < 0 or int(perm.max()) >= x.shape[-1]:  # the kernel reads x at these places
            raise ValueError(f"linear: perm holds {int(perm.min())} to {int(perm.max())}; takes 0 to {x.shape[-1] - 1}.")
    args = n.LinearLowBitArgs(N=codes.shape[0], weight=panels.data_ptr(), dtype=n.LOW_BIT[f.kind], group=f.group)
    args.scale_dtype, args.zeros, args.perm = n.DTYPES[scale.dtype], zero is not None, n.pointer(perm)
    args.activations = n.ACTIVATIONS[activations]
    _run_linear(outs[0], args, x, bias, activation, residual)


def _run_linear(out: Tensor, args: Structure, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    n = native()
    x, target = _rows(x), _target(out)
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else _rows(residual)
    rows = c_int32(x.shape[0])
    args.rows, args.x, args.x_stride, args.K = addressof(rows), x.data_ptr(), x.stride(0), x.shape[1]
    args.prologue, args.activation, args.bias = n.COPY, n.SILU if activation == "silu" else n.NO_ACTIVATION, n.pointer(bias)
    if residual is not None:
        args.residual, args.residual_stride = residual.data_ptr(), residual.stride(0)
    args.out, args.out_stride = target.data_ptr(), target.stride(0)
    _run_with_scratch(args)
    _store(target, out)


def rms_norm(outs: Outputs, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> None:
    """Normed rows into outs[0]; with a residual, x + residual into outs[1]."""
    n = native()
    if residual is not None:
        # Added here, not in the kernel: the sum is rounded to its dtype before it is normed, and is never read unrounded.
        x = torch.add(x, residual, out=outs[1])
    x, weight, out = _rows(x), weight.float().contiguous(), _target(outs[0])
    rows = c_int32(x.shape[0])
    args = n.RmsNormArgs(rows=addressof(rows), x=x.data_ptr(), x_stride=x.stride(0), hidden=x.shape[1], weight=weight.data_ptr(), eps=eps)
    args.out, args.out_stride = out.data_ptr(), out.stride(0)
    n.run(args)
    _store(out, outs[0])


def rope(outs: Outputs, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """x [..., H, D] rotated into outs[0]."""
    n = native()
    heads, D = x.shape[-2:]
    x = x.reshape(-1, heads, D).float()
    cos, sin, positions, out = cos.contiguous(), sin.contiguous(), positions.reshape(-1).int(), _target(outs[0])
    rows = c_int32(x.shape[0])
    args = n.RopeArgs(rows=addressof(rows), x=x.data_ptr(), x_stride_t=x.stride(0), x_stride_h=x.stride(1), H=heads, D=D)
    args.cos, args.sin, args.position = cos.data_ptr(), sin.data_ptr(), positions.data_ptr()
    args.out, args.out_stride_t, args.out_stride_h = out.data_ptr(), heads * D, D
    n.run(args)
    _store(out, outs[0])


def rope_append(
    q: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, k: Tensor, v: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Rotated queries into q [M, Hq, D], keys and values into slots of k and v [S, Hkv, D]."""
    n = native()
    (M, Hq, D), Hkv = q.shape, k.shape[1]
    qkv = qkv.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # the kernel rotates in place
    cos, sin, positions, slots = cos.contiguous(), sin.contiguous(), positions.int().contiguous(), slots.contiguous()
    q_norm, k_norm = (None if norm is None else norm.float().contiguous() for norm in (q_norm, k_norm))
    rows = c_int32(M)
    args = n.RopeAppendArgs(rows=addressof(rows), qkv=qkv.data_ptr(), stride=qkv.stride(0), Hq=Hq, Hkv=Hkv, D=D, eps=eps, plain=1)
    args.q_norm, args.k_norm = n.pointer(q_norm), n.pointer(k_norm)
    args.cos, args.sin, args.position, args.draft_slot = cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), slots.data_ptr()
    args.kv_dtype, args.k, args.v = n.DTYPES[k.dtype], k.data_ptr(), v.data_ptr()
    args.k_stride_s, args.k_stride_h, args.v_stride_s, args.v_stride_h = *k.stride()[:2], *v.stride()[:2]
    n.run(args)
    q.copy_(qkv[:, : Hq * D].view(M, Hq, D))


def silu_mul(outs: Outputs, x: Tensor) -> None:
    """silu(gate) * up of rows that hold both."""
    n = native()
    x, out = _rows(x), _target(outs[0])
    rows = c_int32(x.shape[0])
    args = n.SiluMulArgs(rows=addressof(rows), x=x.data_ptr(), x_stride=x.stride(0), K=x.shape[1] // 2)
    args.out, args.out_stride = out.data_ptr(), out.stride(0)
    n.run(args)
    _store(out, outs[0])


def embed(outs: Outputs, ids: Tensor, table: Tensor) -> None:
    """Rows of the table, widened."""
    n = native()
    ids, table, out = ids.reshape(-1).int(), table.contiguous(), _target(outs[0])
    rows = c_int32(ids.shape[0])
    args = n.EmbedArgs(rows=addressof(rows), tokens=ids.data_ptr(), table=table.data_ptr(), dtype=n.DTYPES[table.dtype])
    args.V, args.hidden = table.shape
    args.out, args.out_stride = out.data_ptr(), out.stride(0)
    n.run(args)
    _store(out, outs[0])


def row_stats(outs: Outputs, logits: Tensor) -> None:
    """Arg-max, log-sum-exp and maximum of each row."""
    _stats(logits, *outs)


def topk_logits(outs: Outputs, logits: Tensor, k: int) -> None:
    """The k largest of each row: values, ids."""
    R = logits.shape[0]
    values, ids = _f32(R, k), _i32(R, k)
    _stats(logits, _i32(R), _f32(R), _f32(R), values, ids)
    outs[0].copy_(values)
    outs[1].copy_(ids)


def tree_attention(
    outs: Outputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    ancestors: Tensor,
    prefix_len: Tensor,
    page_table: Tensor | None,
    scale: float,
    window: int,
    sink: int,
    tail_rows: Tensor | None,
) -> None:
    """o and lse, straight into the outputs; rows that are not in use are cleared."""
    n = native()
    out, lse = outs
    B, T, Hq, D = q.shape
    ancestors = ancestors.contiguous()
    depth = _i32(B, T)
    n.check_words(ancestors, tail_rows, depth)
    offset, rows = _whole_tails(B, T)
    args = n.AttentionArgs(B=B, T=T, Hq=Hq, Hkv=tail_k.shape[2], D=D, scale=scale, window=window, sink=sink)
    _place_heads(args, q, k, v, out, lse)
    args.prefix_len, args.tail_len = prefix_len.data_ptr(), (rows if tail_rows is None else tail_rows).data_ptr()
    args.ancestors, args.words = ancestors.data_ptr(), ancestors.shape[2]
    args.row_depth = args.tail_depth = depth.data_ptr()
    args.tail_offset = offset.data_ptr()
    args.plain = 1
    if page_table is not None:
        args.page_table, args.table_stride, args.page = page_table.data_ptr(), page_table.stride(0), k.shape[1]
    args.tail_k, args.tail_v = tail_k.data_ptr(), tail_v.data_ptr()
    args.tail_stride_b, args.tail_stride_t, args.tail_stride_h, _ = tail_k.stride()
    args.tail_v_stride_b, args.tail_v_stride_t, args.tail_v_stride_h, _ = tail_v.stride()
    args.max_slots = max(prefix_len.tolist()) + T
    _run_with_scratch(args)
    for b, used in enumerate(() if tail_rows is None else tail_rows.tolist()):  # afterwards: `out` may be q
        if used < T:
            out[b, used:] = 0
            lse[b, used:] = -torch.inf


@lru_cache(maxsize=64)
def _whole_tails(B: int, T: int) -> tuple[Tensor, Tensor]:
    """Where each sequence's tail begins among B * T rows, and T for each: read only."""
    return torch.arange(0, B * T, T, dtype=torch.int32, device="cpu"), torch.full((B,), T, dtype=torch.int32, device="cpu")


def interval_attention(outs: Outputs, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> None:
    """o and lse, straight into the outputs."""
    n = native()
    out, lse = outs
    B, T, Hq, D = q.shape
    start, end = start.contiguous(), end.contiguous()
    last = end.amax(1)
    args = n.AttentionArgs(B=B, T=T, Hq=Hq, Hkv=k.shape[2], D=D, scale=scale, plain=1, max_slots=int(last.max()))
    _place_heads(args, q, k, v, out, lse)
    args.prefix_len, args.start, args.end = last.data_ptr(), start.data_ptr(), end.data_ptr()
    _run_with_scratch(args)


def attention_colsum(
    outs: Outputs, q: Tensor, k: Tensor, lse: Tensor, prefix_len: Tensor, ancestors: Tensor | None, page_table: Tensor | None, scale: float,
    window: int, sink: int, tail_rows: Tensor | None,
) -> None:  # fmt: skip
    """Attention that each slot received."""
    n = native()
    (B, T, Hq, D), out = q.shape, outs[0]
    prefix_len, tail_rows = prefix_len.contiguous(), None if tail_rows is None else tail_rows.contiguous()
    args = n.ColsumArgs(B=B, T=T, Hq=Hq, Hkv=k.shape[2], D=D, slots=out.shape[2], scale=scale, window=window, sink=sink)
    args.q, args.q_dtype = q.data_ptr(), n.DTYPES[q.dtype]
    args.q_stride_b, args.q_stride_t, args.q_stride_h, _ = q.stride()
    args.k, args.kv_dtype = k.data_ptr(), n.DTYPES[k.dtype]
    args.k_stride_b, args.k_stride_s, args.k_stride_h, _ = k.stride()
    if page_table is not None:
        args.page_table, args.table_stride, args.page = page_table.data_ptr(), page_table.stride(0), k.shape[1]
    args.lse, args.lse_stride_b, args.lse_stride_t = lse.data_ptr(), *lse.stride()[:2]
    args.prefix_len, args.tail_rows = prefix_len.data_ptr(), n.pointer(tail_rows)
    depth = torch.arange(T, dtype=torch.int32, device="cpu").expand(B, T).contiguous()
    if ancestors is not None and window:
        n.check_words(ancestors.contiguous(), tail_rows, depth)
    args.depth = depth.data_ptr()
    args.out, args.out_stride_b, args.out_stride_h = out.data_ptr(), *out.stride()[:2]
    _run_with_scratch(args)


def _place_heads(args: Structure, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Addresses, kinds and strides of rows, slots and results."""
    n = native()
    args.q, args.q_dtype = q.data_ptr(), n.DTYPES[q.dtype]
    args.q_stride_b, args.q_stride_t, args.q_stride_h, _ = q.stride()
    args.out = out.data_ptr()
    args.out_stride_b, args.out_stride_t, args.out_stride_h, _ = out.stride()
    args.lse = lse.data_ptr()
    args.lse_stride_b, args.lse_stride_t, _ = lse.stride()
    args.k, args.v, args.kv_dtype = k.data_ptr(), v.data_ptr(), n.DTYPES[k.dtype]
    args.k_stride_b, args.k_stride_s, args.k_stride_h, _ = k.stride()
    args.v_stride_b, args.v_stride_s, args.v_stride_h, _ = v.stride()


def merge_states(outs: Outputs, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> None:
    """o and lse of both sides together."""
    n = native()
    D = o1.shape[-1]
    x, y, l1, l2 = o1.reshape(-1, D), o2.reshape(-1, D), lse1.reshape(-1), lse2.reshape(-1)
    l1, l2 = l1.contiguous(), l2.contiguous()
    out = outs[0].view(-1, D) if outs[0].is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    lse = outs[1].view(-1) if outs[1].is_contiguous() else torch.empty_like(l1)
    args = n.MergeArgs(rows=x.shape[0], D=D, dtype=n.DTYPES[x.dtype], o1=x.data_ptr(), o1_stride=x.stride(0), lse1=l1.data_ptr())
    args.o2, args.o2_stride, args.lse2 = y.data_ptr(), y.stride(0), l2.data_ptr()
    args.out, args.out_stride, args.lse = out.data_ptr(), out.stride(0), lse.data_ptr()
    n.run(args)
    _store(out, outs[0])
    _store(lse, outs[1])


def place(x: Tensor, cache: Tensor, path: Tensor | None, count: Tensor, length: Tensor, page_table: Tensor | None) -> None:
    """Rows of x [L, B, T, Hkv, D] into a cache [L, ..., Hkv, D] behind `length`: rows path[b, :count[b]], or the first count[b]."""
    n = native()
    x = x.clone() if crosses(x, cache) else x  # a row may not be read after its place was written
    path, count, length = None if path is None else ids32(path), count.contiguous(), length.contiguous()
    L, B, T, Hkv, D = x.shape
    args = n.PlaceArgs(L=L, B=B, A=T if path is None else path.shape[1], Hkv=Hkv, D=D, path=n.pointer(path))
    args.count, args.length = count.data_ptr(), length.data_ptr()
    args.x, args.dtype = x.data_ptr(), n.DTYPES[x.dtype]
    args.x_stride_l, args.x_stride_b, args.x_stride_t, args.x_stride_h, _ = x.stride()
    args.cache, args.cache_dtype = cache.data_ptr(), n.DTYPES[cache.dtype]
    args.cache_stride_l, args.cache_stride_b, args.cache_stride_s, args.cache_stride_h, _ = cache.stride()
    if page_table is not None:
        args.page_table, args.table_stride, args.page = page_table.data_ptr(), page_table.stride(0), cache.shape[2]
    n.run(args)


def verify_greedy(outs: Outputs, tokens: Tensor, parents: Tensor, argmax: Tensor, n_rows: Tensor) -> None:
    """path, count and bonus of the walk along arg-maxes."""
    argmax = ids32(argmax)
    _walk(outs, native().VerifyArgs(argmax=argmax.data_ptr()), tokens, parents, n_rows)


def verify_sample(
    outs: Outputs,
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    n_rows: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    q: Tensor | None,
    mode: str,
) -> None:
    """path, count and bonus of the walk by chance."""
    n = native()
    temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.long().contiguous()
    args = n.VerifyArgs(logits=logits.data_ptr(), dtype=n.DTYPES[logits.dtype], V=logits.shape[2], drawn=n.DRAWN[mode])
    args.stride_b, args.stride_t, _ = logits.stride()
    args.temperature, args.seed, args.position = temperature.data_ptr(), seed.data_ptr(), position.data_ptr()
    if q is not None:
        args.q = q.data_ptr()
        args.q_stride_b, args.q_stride_t, _ = q.stride()
    _walk(outs, args, tokens, parents, n_rows)


def _walk(outs: Outputs, args: Structure, tokens: Tensor, parents: Tensor, n_rows: Tensor) -> None:
    tokens, parents, n_rows = ids32(tokens), ids32(parents), n_rows.contiguous()
    results = [out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs]
    args.B, args.T = tokens.shape
    args.tokens, args.parents, args.n_rows = tokens.data_ptr(), parents.data_ptr(), n_rows.data_ptr()
    args.path, args.count, args.bonus = (result.data_ptr() for result in results)
    _run_with_scratch(args)
    for result, out in zip(results, outs):
        _store(result, out)


def residual_sample(outs: Outputs, p: Tensor, q: Tensor, u: Tensor) -> None:
    """Ids of draws from what p has more than q."""
    n = native()
    u, ids = u.contiguous(), outs[0] if outs[0].is_contiguous() else _i32(*outs[0].shape)
    args = n.ResidualArgs(rows=p.shape[0], V=p.shape[1], dtype=n.DTYPES[p.dtype], p=p.data_ptr(), p_stride=p.stride(0))
    args.q, args.q_stride, args.u, args.ids = q.data_ptr(), q.stride(0), u.data_ptr(), ids.data_ptr()
    _run_with_scratch(args)
    _store(ids, outs[0])


def _stats(logits: Tensor, argmax: Tensor, lse: Tensor, top: Tensor, values: Tensor | None = None, ids: Tensor | None = None) -> None:
    n = native()
    rows = c_int32(logits.shape[0])
    args = n.RowStatsArgs(rows=addressof(rows), logits=logits.data_ptr(), dtype=n.DTYPES[logits.dtype], V=logits.shape[1])
    args.stride = logits.stride(0)
    args.argmax, args.top, args.lse = argmax.data_ptr(), top.data_ptr(), lse.data_ptr()
    if values is not None and ids is not None:
        args.topk, args.topk_values, args.topk_ids = values.shape[1], values.data_ptr(), ids.data_ptr()
    _run_with_scratch(args)


def _run_with_scratch(args: Structure) -> None:
    scratch = native().with_scratch(args)
    native().run(args)
    del scratch  # named, so that it lives until here


def _f32(*shape: int) -> Tensor:
    """Memory for a kernel to write. Whatever torch's defaults are: a buffer of another dtype or device would be overrun."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _i32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="cpu")


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as f32 [M, K]; a view where strides and dtype allow."""
    return x.reshape(-1, x.shape[-1]).float()


def _target(out: Tensor) -> Tensor:
    """f32 rows [M, N] for a kernel to write: `out` itself where it is such a thing, else a buffer."""
    if out.dtype == torch.float32 and out.is_contiguous():
        return out.view(-1, out.shape[-1])
    return _f32(out.numel() // out.shape[-1], out.shape[-1])


def _store(rows: Tensor, out: Tensor) -> None:
    """What a kernel wrote into `_target(out)` is in `out` afterwards."""
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
