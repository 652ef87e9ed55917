"""Ops over fixed tensors, for a step that is recorded once and replayed: checked here, bound to their kernels, never checked again.

Each function takes its outputs last, but for those that write in place, and returns a `Bound`. No call of a Bound reads what its tensors
hold, so a list of them can become a CUDA graph; ASKING are the ops whose references do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramify.ops import _cuda, attention, draft, glue, kv, sample, verify
from ramify.ops._library import Bound, Outputs, launcher
from ramify.ops.linear import _linear, _low_bit
from ramify.quant.packing import packed
from ramify.quant.weight import QuantizedWeight

ASKING = ("rope_append", "tree_attention", "kv_commit", "verify_greedy")


def embed(ids: Tensor, table: Tensor, out: Tensor) -> Bound:
    """ops.embed in out's dtype."""
    return glue._embed.bind((out,), ids, table, out.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Bound:
    """ops.rms_norm."""
    return glue._rms_norm.bind((out,), x, weight, eps)


def silu_mul(x: Tensor, out: Tensor) -> Bound:
    """ops.silu_mul."""
    return glue._silu_mul.bind((out,), x)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Bound:  # fmt: skip
    """ops.rope_append, its queries into q. Rows of padding may share a slot that nobody reads."""
    return glue._rope_append.bind(qkv, cos, sin, positions, slots, k, v, q_norm, k_norm, eps, out=q)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tail_k: Tensor, tail_v: Tensor, ancestors: Tensor, prefix_len: Tensor, page_table: Tensor,
    window: int, tail_rows: Tensor, out: Tensor, lse: Tensor,
) -> Bound:  # fmt: skip
    """ops.tree_attention over pages, with the usual scale and no sink."""
    scale = q.shape[3] ** -0.5
    return attention._tree_attention.bind(
        (out, lse), q, k, v, tail_k, tail_v, ancestors, prefix_len, page_table, scale, window, 0, tail_rows
    )


def decide_rows(logits: Tensor, stats: Outputs, largest: Outputs = (), draws: tuple[Tensor, ...] = ()) -> list[Bound]:
    """What a step decides by its logits [R, V]: one call that reads them once where a GPU's kernels run it all, else a call for each op.

    stats: argmax, lse and top of ops.row_stats. largest: values and ids of ops.topk_logits, k as wide as they are; () for none. draws:
    temperature float32, seed and index int64 and drawn int32 [R], a token from softmax(logits / temperature) of every row as
    ops.verify_sample draws it at the index; () for none. Outputs are dense. The bits are those of the ops.
    """
    calls = [verify._row_stats.bind(stats, logits)]
    if largest:
        calls.append(verify._topk_logits.bind(largest, logits, largest[1].shape[1]))
    if draws:
        calls.append(_draw(logits, *draws))
    backend = calls[0].backend
    if len(calls) == 1 or backend not in _DECIDE_ROWS or any(call.backend != backend for call in calls):
        return calls
    wanted = largest or (None, None), draws or (None,) * 4
    return [Bound(" + ".join(call.op for call in calls), backend, partial(_DECIDE_ROWS[backend], logits, *stats, *wanted[0], *wanted[1]))]


_DECIDE_ROWS = {"cuda": _cuda.decide_rows, "triton": launcher("decide_rows", lambda args: args[0])}


def _draw(logits: Tensor, temperature: Tensor, seed: Tensor, index: Tensor, drawn: Tensor) -> Bound:
    """verify_sample over trees of one row, whose bonus is the token."""
    ones, minus = (torch.full((len(drawn), 1), value, dtype=torch.int32, device=drawn.device) for value in (1, -1))
    path, count = torch.empty_like(ones), torch.empty_like(drawn)
    inputs = logits[:, None], ones, minus, ones[:, 0], temperature, seed, index, None, "det"
    return sample._verify_sample.bind((path, count, drawn), *inputs)


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Bound:
    """ops.linear; a low-bit weight takes x as it is."""
    if isinstance(weight, Tensor):
        return _linear.bind((out,), x, weight, bias, None, residual)
    panels = packed(weight) if x.device.type == "cpu" else None
    tensors = weight.codes, weight.scale, weight.zero, weight.perm, panels
    return _low_bit.bind((out,), x, *tensors, weight.format.name, bias, None, residual, "exact")


def kv_moves(draft_k: Tensor, draft_v: Tensor, k: Tensor, v: Tensor, source: Tensor, target: Tensor, count: Tensor) -> Bound:
    """Copy slot source[i] of the drafts to slot target[i] of the caches, all layers at once, for every i with count[i] = 1, not 0.

    draft_k, draft_v [L, drafts, Hkv, D]; k, v [L, slots, Hkv, D]; source, target, count int32 [n]. It is kv_commit of n sequences of one
    row each over one tail and one cache. The reference makes every move, so entries whose count is 0 must name slots that hold nothing.
    """
    n = len(source)
    stacked = [x[:, None].expand(-1, n, -1, -1, -1) for x in (draft_k, draft_v, k, v)]
    bound = kv._kv_commit.bind(*stacked, source[:, None], count, target, None)
    if bound.backend != "reference":
        return bound
    return Bound("kv_commit", "reference", partial(_move, draft_k, draft_v, k, v, source, target))


def _move(draft_k: Tensor, draft_v: Tensor, k: Tensor, v: Tensor, source: Tensor, target: Tensor) -> None:
    for tail, cache in ((draft_k, k), (draft_v, v)):
        cache[:, target.long()] = tail[:, source.long()].to(cache.dtype)


def table_draft(table: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor, out: Tensor) -> Bound:
    """ops.table_draft; what parents and ranks cannot be leaves its row without a token."""
    return draft._table_draft.bind((out,), table, roots, parents, ranks)


def table_learn(table: Tensor, tokens: Tensor, likely: Tensor) -> Bound:
    """ops.table_learn."""
    return draft._table_learn.bind(table, tokens, likely)


def verify_greedy(tokens: Tensor, parents: Tensor, chosen: Tensor, n_rows: Tensor, outs: Outputs) -> Bound:
    """ops.verify_greedy; chosen: the token after every row, most likely or drawn. outs: path, count and bonus."""
    return verify._verify_greedy.bind(outs, tokens, parents, chosen, n_rows)


def kv_commit(
    tail_k: Tensor, tail_v: Tensor, k: Tensor, v: Tensor, path: Tensor, count: Tensor, length: Tensor, page_table: Tensor
) -> Bound:
    """ops.kv_commit of all layers into pages."""
    return kv._kv_commit.bind(tail_k, tail_v, k, v, path, count, length, page_table)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> Bound:
    """x W^T + bias into out, or added to what it holds: a dense linear by torch, which on a GPU is cuBLAS. float32 sums, rounded once.

    out may be float32 where x and weight are narrower: then nothing is rounded. x [M, K], weight [N, K], bias [N], out [M, N].
    """
    turned = weight.t()
    call: Callable[[], Any]
    if out.dtype != x.dtype:
        call = partial(_wide_product, x, turned, out)
    elif add:
        call = partial(out.addmm_, x, turned)
    elif bias is not None:
        return Bound("linear", "torch", partial(torch.addmm, bias, x, turned, out=out))
    else:
        call = partial(torch.mm, x, turned, out=out)
    return Bound("linear", "torch", call if bias is None else partial(_then_add, call, out, bias))


def _wide_product(x: Tensor, turned: Tensor, out: Tensor) -> None:
    if x.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(x, turned, out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), turned.to(out.dtype), out=out)


def _then_add(call: Callable[[], Any], out: Tensor, bias: Tensor) -> None:
    call()
    out.add_(bias)
