"""Attention of other packages on a GPU: what tree attention is measured against there beside torch. Each is imported when it is used.

FlashInfer takes a tree as a bit mask: over all keys in its prefill kernels, over the tree's own in XQA. FlashAttention has no tree: it
takes part with single rows, which are plain decoding.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ramify.ops import _cuda

PAGE, XQA_PAGE, WORKSPACE = 16, 64, 128 << 20


def missing(module: str, package: str) -> str:
    """Why a peer is not there; empty when it is."""
    return "" if find_spec(module) else f"pip install {package}"


def paged(x: Any, page: int) -> tuple[Tensor, Tensor, int]:
    """Keys and values of tail and context in one sequence of pages [pages, page, Hkv, D], and how many slots are in use."""
    total = x.k.shape[1] + x.tail_k.shape[1]
    caches = []
    for context, tail in ((x.k, x.tail_k), (x.v, x.tail_v)):
        pool = context.new_zeros(-(-total // page) * page, *context.shape[2:])
        pool[: context.shape[1]], pool[context.shape[1] : total] = context[0], tail[0]
        caches.append(pool.view(-1, page, *context.shape[2:]))
    return caches[0], caches[1], total


def flashinfer_mask(x: Any) -> tuple:
    """The planned wrapper of FlashInfer's paged prefill with the whole [T, context + T] mask."""
    import flashinfer

    k, v, total = paged(x, PAGE)
    (_, T, Hq, D), device = x.q.shape, x.q.device

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    pages = torch.arange(len(k), dtype=torch.int32, device=device)
    sizes = ints(0, T), ints(0, len(k)), pages, ints((total - 1) % PAGE + 1), Hq, k.shape[2], D, PAGE
    wrapper.plan(*sizes, custom_mask=x.mask.flatten(), q_data_type=x.q.dtype, kv_data_type=k.dtype)
    return wrapper, x.q[0].contiguous(), (k, v)


def run_flashinfer_mask(wrapper: Any, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    """o [1, T, Hq, D]."""
    return wrapper.run(q, cache)[None]


def mask_words(visible: Tensor) -> Tensor:
    """bool [T, T] -> uint16 [1, T, 2 * ceil(T / 32)]: bit j & 15 of word j >> 4 of a row says that it sees row j."""
    T = len(visible)
    bits = torch.nn.functional.pad(visible, (0, -T % 32)).view(T, -1, 16).to(torch.int32)
    return (bits << torch.arange(16, dtype=torch.int32, device=visible.device)).sum(-1).to(torch.uint16)[None]


def xqa(x: Any) -> tuple:
    """The arguments of FlashInfer's XQA with a mask over the tree's own rows."""
    k, v, total = paged(x, XQA_PAGE)
    device = x.q.device
    table = torch.arange(len(k), dtype=torch.int32, device=device)[None]
    length = torch.tensor([[total]], dtype=torch.int32, device=device).to(torch.uint32)
    q, workspace = x.q[:, None].contiguous(), torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    counters = torch.zeros(8 << 20, dtype=torch.int32, device=device).view(torch.uint32)
    T = x.q.shape[1]
    more = {"q_seq_len": T, "mask": mask_words(x.visible)} if T > 1 else {}
    return (q, k, v, table, length, torch.empty_like(q), workspace, counters, k.shape[2], XQA_PAGE), more


def run_xqa(args: tuple, more: dict[str, Any]) -> Tensor:
    """o [1, T, Hq, D]."""
    import flashinfer.xqa

    flashinfer.xqa.xqa(*args, **more)
    return args[5][:, 0]


def flash_inputs(x: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, and keys and values with the tail behind the context, all [1, rows, heads, D]."""
    return x.q, torch.cat([x.k, x.tail_k], dim=1), torch.cat([x.v, x.tail_v], dim=1)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2, causal with the last row at the last key."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3, the same."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def by_mma(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call on the attention kernel of chips without wgmma."""

    def run(*args: Any) -> Any:
        before, _cuda.VARIANT = _cuda.VARIANT, _cuda.MMA
        try:
            return call(*args)
        finally:
            _cuda.VARIANT = before

    return run
